"""What several test files share: real weights and recordings (tests/.cache, not in git), a tiny
world for the scripts, two ways to run them.
"""

import contextlib
import io
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path

# One thread, here and in the scripts the tests start: the models are tiny, and with busy neighbours
# a second thread costs minutes (LOG.md).
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import soundfile
import torch

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / "tests" / ".cache"
sys.path.insert(0, str(ROOT))


# -- real weights and recordings -------------------------------------------------------------------


def run_or_skip(command, cwd):
    """Run a command that needs a package registry; skip the test, with the reason, where it cannot
    be reached.
    """
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(
            f"`{' '.join(map(str, command))}` failed (no network?): {done.stderr.strip()[-300:]}"
        )


def prepared(name):
    """weights/NAME, made by demo/prepare.py (with only a handful of demo clips) where it is
    missing.
    """
    folder = ROOT / "weights" / name
    if not (folder / "model.safetensors").is_file():
        run_or_skip(
            [
                sys.executable,
                "demo/prepare.py",
                "--n_train",
                "3",
                "--n_test",
                "3",
                "--data_dir",
                str(CACHE / "demo"),
            ],
            ROOT,
        )
    return folder


@pytest.fixture(scope="session")
def tiny_en_folder():
    """Real weights: Whisper tiny.en in the Hugging Face layout."""
    return prepared("whisper-tiny.en")


@pytest.fixture(scope="session")
def smollm2_folder():
    """Real weights: SmolLM2-135M-Instruct in the Hugging Face layout."""
    return prepared("smollm2-135m-instruct")


@pytest.fixture(scope="session")
def real_speech_clips():
    """Paths of ten real English recordings of 1 to 7 s, 16 kHz mono wav: five sentences of an audio
    book, five short commands.
    """
    data = CACHE / "pocketsphinx" / "usr/share/pocketsphinx/test/data"
    if not data.is_dir():
        CACHE.mkdir(parents=True, exist_ok=True)
        run_or_skip(["apt-get", "download", "pocketsphinx-testdata"], CACHE)
        run_or_skip(
            ["dpkg", "-x", next(CACHE.glob("pocketsphinx-testdata_*.deb")), "pocketsphinx"], CACHE
        )
    clips = sorted(data.glob("librivox/*.wav")) + sorted(data.glob("cards/*.wav"))
    assert len(clips) == 10
    return clips


# -- a tiny world: random models with the real tokenizers, short clips, and every kind of data file


def randomize(module, std=0.15):
    """Every weight away from its trivial start: transformers sets biases to 0 and norms to 1, which
    would hide a forgotten one.
    """
    for name, parameter in module.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm.weight" in name.lower()), std=std)
    return module.eval()


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory, smollm2_folder, tiny_en_folder):
    """A folder with llm/, whisper/ (which hears 3 s), data/{clips/, train.jsonl, test.jsonl,
    *.metadata.jsonl} and instructions/.

    .models: flags for these folders. .rows: the training rows. .adapter: flags for a small
    Q-Former.
    """
    import transformers

    folder = tmp_path_factory.mktemp("world")
    llm, whisper, data, instructions = (
        folder / name for name in ("llm", "whisper", "data", "instructions")
    )
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=49152, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
        tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    model = randomize(transformers.LlamaForCausalLM(config))
    model.model.embed_tokens.weight.data[2] *= (
        2  # a loud end-of-turn token: answers end, after 4 to 30 tokens
    )
    model.save_pretrained(llm)
    config = transformers.WhisperConfig(
        vocab_size=51864, num_mel_bins=80, d_model=64, encoder_layers=4, encoder_attention_heads=4,
        encoder_ffn_dim=96, decoder_layers=2,
        decoder_attention_heads=4, decoder_ffn_dim=96, max_source_positions=150, max_target_positions=448,
    )  # fmt: skip
    randomize(transformers.WhisperForConditionalGeneration(config)).save_pretrained(whisper)
    for source, target, names in (
        (
            smollm2_folder,
            llm,
            ("tokenizer.json", "tokenizer_config.json", "generation_config.json"),
        ),
        (
            tiny_en_folder,
            whisper,
            (
                "tokenizer.json",
                "tokenizer_config.json",
                "generation_config.json",
                "preprocessor_config.json",
            ),
        ),
    ):
        for name in names:
            shutil.copy(source / name, target / name)

    # 12 clips of 1 to 3 s: noise for speech, tones for music, both for sounds
    (data / "clips").mkdir(parents=True)
    instructions.mkdir()
    random, clips = np.random.default_rng(0), []
    for i in range(12):
        domain = ("speech", "sound", "music")[i % 3]
        seconds = 1 + 2 * i / 11
        t = np.arange(int(seconds * 16000)) / 16000
        wave = (domain != "music") * 0.1 * random.standard_normal(len(t)) + (
            domain != "speech"
        ) * 0.3 * np.sin(2 * np.pi * (200 + 100 * i) * t)
        soundfile.write(data / f"clips/{i:02d}.wav", wave, 16000)
        segment = {
            "start": 0.0,
            "end": round(seconds, 2),
            "attributes": {"Pitch": ("low", "high")[i % 2], "Kind": f"kind {i % 4}"},
        }
        if domain == "speech":
            segment["text"] = "one two three"[: 3 + 4 * (i % 3)]
        clips.append(
            {"id": f"clips/{i:02d}.wav", "dataset": "tiny", "domain": domain, "segments": [segment]}
        )
    for domain in ("speech", "sound", "music"):
        (instructions / f"{domain}.txt").write_text(
            "".join(
                f"{what} is in this {domain}?\n" for what in ("What", "Which pitch", "What kind")
            )
        )

    def row(i, clip):
        prompt = ("What is heard?", "Which pitch has it?", "Describe the clip in one sentence.")[
            i % 3
        ]
        facts = ", ".join(
            f"{name}: {value}" for name, value in clip["segments"][0]["attributes"].items()
        )
        audio = {"audio": clip["id"], "text": " ".join(["la"] * (i % 4)) or " "}
        return {
            "id": clip["id"], "dataset": "tiny", "seed_description": f"[00:00-00:02] ({facts})",
            "prompt": prompt,
            "response": f"It is {facts}." * (1 + i % 3),
            "messages": [
                {"role": "system", "content": "You hear a clip."},
                {"role": "user", "content": f"<start_audio><|AUDIO|><end_audio>\n\n{prompt}",
                    "audios": [audio]},
            ],
        }  # fmt: skip

    rows = [row(i, clips[i % 12]) for i in range(24)]
    write_jsonl(data / "train.metadata.jsonl", clips)
    write_jsonl(data / "test.metadata.jsonl", clips[:6])
    write_jsonl(data / "train.jsonl", rows)
    write_jsonl(data / "test.jsonl", [row(i, clips[i]) for i in range(6)])
    return types.SimpleNamespace(
        folder=folder, llm=llm, whisper=whisper, data=data, instructions=instructions, clips=clips, rows=rows,
        models=["--llm", llm, "--whisper", whisper, "--audio_root", data],
        adapter=dict(n_layers=1, n_queries=4, audio_seconds=3),
    )  # fmt: skip


# -- running the scripts ---------------------------------------------------------------------------


def flags(**settings):
    return [part for name, value in settings.items() for part in (f"--{name}", value)]


def script(name, *arguments):
    """What `python NAME ARGUMENTS` does, in this process: saves the seconds that importing torch
    takes. -> .status .out .err

    Exceptions come through: a script that would end in a traceback fails the test.
    """
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    argv, out, err, status = sys.argv, io.StringIO(), io.StringIO(), 0
    sys.argv = [str(ROOT / name), *map(str, arguments)]
    sys.path.insert(0, str((ROOT / name).parent))
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
        err.write(f"{end.code}\n" if isinstance(end.code, str) else "")
    finally:
        sys.argv = argv
        del sys.path[0]
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return types.SimpleNamespace(status=status, out=out.getvalue(), err=err.getvalue())


def start(*command):
    """The same in a process of its own, to be killed or to have company. -> Popen; its stdout
    carries stderr too.
    """
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def torchrun(n_processes, *command):
    """In n_processes under torchrun, in float32; fails the test if it fails or hangs. -> what it
    printed
    """
    process = start(
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={n_processes}",
        "tests/in_float32.py",
        *command,
    )
    try:
        out, _ = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its workers
        out, _ = process.communicate()
        pytest.fail(f"still running after five minutes: does one rank wait for another?\n{out}")
    assert process.returncode == 0, out
    return out


@contextlib.contextmanager
def in_float32():
    """Scripts run in this process compute in float32, as under tests/in_float32.py."""
    with pytest.MonkeyPatch.context() as patch:
        for place in ("engine.run.compute_dtype", "model.compute_dtype"):
            patch.setattr(place, lambda device: torch.float32)
        yield


@pytest.fixture
def float32():
    with in_float32():
        yield
