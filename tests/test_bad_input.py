"""Bad input: audio files that are none, JSONL of any bytes, text that would be a turn, absurd
settings, model folders that hold programs.

Loaded rightly or refused in one line; one bad file or row never stops a job, and the summary counts
it. The slow ones: `bash tests/torture.sh`.
"""

import dataclasses
import json
import math
import os
import pickle
import random
import re
import shutil
import struct
import time

import numpy as np
import pytest
import soundfile
import torch
from conftest import ROOT, read_jsonl, script, start, write_jsonl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_faults import evaluating, generating, one_line, training

import eval as eval_script
import generate_data
import train
from engine import checkpoint, run
from engine.rows import JsonLines, audio_file
from llama import Llama
from model import AUDIO, AUDIO_ID, DeSTA, audio_slot, audio_windows, build_prompt, description_slot
from tokenizer import GUARD, Tokenizer
from whisper import SAMPLE_RATE, Whisper, load_audio

# The same examples in every run: CI must not fail one time in fifty for a rare draw. Raise n to
# look for more.
quick = lambda n: settings(
    max_examples=n,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    database=None,
    derandomize=True,
)


@pytest.fixture(scope="module")
def world(tiny_world):
    """The tiny world with an adapter to evaluate."""
    torch.manual_seed(0)
    DeSTA.from_pretrained(
        tiny_world.llm, tiny_world.whisper, device="cpu", **tiny_world.adapter
    ).save_adapter(tiny_world.folder / "adapter")
    return tiny_world


@pytest.fixture(scope="module")
def model(world):
    return DeSTA.from_pretrained(
        world.llm, world.whisper, world.folder / "adapter", dtype=torch.float32, device="cpu"
    )


# -- audio -----------------------------------------------------------------------------------------

LOADS, REFUSED, EITHER = "loads", "refused", "either"


def bad_audio(folder):
    """More than 200 files no recorder would make -> [(path, LOADS, REFUSED or EITHER)]"""
    chance, made = random.Random(0), []
    noise = np.random.default_rng(0)
    tone = lambda seconds, rate, channels=1: (
        0.3
        * np.sin(
            np.arange(round(seconds * rate))[:, None] * 2000 / rate + 0.1 * np.arange(channels)
        )
    )

    def add(name, expected, data=None, samples=None, rate=16000, **how):
        path = folder / name
        if data is not None:
            path.write_bytes(data)
        elif samples is not None:
            soundfile.write(path, samples, rate, **how)
        made.append((path, expected))
        return path

    # every rate, width and number of channels
    for n, subtype in enumerate(
        ("PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "IMA_ADPCM")
    ):
        for rate in (8000, 11025, 16000, 22050, 44100, 48000, 96000, 192000):
            channels = 1 if subtype == "IMA_ADPCM" else 1 + (n + rate) % 8
            add(
                f"{subtype}_{rate}_{channels}.wav",
                LOADS,
                samples=tone(0.3, rate, channels),
                rate=rate,
                subtype=subtype,
            )
    for extension in ("flac", "ogg", "mp3", "aiff", "au", "caf", "w64"):
        add(
            f"whole.{extension}",
            LOADS,
            samples=tone(0.5, 16000),
            subtype=None if extension in ("flac", "ogg", "mp3") else "PCM_16",
        )
    # cut anywhere, header only, nothing, anything
    for extension in ("wav", "flac", "ogg", "mp3", "aiff"):
        whole = folder / f"cut_from.{extension}"
        soundfile.write(whole, 0.1 * noise.standard_normal(16000), 16000)
        data = whole.read_bytes()
        for n in range(8):
            # What is left of an mp3 or ogg is the clip, if it holds a frame; the others say how
            # long they are, and with half of that they load.
            size = chance.randrange(1, len(data) - 2)
            share = size / len(data)
            unsure = (
                extension in ("mp3", "ogg")
                or abs(share - 0.5) < 0.02
                or extension == "flac"
                and 0.5 < share < 0.8
            )  # a block of flac is a quarter
            add(
                f"cut_{n}.{extension}",
                EITHER if unsure else LOADS if share > 0.5 else REFUSED,
                data[:size],
            )
            at = chance.randrange(60)
            add(
                f"flipped_{n}.{extension}",
                EITHER,
                data[:at] + bytes([data[at] ^ 1 << chance.randrange(8)]) + data[at + 1 :],
            )
        add(f"header.{extension}", REFUSED, data[:44])
        add(f"nothing.{extension}", REFUSED, b"")
        add(f"zeros.{extension}", REFUSED, bytes(5000))
    for extension in (
        "wav",
        "flac",
        "ogg",
        "mp3",
        "aiff",
        "au",
        "caf",
        "w64",
        "raw",
        "txt",
        "none",
        "WAV",
    ):
        for n in range(2):
            add(f"random_{n}.{extension}", REFUSED, noise.bytes(3000 * (n + 1)))
        add(f"page.{extension}", REFUSED, b"<html>404 not found</html>" * 20)
    # another extension than what is inside
    wav = (
        (folder / "PCM_16_16000_2.wav").read_bytes()
        if (folder / "PCM_16_16000_2.wav").exists()
        else next(folder.glob("PCM_16_16000*")).read_bytes()
    )
    for extension in ("mp3", "flac", "ogg", "txt", "aiff", "none"):
        add(f"wav_inside.{extension}", LOADS, wav)
    add("wav_inside.raw", REFUSED, wav)
    # odd samples
    for name, samples in dict(
        one_sample=np.full(1, 0.1), two_samples=np.full(2, 0.1), silence=np.zeros(8000),
        constant=np.full(8000, 0.5), clipped=np.sign(noise.standard_normal(8000)),
        denormal=np.full(8000, 1e-42), loud=np.full(8000, 1e9),
    ).items():  # fmt: skip
        add(f"{name}.wav", LOADS, samples=samples, subtype="FLOAT")
    for name, value in (("nan", np.nan), ("inf", np.inf), ("minus_inf", -np.inf), ("1e30", 1e30)):
        samples = np.zeros(8000)
        samples[4000] = value
        add(f"{name}.wav", REFUSED, samples=samples, subtype="FLOAT")
        add(f"{name}_double.wav", REFUSED, samples=samples, subtype="DOUBLE")
    add("no_samples.wav", REFUSED, samples=np.zeros(0))
    add("hour.flac", LOADS, samples=np.zeros(3600 * 8000, np.int16), rate=8000)
    # headers that lie
    header = lambda rate=16000, channels=1, bits=16, size=1000, kind=1: b"RIFF" + struct.pack("<I",
        36 + 1000) + b"WAVEfmt " + struct.pack(
        "<IHHIIHH", 16, kind, channels, rate, 2 * rate % 2**32, 2,
        bits) + b"data" + struct.pack("<I", size) + bytes(range(250)) * 4  # fmt: skip
    add("rate_0.wav", REFUSED, header(rate=0))
    add("rate_1.wav", REFUSED, header(rate=1))
    add("rate_max.wav", REFUSED, header(rate=2**31 - 1))
    add("channels_0.wav", REFUSED, header(channels=0))
    add("channels_max.wav", REFUSED, header(channels=65535))
    add("bits_7.wav", EITHER, header(bits=7))
    add("kind_0.wav", REFUSED, header(kind=0))
    add("claims_too_much.wav", REFUSED, header(size=10**9))
    add("streamed.wav", LOADS, header(size=2**32 - 1))
    flac = bytearray((folder / "whole.flac").read_bytes())
    flac[21:26] = bytes([flac[21] | 0x0F, 255, 255, 255, 255])  # 2**36 samples
    add("claims_terabytes.flac", REFUSED, bytes(flac))
    # what is no file
    (folder / "folder.wav").mkdir()
    (folder / "loop.wav").symlink_to(folder / "loop.wav")
    (folder / "dangling.wav").symlink_to(folder / "nowhere.wav")
    (folder / "device.wav").symlink_to("/dev/zero")
    os.mkfifo(folder / "pipe.wav")
    for name in (
        "folder.wav",
        "loop.wav",
        "dangling.wav",
        "device.wav",
        "pipe.wav",
        "x" * 300 + ".wav",
        "null\0.wav",
        "",
    ):
        made.append((folder / name if "\0" not in name else str(folder / name), REFUSED))
    if os.geteuid() != 0:  # root reads everything
        path = add("unreadable.wav", REFUSED, samples=tone(0.3, 16000))
        path.chmod(0)
    (folder / "link.wav").symlink_to(folder / "silence.wav")
    add("link.wav", LOADS)
    return made


@pytest.fixture(scope="module")
def audio(world):
    (folder := world.data / "bad").mkdir()
    return bad_audio(folder)


def test_two_hundred_bad_audio_files(audio, world):
    """Every file, its first three seconds and (but for the hour) whole: mono and finite, or one
    line that names it.
    """
    assert len(audio) >= 200
    assert {expected for _, expected in audio} == {LOADS, REFUSED, EITHER}
    results, warnings = {LOADS: 0, REFUSED: 0}, []
    for path, expected in audio:
        for seconds in (3,) if "hour" in str(path) else (3, None):
            begin = time.time()
            try:
                wave = load_audio(
                    audio_file(path, world.data),
                    seconds,
                    warn=lambda text: warnings.append((path, text)),
                )
                found = LOADS
                assert (
                    wave.dtype == torch.float32
                    and wave.dim() == 1
                    and wave.isfinite().all()
                    and len(wave) <= 3 * SAMPLE_RATE
                ), path
            except (ValueError, OSError) as error:
                found = REFUSED
                assert "\n" not in str(error) and (os.path.basename(path)[:50] or "bad") in str(
                    error
                ), error
            assert expected in (found, EITHER), f"{path}: {found}"
            assert time.time() - begin < 20, path
        results[found] += 1
        if re.search(
            r"/([A-Z]\w+)_(\d+)_(\d)\.wav$", str(path)
        ):  # the tone has come through rate, width and channels
            n, loudness = len(load_audio(path)), load_audio(path)[100:-100].square().mean().sqrt()
            assert abs(n - 0.3 * SAMPLE_RATE) < (1200 if "ADPCM" in str(path) else 5), (
                path
            )  # ADPCM is padded to whole blocks
            assert loudness > 0.03, path
    assert all("\n" not in text and str(path) in text for path, text in warnings)
    cut = {path.suffix for path, text in warnings if path.name.startswith("cut_")}
    assert {".wav", ".aiff", ".flac"} <= cut
    assert not [path for path, _ in warnings if (path, LOADS) in audio and "cut_" not in path.name]
    print(
        f"\n{len(audio)} files: {results[LOADS]} loaded, {results[REFUSED]} refused, {len(warnings)} warnings"
    )


@pytest.mark.slow
def test_a_training_row_of_every_bad_file(audio, world, model):
    """Never an exception; what is left out says why, in one line."""
    rows = [json.loads(json.dumps(world.rows[0])) for _ in audio]
    for row, (path, _) in zip(rows, audio):
        row["messages"][1]["audios"][0]["audio"] = str(path)
    write_jsonl(world.data / "bad.jsonl", rows)
    dataset = train.Rows(
        world.data / "bad.jsonl", model.reader, train.Settings(audio_root=str(world.data))
    )
    for i, (path, expected) in enumerate(audio):
        row = dataset[i]
        assert expected in (LOADS if "ids" in row else REFUSED, EITHER), path
        assert (
            "ids" in row
            and row["mels"][0].isfinite().all()
            or "\n" not in row["left_out"]
            and f"bad.jsonl, row {i + 1}: " in row["left_out"]
        )


@pytest.mark.slow
def test_jobs_over_all_bad_files(audio, world, tmp_path):
    """generate_data.py and then train.py over all of them, to the end; counts of made and left out
    add up to all.
    """
    clips = [world.clips[0] | {"id": str(path)} for path, _ in audio]
    out = tmp_path / "rows.jsonl"
    done = script(
        *generating(
            world, out, metadata=write_jsonl(tmp_path / "m.jsonl", clips), per_clip=1, block=64
        )
    )
    assert done.status == 0, done.err
    counts = json.loads((tmp_path / "rows.jsonl.info.json").read_text())["counts"]
    refused = sum(expected == REFUSED for _, expected in audio)
    assert counts["rows"] + counts["skipped"] == len(audio)
    assert refused <= counts["skipped"] <= refused + sum(e == EITHER for _, e in audio)
    assert f"{counts['skipped']} clips skipped" in done.out
    assert "skipped: " in done.out
    rows = [json.loads(json.dumps(world.rows[0])) for _ in audio]
    for row, (path, _) in zip(rows, audio):
        row["messages"][1]["audios"][0]["audio"] = str(path)
    steps = len(rows) // 8
    done = script(
        *training(
            world,
            tmp_path / "out",
            data=write_jsonl(tmp_path / "t.jsonl", rows),
            global_batch=8,
            max_steps=steps,
            max_skipped=9,
        )
    )
    assert done.status == 0, done.err
    assert len(re.findall(r"warning: row left out: .*t.jsonl, row \d+: ", done.err)) == 3
    n = int(re.search(r"(\d+) rows left out", done.err)[1])
    assert refused - 8 <= n <= counts["skipped"]
    print(
        f"\n{len(audio)} clips: generate_data.py {counts}; train.py {n} of {8 * steps} rows left out"
    )


def test_one_bad_clip_does_not_stop_an_evaluation(world, tmp_path):
    rows = read_jsonl(world.data / "test.jsonl")
    rows[2]["messages"][1]["audios"][0]["audio"] = "clips/missing.wav"
    write_jsonl(tmp_path / "test.jsonl", rows)
    shutil.copy(world.data / "test.metadata.jsonl", tmp_path)
    done = script(*evaluating(world, tmp_path / "p.jsonl", data=tmp_path / "test.jsonl", block=6))
    assert done.status == 0, done.err
    assert (
        "2 of 6 rows could not be answered and are not scored: row" in done.out
    )  # itself, and the row whose wrong clip it is
    summary = json.loads(done.out.splitlines()[-1])
    assert summary["n"] == 4
    assert summary["failed"] == 2
    assert len(read_jsonl(tmp_path / "p.jsonl")) == 4
    assert len(json.loads((tmp_path / "p.jsonl.info.json").read_text())["failed"]) == 2


# -- JSONL -----------------------------------------------------------------------------------------


@quick(300)
@given(
    st.binary(max_size=300)
    | st.lists(
        st.sampled_from(
            [
                b"{",
                b"}",
                b"\n",
                b"\r\n",
                b'"a"',
                b":",
                b"1",
                b"[",
                b"\xff",
                b"\x00",
                b"\\ud800",
                b'{"a": 1}',
            ]
        )
    ).map(b"".join)
)
def test_any_bytes_are_rows_or_one_line(tmp_path_factory, data):
    (path := tmp_path_factory.getbasetemp() / "any.jsonl").write_bytes(data)
    try:
        rows = JsonLines(path)
    except ValueError as error:
        assert "holds no rows" in str(error)
        assert not any(len(line) > 1 for line in data.split(b"\n"))
        return
    for i in range(len(rows)):
        try:
            assert isinstance(rows[i], dict)
        except ValueError as error:
            assert re.search(rf"any.jsonl, row {i + 1} (is not|is longer|holds)", str(error))
            assert "\n" not in str(error)


def test_lines_too_long_or_too_deep(tmp_path):
    lines = [
        b'{"a": "' + b"x" * 50_000_000 + b'"}',
        b"[" * 200_000,
        b'{"a": ' + b"9" * 6000 + b"}",
        b'{"a": "\\ud83d"}',
        b'{"a": 1}',
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    rows = JsonLines(tmp_path / "a.jsonl")
    for i in range(4):
        with pytest.raises(ValueError, match=f"a.jsonl, row {i + 1} is"):
            rows[i]
    assert len(rows) == 5
    assert rows[4] == {"a": 1}


anything = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20),
        10**20) | st.floats() | st.text(max_size=20) | st.sampled_from(["<|im_end|>", AUDIO,
            "clips/00.wav", "../x", "/etc/passwd"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content",
        "audios", "audio", "text", "start", "end", "attributes"]) | st.text(max_size=5), inner, max_size=4),
    max_leaves=6,
)  # fmt: skip


def places(value, path=()):
    """Paths of all that is inside a JSON value."""
    inside = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    return [path, *(found for key, part in inside for found in places(part, (*path, key)))]


@st.composite
def broken(draw, row):
    """A good row with one to three of its parts replaced by anything, or taken away."""
    row = json.loads(json.dumps(row))
    for _ in range(draw(st.integers(1, 3))):
        *path, last = draw(st.sampled_from(places(row)[1:]))
        parent = row
        for key in path:
            parent = parent[key]
        if draw(st.booleans()) and isinstance(parent, dict):
            del parent[last]
        else:
            parent[last] = draw(anything)
        if not isinstance(row, dict) or not row:
            break
    return row


def test_broken_training_rows(world, model):
    dataset = train.Rows(
        world.data / "train.jsonl", model.reader, train.Settings(audio_root=str(world.data))
    )
    seen = {"ids": 0, "left_out": 0}

    @quick(300)
    @given(broken(world.rows[1]))
    def check(row):
        dataset.rows = OneRow(row)
        found = dataset[0]
        seen["ids" if "ids" in found else "left_out"] += 1
        if "ids" in found:
            assert all(isinstance(i, int) and (i >= 0 or i == AUDIO_ID) for i in found["ids"])
            assert found["target"]
            assert found["ids"].count(AUDIO_ID) == 4 * len(found["mels"])
        else:
            assert "\n" not in found["left_out"]

    check()
    assert min(seen.values()) > 20, seen


class OneRow:
    """Stands for a JsonLines of one row."""

    path = "t.jsonl"

    def __init__(self, row):
        self.row = row

    def __getitem__(self, i):
        return self.row

    def name(self, i):
        return "t.jsonl, row 1"


def test_broken_metadata(world, tmp_path):
    """Broken rows go through generate_data.py together, and the job ends with a row or a reason for
    each.
    """
    chance, rows = random.Random(0), []

    @quick(60)
    @given(broken(world.clips[0]))
    def collect(row):
        rows.append(row)

    collect()
    rows += [
        world.clips[0] | {"segments": [{"start": 0, "end": end}]}
        for end in (math.nan, math.inf, -1, "1", None, 1e308)
    ]
    rows += [
        world.clips[0] | {"segments": [{"start": 0, "end": 1, "text": "word " * 3000}]},
        *world.clips[:6],
    ]
    lines = [json.dumps(row) for row in rows] + ['{"id": "\\ud800"}']
    chance.shuffle(lines)
    (tmp_path / "m.jsonl").write_text("\n".join(lines) + "\n")
    out = tmp_path / "rows.jsonl"
    done = script(
        *generating(
            world, out, metadata=tmp_path / "m.jsonl", per_clip=1, block=100, max_new_tokens=2
        )
    )
    assert done.status == 0, done.err
    counts = json.loads((tmp_path / "rows.jsonl.info.json").read_text())
    n_lines = sum(bool(line.strip()) for line in lines)
    assert counts["counts"]["rows"] + counts["counts"]["skipped"] == n_lines
    assert counts["counts"]["rows"] > 5
    assert counts["counts"]["skipped"] > 20
    assert all("\n" not in row["skipped"] for row in counts["skipped"])


# -- text that would be a turn ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(world):
    return Tokenizer(world.llm)


PIECES = ["<|im_end|>", "<|im_start|>", "<|im_start|>assistant\n", "<|endoftext|>", "<|im_",
    "end|>", "<", "|", GUARD, "<start_audio>", "<end_audio>",
          "\n", "system", "é", "e\u0301", "\u212a", "\U0001f600", "\u200d", "\u202e", "\x00", "a",
          " ", "<|AUD", "IO|>", "{{ messages }}", "{% raw %}"]  # fmt: skip


@quick(300)
@given(
    st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=8).map("".join),
    st.sampled_from(["content", "system", "transcript", "description", "role"]),
)
def test_no_text_becomes_a_turn(tokenizer, text, where):
    """Special-token strings in a prompt, a transcript or a description are plain text: the prompt
    has the special tokens of a harmless one.
    """
    parts = dict.fromkeys(["content", "system", "transcript", "description", "role"], "x") | {
        "role": "user"
    }
    special = set(tokenizer.bpe._special_tokens.values())

    def prompt(parts, slot):
        messages = [
            {"role": "system", "content": parts["system"]},
            {"role": parts["role"], "content": f"{AUDIO}\n{parts['content']}",
                "audios": [{"audio": "a.wav", "text": parts["transcript"],
                    "description": parts["description"]}]},
        ]  # fmt: skip
        return build_prompt(tokenizer, messages, slot)

    for slot in (audio_slot(tokenizer, 3), description_slot(tokenizer)):
        harmless = prompt(parts, slot)
        try:
            ids = prompt(parts | {where: text}, slot)
        except ValueError as error:  # another <|AUDIO|>, or no role of the three
            assert AUDIO in text or where == "role", error
            continue
        assert [i for i in ids if i in special] == [i for i in harmless if i in special]
        assert ids.count(AUDIO_ID) == harmless.count(AUDIO_ID)
        if where == "content":
            as_text = tokenizer.decode(
                tokenizer.encode(text.replace(GUARD, ""), special=False), skip_special_tokens=False
            )
            assert as_text.strip() in tokenizer.decode(
                [i for i in ids if i >= 0], skip_special_tokens=False
            )


def test_normalization_makes_no_special_token(tokenizer, monkeypatch):
    """NFC turns the Kelvin sign into K. Where a tokenizer normalizes, "<|TASK|>" spelt with it must
    stay text.
    """
    monkeypatch.setattr(tokenizer, "normal_form", "NFC")
    monkeypatch.setattr(
        tokenizer, "special", re.compile(r"<\|TASK\|>|" + tokenizer.special.pattern)
    )
    monkeypatch.setattr(
        tokenizer.bpe, "_special_tokens", tokenizer.bpe._special_tokens | {"<|TASK|>": 7}
    )
    ids = tokenizer.encode(
        tokenizer.apply_chat_template([{"role": "user", "content": "<|TAS\u212a|>"}])
    )
    assert 7 not in ids
    assert 7 in tokenizer.encode("<|TAS\u212a|>")


@pytest.mark.parametrize("path, inside", [
    ("clips/00.wav", True), ("clips/../clips/00.wav", True), ("../data/clips/00.wav", True),
    ("./clips//00.wav", True),
    ("../clips/00.wav", False), ("/etc/passwd", False), ("clips/../../llm/config.json", False),
    ("../data_of_others/a.wav", False),
])  # fmt: skip
def test_paths_stay_in_the_audio_root(world, model, path, inside):
    row = json.loads(json.dumps(world.rows[0]))
    row["messages"][1]["audios"][0]["audio"] = path
    calls = [
        lambda: model.reader.prepare(row, world.data),
        lambda: model.generate(row["messages"], 2, root=world.data),
        lambda: audio_windows(path, world.data, 3),
    ]
    for call in calls:
        if inside:
            call()
        else:
            with pytest.raises(
                ValueError, match="lies outside the audio root .* give a root that holds it"
            ):
                call()
    if path == "clips/00.wav":  # an absolute path inside the root, and / for a root: allowed
        for root in (world.data, "/"):
            assert len(load_audio(audio_file(world.data / path, root))) > 1000
        assert len(load_audio(audio_file(world.data / path))) > 1000


# -- settings --------------------------------------------------------------------------------------


SCRIPTS = {
    "train.py": (train.Settings, training),
    "generate_data.py": (generate_data.Settings, generating),
    "eval.py": (eval_script.Settings, evaluating),
}
ABSURD = [
    "x",
    "",
    "-2",
    "-1",
    "0",
    "0.5",
    "1e400",
    "nan",
    "-inf",
    str(10**9),
    str(10**30),
    "1e-30",
    "\udcff",
]


@pytest.mark.parametrize("name", SCRIPTS)
def test_settings_are_in_range_or_one_line(name, capsys):
    """All flags with all absurd values: what argparse lets through is finite and in the range that
    the help promises.
    """
    cls, refused = SCRIPTS[name][0], 0
    for field in dataclasses.fields(cls):
        for value in ABSURD:
            try:
                found = getattr(
                    run.parse_settings(cls, "", [f"--{field.name}={value}"]), field.name
                )
                low, high = field.metadata["range"]
                assert (
                    isinstance(field.default, str) or low <= found <= high or found == field.default
                )
                capsys.readouterr()
            except SystemExit as end:
                (line,) = capsys.readouterr().err.strip().splitlines()
                assert end.code == 2
                assert f"error: argument --{field.name}: " in line
                refused += 1
    assert refused > 50


def flag_cases():
    for name, (cls, _) in SCRIPTS.items():
        for field in dataclasses.fields(cls):
            low, high = field.metadata["range"]
            kind = type(field.default)
            values = (
                ["", "nowhere/at/all", "\0", "x" * 5000]
                if kind is str
                else [kind(low), kind(min(high, 10**9))] + [1e-30] * (kind is float)
            )
            for value in values:
                if "\0" not in str(value):
                    yield name, field.name, value


@pytest.mark.slow
def test_every_flag_at_its_limits(world, tmp_path):
    """Smallest and largest allowed value of each flag, and strings that name nothing: the script
    does its work, or ends in one clear line.
    """
    statuses = {}
    for n, (name, flag, value) in enumerate(flag_cases()):
        out = tmp_path / str(n) / "out"
        quickly = dict(max_steps=2, eval_rows=1) if name == "train.py" else dict(limit=2)
        settings = quickly | {flag: value}
        if name == "train.py" and flag in ("epochs", "max_steps") and value != "" and value > 100:
            continue  # allowed, and long
        if (
            flag == "standardize"
            or name == "train.py"
            and flag not in ("eval_data", "eval_rows", "eval_every")
        ):
            settings = dict(eval_data="") | settings
        begin = time.time()
        if flag == "out":
            out = settings.pop("out") and tmp_path / str(n) / value
        if flag == "export" and value:
            settings["export"] = tmp_path / str(n) / value
        done = script(*SCRIPTS[name][1](world, out, **settings))
        assert time.time() - begin < 60, (name, flag, value)
        if done.status != 0:
            line = one_line(done, "error: ")
            assert len(line) < 6000, line
        statuses.setdefault(done.status, []).append(f"{name} --{flag} {str(value)[:20]}")
    print(
        f"\n{sum(map(len, statuses.values()))} runs; ended well: {len(statuses[0])}; "
        f"refused: {[s for k, v in statuses.items() if k for s in v]}"
    )


@pytest.mark.parametrize("out", ["", ".", "below/.."])
def test_training_into_the_current_folder_is_refused(world, tmp_path, monkeypatch, out):
    monkeypatch.chdir(tmp_path)
    one_line(
        script(*training(world, out)),
        rf"^error: --out '{out}' is the current folder: name one for this run$",
    )
    assert not list(tmp_path.iterdir())


def test_gpus_asked_for_but_absent(world, tmp_path, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    for name, (_, command) in SCRIPTS.items():
        one_line(
            script(*command(world, tmp_path / name)),
            "CUDA_VISIBLE_DEVICES=0,1 asks for a GPU, and torch finds none",
        )


def test_no_rows_and_one_row(world, tmp_path):
    empty, one = tmp_path / "empty.jsonl", write_jsonl(tmp_path / "one.jsonl", world.rows[:1])
    empty.write_text("\n\n")
    write_jsonl(tmp_path / "one.metadata.jsonl", world.clips[:1])
    one_line(script(*training(world, tmp_path / "a", data=empty)), "empty.jsonl holds no rows")
    one_line(script(*training(world, tmp_path / "a", eval_data=empty)), "empty.jsonl holds no rows")
    one_line(
        script(*generating(world, tmp_path / "a", metadata=empty)), "empty.jsonl holds no rows"
    )
    one_line(script(*evaluating(world, tmp_path / "a", data=empty)), "no rows|is missing")
    done = script(
        *training(
            world,
            tmp_path / "b",
            data=one,
            eval_data=one,
            global_batch=1,
            micro_batch=1,
            max_steps=1,
        )
    )
    assert done.status == 0, done.err
    done = script(*generating(world, tmp_path / "c", limit=1))
    assert done.status == 0, done.err
    done = script(*evaluating(world, tmp_path / "d", data=one))
    assert done.status == 0 and json.loads(done.out.splitlines()[-1])["n"] == 1, done.err
    one_line(
        script(*generating(world, tmp_path / "e", audio_root=tmp_path)),
        "no clip gave a row.* is --audio_root right",
    )
    assert not (tmp_path / "e").exists()


@pytest.mark.slow
def test_more_ranks_than_rows(world, tmp_path):
    from conftest import torchrun

    torchrun(2, *generating(world, tmp_path / "rows.jsonl", limit=1, per_clip=1))
    assert len(read_jsonl(tmp_path / "rows.jsonl")) == 1
    write_jsonl(tmp_path / "test.jsonl", world.rows[:1])
    write_jsonl(tmp_path / "test.metadata.jsonl", world.clips[:1])
    torchrun(2, *evaluating(world, tmp_path / "p.jsonl", data=tmp_path / "test.jsonl"))
    assert len(read_jsonl(tmp_path / "p.jsonl")) == 1
    process = start(
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        *training(world, tmp_path / "t", data=tmp_path / "test.jsonl"),
    )
    said, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "has 1 rows, fewer than one global batch of 4" in said


# -- model folders ---------------------------------------------------------------------------------


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_nothing_in_a_model_folder_is_executed(world, tmp_path):
    """A pickle and python files that make a folder when they are run, where hubs put such things:
    they are not even opened.
    """
    llm, exploded = shutil.copytree(world.llm, tmp_path / "llm"), tmp_path / "exploded"
    for name in ("pytorch_model.bin", "model.pt", "training_args.bin"):
        (llm / name).write_bytes(pickle.dumps(Bomb(exploded)))
    pickle.loads((llm / "model.pt").read_bytes())
    assert exploded.exists(), "this bomb would not go off"
    exploded.rmdir()
    for name in ("modeling_x.py", "tokenization_x.py", "__init__.py", "setup.py"):
        (llm / name).write_text(f"import os; os.mkdir({str(exploded)!r})")
    for name in ("config.json", "tokenizer_config.json"):
        content = json.loads((llm / name).read_text())
        classes = {
            "AutoModelForCausalLM": "modeling_x.X",
            "AutoTokenizer": ["tokenization_x.X", None],
        }
        (llm / name).write_text(
            json.dumps(content | {"auto_map": classes, "trust_remote_code": True})
        )
    shutil.copytree(llm, whisper := tmp_path / "whisper", ignore=lambda *_: ["model.safetensors"])
    shutil.copytree(world.whisper, whisper, dirs_exist_ok=True)
    DeSTA.from_pretrained(llm, whisper, device="cpu")
    os.rename(llm / "model.safetensors", llm / "other.safetensors")
    with pytest.raises(FileNotFoundError, match="model.safetensors is missing"):
        Llama.from_pretrained(llm)
    (whisper / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model.safetensors"):
        Whisper.from_pretrained(whisper)
    assert not exploded.exists()


def test_sources_read_no_pickles_and_run_no_text():
    """The words for it do not occur: torch.load, pickle, eval(), exec(), trust_remote_code, yaml."""
    forbidden = re.compile(
        r"torch\.load|pickle|(?<![\w.])eval\(|(?<![\w.])exec\(|trust_remote_code|yaml|os\.system|shell=True"
    )
    files = [
        *ROOT.glob("*.py"),
        *(
            file
            for folder in ("engine", "benchmarks", "demo", "tools")
            for file in ROOT.glob(f"{folder}/**/*.py")
        ),
    ]
    assert len(files) > 15
    for file in files:
        assert not (found := forbidden.findall(file.read_text(encoding="utf-8"))), (
            f"{file}: {found}"
        )


@pytest.mark.parametrize("template", [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__base__ }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__self__.__class__.__init__.__globals__ }}",
    "{% for x in range(10**9) %}x{% endfor %}",
    "{{ messages.append(1) }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{{ cycler.__init__.__globals__.os.system('true') }}",
    "{% broken",
])  # fmt: skip
def test_chat_templates_cannot_leave_the_sandbox(world, tmp_path, template):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(world.llm / name, tmp_path)
    (tmp_path / "chat_template.jinja").write_text(template)
    try:
        said = Tokenizer(tmp_path).apply_chat_template([{"role": "user", "content": "hi"}])
        assert said == "", f"what the sandbox hides is nothing, not {said!r}"
    except ValueError as error:
        assert "chat template" in str(error)


def test_lost_output_is_named(tmp_path):
    """checkpoint.write_atomically names the file and keeps the old one, whatever part of the path
    is in the way.
    """
    (tmp_path / "file").write_text("old")
    for path in (tmp_path / "file/below", tmp_path / ("x" * 300)):
        with pytest.raises(OSError, match=re.escape(str(path)[:60]) + ".* cannot be written"):
            checkpoint.write_text(path, "new")
    checkpoint.write_text(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
