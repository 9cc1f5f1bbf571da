"""Official scale: millions of rows in many files, audio longer than a window, LoRA, a sharded LLM,
large checkpoints: the same results, in bounds of memory.
"""

import dataclasses
import importlib.util
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import transformers
from conftest import (
    ROOT,
    flags,
    in_float32,
    randomize,
    read_jsonl,
    script,
    start,
    torchrun,
    write_jsonl,
)
from safetensors.torch import load_file, save_file
from test_model import ReferenceDeSTA, gradient
from test_qformer import ReferenceQFormer

import generate_data
import llama
import train
from engine import rows as engine_rows
from engine import run
from engine.rows import JsonLines, audio_file
from llama import Llama, LlamaConfig
from model import AUDIO_ID, DeSTA, audio_windows, transcribe_windows
from qformer import QFormerConfig
from whisper import Whisper, WhisperConfig

# -- millions of rows ------------------------------------------------------------------------------


def random_lines(seed, n=200):
    """Bytes of a JSONL file with empty lines here and there, no newline at the end, and the rows
    that it holds.
    """
    draw = np.random.default_rng(seed)
    rows = [{"i": i, "text": "é\n" * int(draw.integers(0, 40))} for i in range(n)]
    lines = [
        "\n" * int(draw.integers(0, 3) * (i % 5 == 0)) + json.dumps(row, ensure_ascii=bool(i % 2))
        for i, row in enumerate(rows)
    ]
    return "\n".join(lines).encode(), rows


@pytest.mark.parametrize("block", [1, 7, 1 << 24])
def test_rows_of_a_file_however_it_is_read(tmp_path, monkeypatch, block):
    content, rows = random_lines(0, 50)
    for end in (b"", b"\n", b"\n\n\n"):
        file = tmp_path / f"{len(end)}.jsonl"
        file.write_bytes(content + end)
        real = open
        small = lambda *args, **kwargs: (
            SmallReads(real(*args, **kwargs), block)
            if args[1:] == ("rb",)
            else real(*args, **kwargs)
        )
        monkeypatch.setattr(engine_rows, "open", small, raising=False)
        found = JsonLines(file)
        monkeypatch.delattr(engine_rows, "open")
        assert [found[i] for i in range(len(found))] == list(found) == rows


class SmallReads:
    """A file that hands out at most so many bytes at once."""

    def __init__(self, file, n):
        self.file, self.n = file, n

    def read(self, n):
        return self.file.read(min(n, self.n))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()


def test_several_files_are_numbered_through(tmp_path):
    expected = []
    for name, n in (("a.0", 7), ("a.1", 0), ("b", 3), ("c", 1)):
        content, rows = random_lines(n, n)
        (tmp_path / f"{name}.jsonl").write_bytes(content)
        expected += rows
    for path in (
        tmp_path,
        ", ".join(str(tmp_path / f"{name}.jsonl") for name in ("a.0", "a.1", "b", "c")),
    ):
        rows = JsonLines(path)
        assert len(rows) == 11
        assert list(rows) == expected
        numbers = np.array([10, 0, 6, 7, 9, 7])
        sizes = [
            len(json.dumps(expected[i], ensure_ascii=bool(rows.locate(i)[1] % 2)).encode())
            for i in numbers
        ]
        assert all(0 <= found - size <= 3 for found, size in zip(rows.lengths(numbers), sizes)), (
            "bytes of a row, newlines after it included"
        )
        assert rows.name(7) == f"{tmp_path}/b.jsonl, row 1"
        assert rows.name(6) == f"{tmp_path}/a.0.jsonl, row 7"
        for outside in (-1, 11):
            with pytest.raises(IndexError):
                rows[outside]
    (tmp_path / "b.jsonl").write_text('{"i": 1}\n[2]\n')
    with pytest.raises(ValueError, match="b.jsonl, row 2 is not a JSON object"):
        JsonLines(tmp_path)[8]
    (tmp_path / "with, comma.jsonl").write_text("{}")
    assert list(JsonLines(tmp_path / "with, comma.jsonl")) == [{}]
    (tmp_path / "empty").mkdir()
    for path in ("nowhere.jsonl", f"{tmp_path}/b.jsonl,nowhere.jsonl", tmp_path / "empty"):
        with pytest.raises(FileNotFoundError, match=r"(nowhere|empty/\*).jsonl is missing"):
            JsonLines(path)


def test_index_is_kept_checked_and_made_anew(tmp_path, monkeypatch):
    file, index = tmp_path / "rows.jsonl", tmp_path / "rows.jsonl.index"
    write_jsonl(file, [{"i": i} for i in range(300)])
    reads = []
    flatnonzero = np.flatnonzero
    monkeypatch.setattr(np, "flatnonzero", lambda x: reads.append(1) or flatnonzero(x))

    def whole():
        """-> was the file gone through?"""
        reads.clear()
        rows = JsonLines(file)
        assert [row["i"] for row in rows] == list(range(len(rows)))
        assert sorted(path.name for path in tmp_path.iterdir()) == [
            "rows.jsonl",
            "rows.jsonl.index",
        ]
        return bool(reads)

    assert whole() and not whole(), "made once, then read"
    good = index.read_bytes()
    assert isinstance(JsonLines(file).starts[0], np.memmap)
    for damaged in (
        b"",
        b"x",
        good[:-1],
        good[:-8],
        good[8:],
        good + good[-8:],
        good[:80] + bytes([good[80] ^ 4]) + good[81:],
        bytes(len(good)),
    ):
        index.write_bytes(damaged)
        assert whole() and index.read_bytes() == good, f"damaged index of {len(damaged)} bytes"
    stat = file.stat()
    write_jsonl(file, [{"i": i} for i in range(299)])  # another size
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert whole()
    assert not whole()
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert whole()
    assert not whole()


def test_index_that_cannot_be_kept(tmp_path, monkeypatch):
    """A data folder that must not be written, or a full disk: the rows are there all the same, and
    nothing is left behind.
    """
    file = write_jsonl(tmp_path / "rows.jsonl", [{"i": i} for i in range(30)])
    index = tmp_path / "rows.jsonl.index"
    index.mkdir()  # root may write everywhere, but nobody can replace a folder by a file
    assert [row["i"] for row in JsonLines(file)] == list(range(30))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl", "rows.jsonl.index"]


# -- audio files: another extension, more than a window --------------------------------------------


def test_audio_path_with_another_extension(tmp_path):
    wave = np.zeros(1600) + 0.1
    for name in ("a.wav", "b.c.flac", "d.wav", "d.ogg", "e.wav"):
        soundfile.write(tmp_path / name, wave, 16000)
    (tmp_path / "e.flac").touch()
    found = lambda path: audio_file(path, tmp_path).name
    assert [found(path) for path in ("a.flac", "a.wav", "a.mp3", "b.c.wav", "b.c")] == [
        "a.wav",
        "a.wav",
        "a.wav",
        "b.c.flac",
        "b.c",
    ]
    assert found("e.flac") == "e.flac", "what is there is taken, whatever lies beside it"
    for path in ("d.flac", "f.flac"):  # two candidates, none: the message names what was asked for
        with pytest.raises(FileNotFoundError, match=f"{path}: no such readable file"):
            audio_windows(path, tmp_path, 3)


@pytest.fixture(scope="module")
def long_clips(tiny_world, tmp_path_factory):
    """Folder with long.wav (7.5 s), longer.wav (10 s), short.wav (2 s), and their windows of 3 s as
    files of their own: long.0.wav, …
    """
    folder, random = tmp_path_factory.mktemp("long"), np.random.default_rng(0)
    for name, seconds in (("long", 7.5), ("longer", 10), ("short", 2)):
        wave = (
            0.2
            * random.standard_normal(int(seconds * 16000))
            * np.linspace(0.1, 1, int(seconds * 16000))
        )
        soundfile.write(folder / f"{name}.wav", wave, 16000, subtype="FLOAT")
        for i, begin in enumerate(range(0, len(wave), 48000)):
            soundfile.write(
                folder / f"{name}.{i}.wav", wave[begin : begin + 48000], 16000, subtype="FLOAT"
            )
    return folder


def load(world, long_audio, adapter=None):
    torch.manual_seed(0)
    settings = ({"long_audio": long_audio} if long_audio else {}) | (
        {} if adapter else world.adapter
    )
    return DeSTA.from_pretrained(
        world.llm, world.whisper, adapter, dtype=torch.float32, device="cpu", **settings
    )


@pytest.fixture(scope="module")
def splitting(tiny_world):
    model = load(tiny_world, "split")
    randomize(model.adapter)
    return model


def heard(name, text):
    return {"audio": f"{name}.wav", "text": text}


SEVERAL = [  # several audios in a turn, several turns with audio, long and short ones
    {"role": "system", "content": "You hear clips."},
    {
        "role": "user",
        "content": "First <|AUDIO|> then <|AUDIO|>.",
        "audios": [heard("long", "one two"), heard("short", " ")],
    },
    {"role": "assistant", "content": "Noise."},
    {"role": "user", "content": "And <|AUDIO|>, the same?", "audios": [heard("longer", "three")]},
]


@torch.no_grad()
def test_split_puts_all_windows_into_the_slot_in_order(splitting, long_clips):
    model, n = splitting, splitting.adapter.config.n_queries
    row = model.reader.prepare({"messages": SEVERAL, "response": "No."}, long_clips)
    assert [len(row["mels"]), row["ids"].count(AUDIO_ID)] == [3 + 1 + 4, (3 + 1 + 4) * n]
    # Put together by hand: the same prompt with each window as a clip of its own, its vectors where
    # the slot is.
    windows = (
        [f"long.{i}.wav" for i in range(3)]
        + ["short.0.wav"]
        + [f"longer.{i}.wav" for i in range(4)]
    )
    vectors = torch.cat(
        [model.audio_vectors(model.reader.mels(name, long_clips)) for name in windows]
    )  # (8, n, d)
    ids, transcript = (
        torch.tensor(row["ids"]),
        lambda text: model.tokenizer.encode(text, special=False),
    )
    runs = [
        list(group) for group in torch.arange(len(ids))[ids == AUDIO_ID].split([3 * n, n, 4 * n])
    ]
    for places, text in zip(runs, ("one two", " ", "three")):
        end = int(places[-1]) + 1
        assert int(places[-1] - places[0]) == len(places) - 1 and row["ids"][
            end : end + len(transcript(text))
        ] == transcript(text), "vectors, then the transcript"
    x = model.embed(ids[None], row["mels"])[0]
    torch.testing.assert_close(x[ids == AUDIO_ID], vectors.flatten(0, 1), atol=1e-5, rtol=1e-5)
    assert torch.equal(x[ids != AUDIO_ID], model.llm.embed(ids[ids != AUDIO_ID]))
    # and answers are generated from that very sequence
    answer = model.tokenizer.decode(
        llama.generate(model.llm, [x], 12, stop_ids=model.tokenizer.stop_ids)[0]
    ).strip()
    assert answer
    assert model.generate(SEVERAL, 12, root=long_clips) == [answer]
    others = [
        SEVERAL[:3] + [SEVERAL[3] | {"audios": [heard(f"longer.{i}", "three")]}] for i in range(4)
    ]
    assert model.generate([SEVERAL, *others], 12, root=long_clips) == [
        answer,
        *(model.generate(other, 12, root=long_clips)[0] for other in others),
    ]


def test_long_transcripts_may_be_as_long_as_the_windows_are_many(splitting, long_clips):
    audio = heard("long", "la " * 1000)
    ids, _ = splitting.reader.read(
        [{"role": "user", "content": "<|AUDIO|>", "audios": [audio]}], long_clips
    )
    la = splitting.tokenizer.encode(" la", special=False)
    assert 295 < sum(token in la for token in ids) < 305, "100 tokens a window"


def test_transcripts_of_long_clips(splitting, long_clips):
    # 8 tokens a second: in training and when asked
    alone = {name: splitting.whisper.transcribe([audio_windows(f"{name}.wav", long_clips, 3)[0]],
        8 * 3, seconds=3)[0] for name in
             ("long.0", "long.1", "long.2", "short.0")}  # fmt: skip
    clips = [audio_windows(f"{name}.wav", long_clips, 3, "split") for name in ("long", "short")]
    expected = " ".join(alone[f"long.{i}"] for i in range(3) if alone[f"long.{i}"].strip()) or " "
    assert len(expected) > len(alone["long.0"])
    assert transcribe_windows(splitting.whisper, clips, 3) == [expected, alone["short.0"]]
    message = {"role": "user", "content": "<|AUDIO|>", "audios": [heard("long", None)]}
    assert (
        splitting.with_transcripts([[message]], long_clips)[0][0]["audios"][0]["text"] == expected
    )


class Mute:
    """A Whisper that hears something in every second window."""

    def transcribe(self, windows, max_new_tokens, seconds):
        return [f"w{i}" if i % 2 else " " for i in range(len(windows))]


def test_silent_windows_leave_no_gap_in_the_transcript():
    assert transcribe_windows(Mute(), [[0], [0, 0, 0], [0], [0]], 3) == [" ", "w1 w3", " ", "w5"]


def test_cutting_names_the_file_and_what_is_lost_once(tiny_world, long_clips, capsys):
    run.warn.cache_clear()
    model = load(tiny_world, "")
    almost = long_clips / "almost.wav"  # 3.05 s: no window for a rest that short, and no warning
    soundfile.write(almost, np.full(int(3.05 * 16000), 0.1), 16000)
    assert len(audio_windows(almost, None, 3, "split")) == len(audio_windows(almost, None, 3)) == 1
    for _ in range(2):
        for name in ("long", "longer", "short"):
            assert torch.equal(
                model.reader.mels(f"{name}.wav", long_clips),
                model.reader.mels(f"{name}.0.wav", long_clips),
            )
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        f"warning: {long_clips}/{name}.wav is longer: "
        "only the first 3 s are heard (--long_audio split hears all)"
        for name in ("long", "longer")
    ]


def test_long_audio_from_the_data_to_the_answer(tiny_world, long_clips, tmp_path):
    """generate_data.py transcribes, train.py trains on, and eval.py and model.py without being told
    hear all windows.
    """
    segment = {"start": 0, "end": 7.5, "text": "x", "attributes": {"Kind": "kind 1"}}
    write_jsonl(
        tmp_path / "metadata.jsonl",
        [{"id": "long.flac", "domain": "speech", "segments": [segment]}] * 4,
    )
    models = flags(llm=tiny_world.llm, whisper=tiny_world.whisper, audio_root=long_clips)
    data = flags(
        metadata=tmp_path / "metadata.jsonl",
        out=tmp_path / "train.jsonl",
        instructions=tiny_world.instructions,
        audio_seconds=3,
    )
    with in_float32():
        done = script(
            "generate_data.py", *models, *data, "--long_audio", "split", "--keep_truncated", 1
        )
    assert done.status == 0, done.err
    text = read_jsonl(tmp_path / "train.jsonl")[0]["messages"][-1]["audios"][0]["text"]
    windows = audio_windows("long.wav", long_clips, 3, "split")
    whisper = load(tiny_world, "split").whisper
    assert (
        text
        == transcribe_windows(whisper, [windows], 3)[0]
        != transcribe_windows(whisper, [windows[:1]], 3)[0]
    )
    options = flags(
        data=tmp_path / "train.jsonl",
        eval_data="",
        out=tmp_path / "out",
        max_steps=2,
        global_batch=2,
        micro_batch=1,
        standardize=2,
    )
    done = script(
        "train.py", *models, *options, *flags(**tiny_world.adapter), "--long_audio", "split"
    )
    assert done.status == 0 and "left out" not in done.err and "are heard" not in done.err, done.err
    model = load(tiny_world, "", tmp_path / "out/adapter")
    assert model.config.long_audio == "split"
    assert len(model.reader.mels("long.wav", long_clips)) == 3
    assert load(tiny_world, "cut", tmp_path / "out/adapter").config.long_audio == "cut"
    audio, ask = (
        long_clips / "long.wav",
        flags(
            llm=tiny_world.llm,
            whisper=tiny_world.whisper,
            adapter=tmp_path / "out/adapter",
            max_new_tokens=6,
        ),
    )
    told = script("model.py", audio, "--prompt", "Who?", *ask)
    model = DeSTA.from_pretrained(
        tiny_world.llm, tiny_world.whisper, tmp_path / "out/adapter"
    )  # in the dtype that the command chose
    messages = [
        *model.config.context,
        {
            "role": "user",
            "content": "<|AUDIO|>\n\nWho?",
            "audios": [{"audio": audio, "text": None}],
        },
    ]
    assert (told.status, told.out, told.err) == (0, model.generate(messages, 6)[0] + "\n", "")
    run.warn.cache_clear()
    told = script("model.py", audio, "--prompt", "Who?", *ask, "--long_audio", "cut")
    assert "only the first 3 s are heard" in told.err
    for command in (
        ["train.py", *options, *models],
        ["generate_data.py", *models, *data[:2], "--out", tmp_path / "x"],
    ):
        failed = script(*command, "--long_audio", "some")
        assert failed.status == 2
        assert "argument --long_audio: 'some' is none of cut, split" in failed.err


def test_many_long_clips_are_three_lines_and_a_total(tiny_world, long_clips, tmp_path):
    """Counted over the data-loading processes of train.py, and in generate_data.py."""
    names = [f"again{i}.wav" for i in range(8)]
    for name in names:
        shutil.copy(long_clips / "long.wav", long_clips / name)
    segment = {"start": 0, "end": 7.5, "text": "x", "attributes": {"Kind": "kind 1"}}
    write_jsonl(
        tmp_path / "metadata.jsonl",
        [{"id": name, "domain": "speech", "segments": [segment]} for name in names],
    )
    models = flags(llm=tiny_world.llm, whisper=tiny_world.whisper, audio_root=long_clips)
    data = flags(
        metadata=tmp_path / "metadata.jsonl",
        out=tmp_path / "train.jsonl",
        instructions=tiny_world.instructions,
        audio_seconds=3,
    )
    generated = script("generate_data.py", *models, *data, *flags(keep_truncated=1, block=3))
    options = flags(
        data=tmp_path / "train.jsonl",
        eval_data="",
        out=tmp_path / "out",
        max_steps=2,
        global_batch=4,
        micro_batch=1,
        standardize=2,
        workers=2,
        max_answer_tokens=99,
    )
    trained = script("train.py", *models, *options, *flags(**tiny_world.adapter))
    for done in (generated, trained):
        assert done.status == 0, done.err
        lines = [
            line for line in re.split("[\r\n]+", done.err) if "heard" in line or "warnings" in line
        ]
        assert [
            bool(
                re.search(r"warning: .*/again\d.wav is longer: only the first 3 s are heard", line)
            )
            for line in lines
        ] == [True, True, True, False]
        assert len(set(lines)) == 4
        assert lines[3] == "8 warnings about audio files"


# -- LoRA ------------------------------------------------------------------------------------------


def with_lora(world, rank, adapter=None, dropout=0.0, **options):
    torch.manual_seed(0)
    settings = {} if adapter else world.adapter | dict(lora_rank=rank, dropout=dropout)
    return DeSTA.from_pretrained(
        world.llm, world.whisper, adapter, dtype=torch.float32, device="cpu", **settings | options
    )


def test_lora_begins_without_effect_and_then_equals_merged_weights(tiny_world):
    """B = 0: the LLM answers as before. B random: as transformers' model does with W + B A in place
    of W.
    """
    torch.manual_seed(0)
    plain, ours = with_lora(tiny_world, 0), with_lora(tiny_world, 3)
    ids = torch.randint(0, 49152, (2, 20))
    assert torch.equal(ours.llm(ids), plain.llm(ids))
    lora = {name: p for name, p in ours.trained().items() if "lora" in name}
    assert {name: tuple(p.shape) for name, p in lora.items() if ".0.self" in name} == {
        f"llm_model.model.layers.0.self_attn.{part}_proj.lora_{matrix}.default.weight": shape
        for part, width in (("q", 64), ("k", 32), ("v", 32))
        for matrix, shape in (("A", (3, 64)), ("B", (width, 3)))
    }
    assert len(lora) == 2 * 3 * 2
    assert not any(p.any() for name, p in lora.items() if "lora_B" in name)
    assert all(p.any() for name, p in lora.items() if "lora_A" in name)
    for p in lora.values():
        torch.nn.init.normal_(p, std=0.3)
    reference = transformers.LlamaForCausalLM.from_pretrained(tiny_world.llm, dtype=torch.float32)
    for name, a in lora.items():
        if "lora_A" in name:  # peft: W + alpha / rank * B A, with alpha = rank
            target = reference.get_parameter(
                name.removeprefix("llm_model.").replace("lora_A.default.", "")
            )
            target.data += lora[name.replace("lora_A", "lora_B")].data @ a.data
    expected = reference(ids).logits
    assert (expected - plain.llm(ids)).abs().max() > 0.1
    torch.testing.assert_close(ours.llm(ids), expected, atol=2e-5, rtol=1e-4)
    answers = llama.generate(ours.llm, ids.tolist(), 8)
    for prompt, answer in zip(ids.tolist(), answers):
        assert (
            reference.generate(
                torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=None
            )[0, 20:].tolist()
            == answer
        )


def test_lora_gradients_saving_and_loading(tiny_world, tmp_path):
    model = with_lora(tiny_world, 2)
    for name, p in model.trained().items():
        if "lora" in name:
            torch.nn.init.normal_(p, std=0.3)
    rows = [model.reader.prepare(row, tiny_world.data) for row in tiny_world.rows[:3]]
    loss = model.loss(rows)
    loss.backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    # softmax does not see it: engine/fast.py leaves it out
    unseen = "adapter.qformer.layer.0.crossattention.self.key.bias"
    assert with_gradient | {unseen} == {
        f"adapter.{name}" for name in dict(model.adapter.named_parameters())
    } | {name.replace("llm_model.", "llm.") for name in model.trained() if "lora" in name}
    assert all(p.grad.any() for name, p in model.trained().items() if "lora" in name)
    # the derivative along a random direction of B, by differences: the beginning that rows share
    # counts too
    name = "llm_model.model.layers.0.self_attn.v_proj.lora_B.default.weight"
    p, step = model.trained()[name], 1e-2
    direction = torch.randn_like(p)
    slope = (p.grad * direction).sum().item()
    values = []
    for sign in (1, -2):
        p.data += sign * step * direction
        values.append(model.loss(rows).item())
    p.data += step * direction
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(slope, rel=0.02, abs=1e-4)

    model.save_adapter(tmp_path / "a")
    file, config = (
        load_file(tmp_path / "a/model.safetensors"),
        json.loads((tmp_path / "a/config.json").read_text()),
    )
    assert set(file) == {
        name if "lora" in name else f"perception.connector.{name}" for name in model.trained()
    }
    assert (config["use_lora"], config["lora_rank"]) == (True, 2)
    again = with_lora(tiny_world, 0, tmp_path / "a")
    assert torch.equal(again.loss(rows), model.loss(rows))
    assert all(torch.equal(p, again.trained()[name]) for name, p in model.trained().items())
    again.save_adapter(tmp_path / "b")
    assert (tmp_path / "a/model.safetensors").read_bytes() == (
        tmp_path / "b/model.safetensors"
    ).read_bytes()
    # an adapter of the official code says use_lora only; its rank is 16
    del config["lora_rank"], config["sha256"]  # edited: no longer the text it was
    (tmp_path / "a/config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"lora_A.default.weight \[2, 64\], expected \[16, 64\]"):
        with_lora(tiny_world, 0, tmp_path / "a")


def test_lora_dropout_in_training_only(tiny_world):
    model = with_lora(tiny_world, 2, dropout=0.5)
    for p in model.trained().values():
        torch.nn.init.normal_(p, std=0.3)
    ids = torch.randint(0, 49152, (1, 9))
    assert torch.equal(model.llm(ids), model.llm(ids))
    model.train()
    assert not torch.equal(model.llm(ids), model.llm(ids))


# -- many processes, small cards -------------------------------------------------------------------


def test_rows_are_prepared_in_any_process(tiny_world, tmp_path):
    """To a data-loading process go the tokenizer's folder and numbers, not the model; under
    forkserver, the default of Python 3.14, too.
    """
    reader, settings = load(tiny_world, "").reader, train.Settings(audio_root=str(tiny_world.data))
    many = train.Rows(
        write_jsonl(tmp_path / "many.jsonl", [{"i": i} for i in range(5000)]), reader, settings
    )
    assert len(pickle.dumps(many)) < 5000
    rows = train.Rows(tiny_world.data / "train.jsonl", reader, settings)
    sent = pickle.dumps(rows)
    loader = torch.utils.data.DataLoader(
        rows,
        batch_size=4,
        collate_fn=list,
        num_workers=2,
        multiprocessing_context="forkserver",
        worker_init_fn=run.ignore_signals,
    )
    again, loaded = pickle.loads(sent), [row for batch in loader for row in batch]
    for i, row in enumerate(loaded):
        for other in (rows[i], again[i]):
            assert other.keys() == row.keys()
            assert all(map(torch.equal, other["mels"], row["mels"]))
            assert all(other[key] == row[key] for key in other if key != "mels")
    assert len(loaded) == 24
    assert all("ids" in row for row in loaded)


def train_command(world, out, **changes):
    settings = dict(
        data=world.data / "train.jsonl", eval_data=world.data / "test.jsonl", out=out, max_steps=3,
        global_batch=8, micro_batch=2, warmup=2,
        standardize=4, eval_every=2, eval_rows=3, save_every=1, keep=9, **world.adapter,
    )  # fmt: skip
    return ["train.py", *world.models, *flags(**settings | changes)]


def assert_same_run(a, b):
    """The same log and the same adapter after every step, to rounding; and something was learned."""
    for one, two in zip(read_jsonl(a / "log.jsonl"), read_jsonl(b / "log.jsonl"), strict=True):
        for key in {
            "step",
            "loss",
            "lr",
            "grad_norm",
            "eval_loss",
            "eval_loss_wrong_clip",
        } & one.keys():
            assert two[key] == pytest.approx(one[key], rel=1e-4), f"{key} at step {one['step']}"
    first = load_file(a / "checkpoints/step_00000001/adapter/model.safetensors")
    for step in (1, 2, 3):
        one, two = (
            load_file(out / f"checkpoints/step_{step:08d}/adapter/model.safetensors")
            for out in (a, b)
        )
        for name in one:
            torch.testing.assert_close(
                two[name],
                one[name],
                atol=1e-5,
                rtol=1e-5,
                msg=lambda m, name=name: f"step {step}, {name}: {m}",
            )
    assert max((one[name] - first[name]).abs().max() for name in one) > 1e-3, (
        "nothing was learned: this test shows nothing"
    )


@pytest.fixture(scope="module")
def uneven_world(tiny_world, tmp_path_factory):
    """Rows of which some cannot be used and some have no audio: micro-batches of one rank are empty
    or without gradient to the Q-Former.
    """
    rows, bad = tiny_world.rows, tiny_world.rows[0] | {"response": None}
    text = tiny_world.rows[0] | {"messages": [{"role": "user", "content": "Say hello."}]}
    lines = [bad] * 9 + [text] * 5 + rows[:10]
    return write_jsonl(tmp_path_factory.mktemp("uneven") / "rows.jsonl", lines)


@pytest.mark.parametrize("lora_rank", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_sharded_llm_and_checkpointed_activations_change_nothing(
    tiny_world, uneven_world, tmp_path, float32, lora_rank
):
    """Two processes with both against one without: with uneven batches, one held-out row for two
    ranks, dropout, LoRA.
    """
    options = dict(data=uneven_world, dropout=0.1, eval_rows=1, micro_batch=1, lora_rank=lora_rank)
    assert script(*train_command(tiny_world, tmp_path / "one", **options)).status == 0
    said = torchrun(
        2,
        *train_command(
            tiny_world, tmp_path / "two", shard_llm=1, checkpoint_activations=1, **options
        ),
    )
    assert 3 <= said.count("row left out") <= 6
    assert "9 rows left out" in said
    assert_same_run(tmp_path / "one", tmp_path / "two")


def test_checkpointed_activations_alone(tiny_world):
    """One process, with a beginning that the rows share: the same loss and gradients bit for bit,
    and each block's input is all that is kept.
    """
    model = with_lora(tiny_world, 0)
    rows, found = [model.reader.prepare(row, tiny_world.data) for row in tiny_world.rows[:4]], []
    for model.llm.checkpoint_activations in (False, True):
        model.zero_grad()
        loss = model.loss(rows)
        loss.backward()
        found.append([loss, *map(gradient, model.adapter.parameters())])
    assert all(map(torch.equal, *found))
    weights, x, kept = (
        {p.data_ptr() for p in model.parameters()},
        torch.randn(3, 50, 64, requires_grad=True),
        [],
    )
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model.llm.hidden_states(x)
    sizes = {
        t.data_ptr(): t.untyped_storage().nbytes() for t in kept if t.data_ptr() not in weights
    }
    tables, norm, blocks = (
        2 * 50 * 16 * 4,
        3 * 50 * 4,
        2 * x.nbytes,
    )  # cos and sin; 1 / rms of each position
    assert sum(sizes.values()) <= blocks + tables + norm + x.nbytes, (
        "two blocks' inputs, and what the final norm needs"
    )


def test_sharding_needs_processes(tiny_world, tmp_path):
    failed = script(*train_command(tiny_world, tmp_path, shard_llm=1))
    assert failed.status == 1
    assert "torchrun --nproc_per_node=N" in failed.err


def test_killed_rank_ends_the_job(tiny_world, tmp_path):
    """One of two ranks is killed in the middle of training, with the LLM shared out: the other does
    not wait for it, and it is named.
    """
    command = train_command(tiny_world, tmp_path, max_steps=500, eval_data="", shard_llm=1)
    process = start(
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "tests/in_float32.py",
        *command,
    )
    log = tmp_path / "log.jsonl"
    while not log.exists() or len(log.read_text().splitlines()) < 2:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.1)
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            if parent == process.pid and b"\0RANK=1\0" in (folder / "environ").read_bytes():
                victim = int(folder.name)
        except OSError:  # a process that has ended meanwhile
            continue
    os.kill(victim, signal.SIGKILL)
    killed = time.monotonic()
    said, _ = process.communicate(timeout=300)
    assert process.returncode != 0
    assert time.monotonic() - killed < 120  # a second or two where no other job disturbs
    # torchrun lists both; which one it calls the root cause depends on whether rank 0 gave up
    # before its next look.
    assert "rank      : 1 (" in said
    assert f"Signal 9 (SIGKILL) received by PID {victim}" in said


@pytest.mark.slow
def test_ranks_that_do_not_see_the_same_checkpoints(tiny_world, tmp_path):
    """Two nodes, the output folder on each one's own disk: resuming would train two different
    models.
    """
    assert script(*train_command(tiny_world, tmp_path / "0", eval_data="")).status == 0
    ranks = []
    for rank in range(2):
        command = [
            sys.executable,
            "tests/in_float32.py",
            *train_command(tiny_world, tmp_path / str(rank), eval_data="", max_steps=5),
        ]
        place = os.environ | dict(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE="2",
            MASTER_ADDR="localhost",
            MASTER_PORT="29517",
        )
        ranks.append(
            subprocess.Popen(
                list(map(str, command)), cwd=ROOT, env=place, stderr=subprocess.PIPE, text=True
            )
        )
    for rank, process in enumerate(ranks):
        said = process.communicate(timeout=300)[1]
        assert process.returncode != 0
        assert f"the ranks do not find the same checkpoints in {tmp_path}/{rank}" in said


# -- the official configuration --------------------------------------------------------------------


@pytest.fixture(scope="module")
def memory():
    """tools/memory.py as a module."""
    spec = importlib.util.spec_from_file_location("memory", ROOT / "tools/memory.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_parameter_table_and_memory_at_full_size(memory, capsys):
    model = memory.build()
    memory.print_parameters(model)
    counts = {
        row.split(" | ")[0]: int(row.split(" | ")[2].rstrip(" |").replace(",", ""))
        for row in capsys.readouterr().out.splitlines()[2:]
    }
    assert (
        sum(n for part, n in counts.items() if "Llama" in part) == 8_030_261_248
    )  # as Hugging Face counts the two models
    assert sum(n for part, n in counts.items() if "Whisper" in part) == 1_543_490_560
    assert counts["| all trained"] == 131_540_224
    assert counts["| all frozen"] == 8_030_261_248 + 1_543_490_560
    both, neither = memory.memory(model, 4, 8, 1, True), memory.memory(model, 4, 8, 0, False)
    on_gpu = counts["| all frozen"] - counts["| Whisper large-v3: decoder (transcripts only)"]
    assert neither["frozen"] == 2 * on_gpu
    assert neither["trained"] == 16 * 131_540_224
    assert neither["frozen"] - both["frozen"] == pytest.approx(2 * 7 / 8 * 6.98e9, rel=1e-3)
    assert 11 < memory.cost(model)["training_tflop_per_row"] < 12  # design.md: about 11.4 TFLOP
    inputs = 4 * memory.TOKENS * 4096 * 2 * 32  # each block's input in bf16
    assert inputs < both["kept"] < neither["kept"] - 5e9


@pytest.mark.parametrize("name, n, config", [
    ("Llama-3.2-1B", 1_235_814_400, dict(model_type="llama", hidden_size=2048,
        intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
                                         num_key_value_heads=8, head_dim=64, vocab_size=128256,
                                         tie_word_embeddings=True)),
    ("Llama-3.2-3B", 3_212_749_824, dict(model_type="llama", hidden_size=3072,
        intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24,
                                         num_key_value_heads=8, head_dim=128, vocab_size=128256,
                                         tie_word_embeddings=True)),
    ("Qwen2.5-0.5B", 494_032_768, dict(model_type="qwen2", hidden_size=896, intermediate_size=4864,
        num_hidden_layers=24, num_attention_heads=14,
                                       num_key_value_heads=2, vocab_size=151936, tie_word_embeddings=True)),
    ("Qwen3-0.6B", 596_049_920, dict(model_type="qwen3", hidden_size=1024, intermediate_size=3072,
        num_hidden_layers=28, num_attention_heads=16,
                                     num_key_value_heads=8, head_dim=128, vocab_size=151936,
                                     tie_word_embeddings=True)),
])  # fmt: skip
def test_sizes_of_other_backbones(tmp_path, name, n, config):
    """From the config.json of the hub: as many parameters as the hub says."""
    (tmp_path / "config.json").write_text(
        json.dumps(config | {"rms_norm_eps": 1e-5, "rope_theta": 5e5})
    )
    with torch.device("meta"):
        model = Llama(LlamaConfig.from_json(tmp_path / "config.json"))
    model.lm_head.weight = model.model.embed_tokens.weight  # as from_pretrained ties them
    assert sum(p.numel() for p in model.parameters()) == n


def test_size_of_whisper_large_v3_turbo():
    with torch.device("meta"):
        assert (
            sum(
                p.numel()
                for p in Whisper(
                    WhisperConfig(128, 1280, 32, 20, 5120, 4, 20, 5120, 51866)
                ).parameters()
            )
            == 808_878_080
        )


TINY = (
    LlamaConfig(300, 64, 3, 4, 4, 16, 96, 1e-5, 1e4, None, False),
    WhisperConfig(80, 64, 4, 4, 96, 1, 4, 96, 100, 50),
)


def test_kept_bytes_are_what_autograd_keeps(memory, monkeypatch):
    """The count on the meta device against real tensors and torch's own fused attention on the CPU,
    on the path that GPUs run.
    """
    monkeypatch.setattr("engine.fast.textbook", True)
    size = dict(dtype=torch.float32, n_layers=2)
    loss = lambda model: model.loss(memory.rows_alike(model, 2, tokens=80, targets=9))
    counted = memory.kept_bytes(
        meta := memory.build(*TINY, **size).eval(), lambda: loss(meta)
    )  # without dropout
    real, kept = memory.build(*TINY, device="cpu", **size).eval(), {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.update({t.untyped_storage().data_ptr(): t}) or t, lambda t: t
    ):
        assert loss(real).isfinite()
    weights = {p.untyped_storage().data_ptr() for p in real.parameters()}
    assert counted == pytest.approx(
        sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in weights), rel=0.02
    )


def test_measuring_runs(memory):
    figures = memory.measure(memory.build(*TINY, device="cpu", n_layers=1), 2, new_tokens=3)
    assert figures.keys() == {"step_seconds", "generation_seconds"}
    assert min(figures.values()) > 0


LOAD = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from llama import Llama
def status(key):
    [line] = [line for line in open("/proc/self/status") if line.startswith(key)]
    return int(line.split()[1]) * 1024
Llama.from_pretrained(sys.argv[4])  # whatever is only imported, or set up, at the first load
before = status("VmRSS")
llm = Llama.from_pretrained(sys.argv[2], getattr(torch, sys.argv[3]))
for p in llm.parameters():
    p.max()  # a tensor that is taken as it stands in the file is read when it is used
print(status("VmHWM") - before, sum(p.numel() * p.element_size() for p in llm.parameters()))
"""


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_loading_never_holds_more_than_a_shard_beside_the_model(tiny_world, tmp_path, dtype):
    """As read, and converted. Four shards of 67 MB in bf16; LOG.md has the same with 1 GB each."""
    d, d_ff, n = 1024, 4096, 8
    settings = dict(
        model_type="llama",
        vocab_size=64,
        hidden_size=d,
        intermediate_size=d_ff,
        num_hidden_layers=n,
        num_attention_heads=8,
        rms_norm_eps=1e-5,
    )
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with torch.device("meta"):
        shapes = {
            name: p.shape
            for name, p in Llama(LlamaConfig.from_json(tmp_path / "config.json")).named_parameters()
        }
    names = sorted(shapes)
    files = {
        name: f"model-{1 + names.index(name) * 4 // len(names):05d}-of-00004.safetensors"
        for name in names
    }
    for file in set(files.values()):
        save_file(
            {
                name: torch.zeros(shapes[name], dtype=torch.bfloat16)
                for name in names
                if files[name] == file
            },
            tmp_path / file,
        )
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    largest = max((tmp_path / file).stat().st_size for file in files.values())
    done = subprocess.run(
        [sys.executable, "-c", LOAD, ROOT, tmp_path, dtype, tiny_world.llm],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    peak, model = map(int, done.stdout.split())
    assert 6e7 < largest < 9e7
    assert 0.9 * model < peak < model + 1.2 * largest


def test_released_adapter(tiny_world, tiny_en_folder, tmp_path):
    """An adapter in the released form, made by transformers' modules: same vectors, loss and
    answers as these give; saved back the same.
    """
    torch.manual_seed(0)
    whisper, released = tmp_path / "whisper", tmp_path / "released"
    config = transformers.WhisperConfig.from_pretrained(
        tiny_world.whisper, max_source_positions=1500
    )  # 30 s: released adapters know nothing else
    randomize(transformers.WhisperForConditionalGeneration(config)).save_pretrained(whisper)
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "preprocessor_config.json",
    ):
        shutil.copy(tiny_en_folder / name, whisper / name)
    size = QFormerConfig(d_model=64, n_heads=4, d_llm=64)  # six layers, 64 queries
    state = {
        name: tensor.clone()
        for name, tensor in randomize(ReferenceQFormer(size)).state_dict().items()
    }
    released.mkdir()
    save_file(
        {f"perception.connector.{name}": tensor for name, tensor in state.items()},
        released / "model.safetensors",
        {"format": "pt"},
    )
    (released / "config.json").write_text(json.dumps({
        "architectures": ["DeSTA25AudioModel"], "audio_locator": "<|AUDIO|>",
        "connector_mode": "qformer_1", "model_type": "desta25",
        "encoder_config": {"model_type": "whisper", "d_model": 1280},
        "encoder_model_id": "openai/whisper-large-v3",
        "llm_config": {"model_type": "llama"}, "llm_model_id": "DeSTA-ntu/Llama-3.1-8B-Instruct",
        "placeholder_token": "<|reserved_special_token_87|>",
        "prompt_size": 64, "qformer_num_hidden_layers": 6, "torch_dtype": "float32",
        "transformers_version": "4.51.3", "use_lora": False,
    }))  # fmt: skip
    reference = ReferenceDeSTA(
        types.SimpleNamespace(llm=tiny_world.llm, whisper=whisper),
        types.SimpleNamespace(config=size, state_dict=lambda: state),
    )
    load = lambda **dtypes: DeSTA.from_pretrained(
        tiny_world.llm, whisper, released, device="cpu", **dtypes
    )
    exact = load(dtype=torch.float32)
    assert exact.config.audio_seconds == 30
    assert exact.config.long_audio == "cut"
    assert not exact.config.lora_rank
    rows = [row | {"messages": row["messages"]} for row in tiny_world.rows[1:3]]
    mels = [
        list(exact.reader.mels(row["messages"][1]["audios"][0]["audio"], tiny_world.data))
        for row in rows
    ]
    with torch.no_grad():
        expected, vectors = reference.loss(rows, mels)
        torch.testing.assert_close(
            exact.audio_vectors(torch.stack(sum(mels, []))), vectors, atol=2e-5, rtol=1e-4
        )
        torch.testing.assert_close(
            exact.loss(rows, root=tiny_world.data), expected, atol=1e-5, rtol=1e-5
        )
        answers = exact.generate([row["messages"] for row in rows], 10, root=tiny_world.data)
        for row, vector, answer in zip(rows, vectors, answers):
            prompt = reference.row(row, [vector])[0]
            prompt = prompt[
                : len(prompt) - len(reference.tokenizer(row["response"] + "<|im_end|>").input_ids)
            ][None]
            ids = reference.llm.generate(
                inputs_embeds=prompt,
                attention_mask=torch.ones(prompt.shape[:2]),
                max_new_tokens=10,
                do_sample=False,
            )[0]
            assert reference.tokenizer.decode(ids, skip_special_tokens=True).strip() == answer
        # as the released model is run: --precision official
        official = load(dtype=torch.bfloat16, audio_dtype=torch.float32)
        torch.testing.assert_close(
            official.audio_vectors(torch.stack(sum(mels, []))), vectors, atol=2e-5, rtol=1e-4
        )
        reference.llm.bfloat16()
        assert official.loss(rows, root=tiny_world.data).item() == pytest.approx(
            reference_bf16(reference, rows, vectors), rel=0.02
        )
    exact.save_adapter(tmp_path / "again")
    before, after = (
        load_file(released / "model.safetensors"),
        load_file(tmp_path / "again/model.safetensors"),
    )
    assert before.keys() == after.keys()
    assert all(
        a.dtype == after[name].dtype and a.numpy().tobytes() == after[name].numpy().tobytes()
        for name, a in before.items()
    )


def reference_bf16(reference, rows, vectors):
    """Mean loss over the target tokens of rows, with a bf16 LLM that reads float32 vectors rounded
    to bf16.
    """
    total = count = 0
    for row, vector in zip(rows, vectors):
        x, labels = reference.row(row, [vector.bfloat16()])
        n = int((labels != -100).sum())
        total, count = (
            total + n * reference.llm(inputs_embeds=x[None], labels=labels[None]).loss.item(),
            count + n,
        )
    return total / count


def test_recipe_of_the_paper(tmp_path):
    """runs/desta25.sh calls train.py with the paper's values, and with a micro-batch that suits the
    number of GPUs.
    """
    (tmp_path / "torchrun").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "torchrun").chmod(0o755)

    def called(*arguments, **variables):
        place = {
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "LLM": "L",
            "WHISPER": "W",
            "DATA": "D",
            "AUDIO_ROOT": "A",
        } | variables
        done = subprocess.run(
            ["bash", "runs/desta25.sh", *arguments],
            cwd=ROOT,
            env=place,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        launcher, _, rest = done.stdout.partition("train.py\n")
        parts = rest.split("\n")[:-1]
        return launcher.split(), {
            name.removeprefix("--"): value for name, value in zip(parts[::2], parts[1::2])
        }

    launcher, given = called()
    assert launcher == [
        "--nnodes=1",
        "--nproc_per_node=8",
        "--rdzv_backend=c10d",
        "--rdzv_endpoint=localhost:29500",
    ]
    settings = run.parse_settings(
        train.Settings, "", [part for name, value in given.items() for part in (f"--{name}", value)]
    )
    assert (
        settings.llm,
        settings.data,
        settings.eval_data,
        settings.micro_batch,
        settings.global_batch,
    ) == ("L", "D", "", 12, 96)
    papers = {
        field.name: field.metadata["values"]["paper"]
        for field in dataclasses.fields(train.Settings)
        if "paper" in field.metadata["values"]
    }
    assert len(papers) > 15
    assert papers == {name: getattr(settings, name) for name in papers}
    launcher, given = called("--shard_llm", "1", NODES="4", HEAD="node0:29500")
    assert "--nnodes=4" in launcher
    assert "--rdzv_endpoint=node0:29500" in launcher
    assert (given["micro_batch"], given["shard_llm"]) == ("3", "1")
    assert [called(GPUS=gpus)[1]["micro_batch"] for gpus in ("1", "4", "16")] == ["12", "12", "6"]
    before, given = called(
        DATA="", METADATA="M", INSTRUCTIONS="I", OUT="O"
    )  # without targets they are made first
    made = before[before.index("generate_data.py") + 1 :]
    settings = run.parse_settings(generate_data.Settings, "", made[: made.index("--out") + 2])
    assert (settings.recipe, settings.metadata, settings.instructions, settings.max_new_tokens) == (
        "paper",
        "M",
        "I",
        300,
    )
    assert settings.out == given["data"] == "O/targets.jsonl"
