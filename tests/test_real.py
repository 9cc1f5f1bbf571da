"""runs/real.sh, what it calls, and the adapter that it trained (adapters/real).

The whole of runs/real.sh is tested where CORPORA names the folder of the four real corpora, and
takes minutes (slow).
"""

import json
import os
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import soundfile
import torch
from conftest import ROOT, flags, script, write_jsonl

from engine.checkpoint import load_tensors, read_record, save_tensors, write_record

sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tools"))
import carry  # noqa: E402
import join  # noqa: E402
import probe  # noqa: E402

ADAPTER = ROOT / "adapters" / "real"


def metadata(n, labels, prefix=""):
    segment = lambda i: {
        "start": 0,
        "end": 1,
        "attributes": {"Animal": labels[i % len(labels)], "Size": str(i)},
    }
    return [
        {"id": f"{prefix}{i}.wav", "domain": "sound", "segments": [segment(i)]} for i in range(n)
    ]


# -- tools/join.py ---------------------------------------------------------------------------------


def test_labels_take_turns():
    rows = metadata(60, ["cat"] * 8 + ["dog"] * 3 + ["cow"])
    taken = join.take(rows, 12)
    assert Counter(row["segments"][0]["attributes"]["Animal"] for row in taken) == {
        "cat": 4,
        "dog": 4,
        "cow": 4,
    }
    assert taken == [row for row in rows if row in taken], "the old order"
    assert join.take(list(reversed(rows)), 12) == list(reversed(taken)), (
        "the choice hangs on the ids alone"
    )
    assert join.take(rows, 1000) == rows
    assert join.take(rows, 0) == []
    words_alone = [{"id": "a", "segments": [{"text": "Hello", "attributes": {}}]}]
    assert join.take(words_alone, 1) == words_alone


def joined(tmp_path, files):
    out = tmp_path / "all.metadata.jsonl"
    done = subprocess.run(
        [sys.executable, "tools/join.py", files, "--out", str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    return done, [json.loads(line) for line in out.open()] if out.exists() else None


def test_join_as_a_command(tmp_path):
    for name, rows in {
        "a": metadata(9, "xyz", "a/"),
        "b": metadata(4, "x", "b/"),
        "twice": metadata(1, "x", "a/"),
    }.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done, rows = joined(tmp_path, f"{tmp_path}/a.jsonl:3,{tmp_path}/b.jsonl")
    assert done.returncode == 0, done.stderr
    assert [row["id"][0] for row in rows] == ["a"] * 3 + ["b"] * 4
    done, _ = joined(tmp_path, f"{tmp_path}/a.jsonl,{tmp_path}/twice.jsonl")
    assert done.returncode != 0
    assert "a/0.wav is in an earlier file too" in done.stderr
    done, _ = joined(tmp_path, f"{tmp_path}/nowhere.jsonl:3")
    assert done.returncode != 0
    assert "nowhere.jsonl is missing" in done.stderr
    assert "Traceback" not in done.stderr


def test_join_keeps_captions(tmp_path):
    """The name of a bare caption is ''."""
    row = {"id": "a.wav", "segments": [{"start": 0, "end": 1, "attributes": {"": "A dog barks."}}]}
    (tmp_path / "clotho.jsonl").write_text(json.dumps(row) + "\n")
    done, rows = joined(tmp_path, f"{tmp_path}/clotho.jsonl")
    assert done.returncode == 0, done.stderr
    assert rows == [row]


def test_join_leaves_attributes_out(tmp_path):
    rows = metadata(3, ["cat"], "a/")
    for row in rows:
        row["segments"][0]["text"] = "Miau."
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "all.metadata.jsonl"
    subprocess.run(
        [
            sys.executable,
            "tools/join.py",
            str(tmp_path / "a.jsonl"),
            "--out",
            str(out),
            "--without",
            "Size, Note, text",
        ],
        cwd=ROOT,
        check=True,
    )
    less = [json.loads(line) for line in out.open()]
    assert [row["segments"] for row in less] == [
        [{"start": 0, "end": rows[0]["segments"][0]["end"], "attributes": {"Animal": "cat"}}]
    ] * 3
    assert [{**row, "segments": 0} for row in less] == [{**row, "segments": 0} for row in rows]


# -- runs/real.sh ----------------------------------------------------------------------------------


@pytest.mark.parametrize("corpora", [None, "/nowhere", "some"])
def test_real_sh_says_what_to_fetch(corpora, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "CORPORA"}
    if corpora == "some":
        (tmp_path / "emodb").mkdir()
    if corpora:
        environment["CORPORA"] = str(tmp_path) if corpora == "some" else corpora
    done = subprocess.run(
        ["bash", "runs/real.sh"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "git clone https://github.com/Jakobovski/free-spoken-digit-dataset" in done.stdout
    assert ("emodb.bilderbar.info" in done.stdout) == (corpora != "some"), (
        "what is there is not asked for"
    )


@pytest.mark.slow
@pytest.mark.skipif(
    "CORPORA" not in os.environ, reason="CORPORA does not name the folder of the four real corpora"
)
@pytest.mark.parametrize("backbone", ["smollm2", "qwen"])
def test_real_sh_from_corpora_to_report(tmp_path, backbone):
    few = {
        "BACKBONE": backbone,
        "CLIPS": "4",
        "TEST_CLIPS": "2",
        "STEPS": "1",
        "DATA": str(tmp_path / "data"),
        "OUT": str(tmp_path / "out"),
    }
    done = subprocess.run(
        ["bash", "runs/real.sh"], cwd=ROOT, env=os.environ | few, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    scores = json.loads((tmp_path / "out/predictions.jsonl.scores.json").read_text())
    used = {
        "smollm2": {"animals", "emodb", "digits", "philharmonia"},
        "qwen": {"animals", "emodb", "philharmonia"},
    }
    assert used[backbone] <= set(scores["datasets"])
    page = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    assert "philharmonia: Instrument" in page
    assert "data:audio/mpeg" in page
    (tmp_path / "out/report.html").unlink()
    again = subprocess.run(
        ["bash", "runs/real.sh"], cwd=ROOT, env=os.environ | few, capture_output=True, text=True
    )
    assert again.returncode == 0
    assert "all.train.jsonl is there already" in again.stdout


# -- tools/carry.py, tools/probe.py ----------------------------------------------------------------


def test_what_is_left_out_is_not_trained_on():
    rows = lambda part, n: [
        {"id": f"{part}{corpus}{i}", "dataset": corpus,
            "group": ("03 08 10 09 11 13 12 14".split() if part == "train" else ["15",
                "16"])[i % (8 if part == "train" else 2)]}
        for corpus in ("animals", "emodb") for i in range(n)
    ]  # fmt: skip
    train, test = rows("train", 24), rows("test", 12)
    runs = carry.runs(train, test)
    assert list(runs) == ["without animals and emodb 03 08", "without emodb", "everything"], (
        "only with corpora that are there"
    )
    assert runs["everything"] == (train, test)
    ours, asked = runs["without emodb"]
    assert {row["dataset"] for row in ours} == {"animals"}
    assert [row["id"] for row in asked] == [f"testemodb{i}" for i in range(12)]
    ours, asked = runs["without animals and emodb 03 08"]
    assert {row["dataset"] for row in ours} == {"emodb"}
    assert not {row["group"] for row in ours} & {
        "03",
        "08",
    }
    assert sum(row["dataset"] == "emodb" for row in ours + asked) == 36, (
        "the other eight speakers are trained on, those of the test part too"
    )
    animals = [row["id"] for row in asked if row["dataset"] == "animals"]
    assert animals == [f"testanimals{i}" for i in range(12)]
    assert {row["group"] for row in asked if row["dataset"] == "emodb"} == {"03", "08"}


def test_carry_table_from_scores():
    rate = [0.5, 0.4, 0.6]
    rates = {
        "rows": 7,
        "text": [1.0, 1.0, 1.0],
        "right": rate,
        "wrong": [0.0, 0.0, 0.1],
        "same_domain": rate,
    }
    lines = carry.table({"everything": {"datasets": {"emodb": {"Emotion": rates}}}}).splitlines()
    assert (
        lines[-1]
        == "| everything | emodb: Emotion | 7 | 100 (100–100) | 50 (40–60) | 0 (0–10) | 50 (40–60) |"
    )


def test_probe_finds_what_is_there_and_nothing_else():
    torch.manual_seed(0)
    labels, test_labels = torch.arange(300) % 3, torch.arange(90) % 3
    x, test_x = torch.randn(300, 20), torch.randn(90, 20)
    assert probe.probe(x, labels, test_x, test_labels) < 0.5
    there = lambda x, labels: x + 4 * torch.nn.functional.one_hot(labels, 20)
    assert probe.probe(there(x, labels), labels, there(test_x, test_labels), test_labels) > 0.9


def test_probe_as_a_command(tiny_world):
    done = script("tools/probe.py", tiny_world.data / "train.metadata.jsonl",
        tiny_world.data / "train.metadata.jsonl", *flags(
        audio_root=tiny_world.data, whisper=tiny_world.whisper, audio_seconds=3))  # fmt: skip
    assert done.status == 0, done.err
    lines = {line.split(":")[0]: line for line in done.out.splitlines()}
    assert set(lines) == {"tiny Pitch", "tiny Kind"}
    assert "12 clips" in lines["tiny Pitch"]
    assert "all taps 1.00" in lines["tiny Kind"], "12 clips, asked about themselves"


# -- tools/publish.py ------------------------------------------------------------------------------


def test_published_adapter_is_the_same_in_half_the_size(tmp_path):
    tensors = {
        "perception.connector.proj.1.weight": torch.randn(40, 50),
        "perception.connector.proj.1.bias": torch.randn(40),
    }
    save_tensors(tmp_path / "adapter/model.safetensors", tensors)
    write_record(tmp_path / "adapter/config.json", {"prompt_size": 16})
    command = [
        sys.executable,
        "tools/publish.py",
        str(tmp_path / "adapter"),
        str(tmp_path / "small"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    small = load_tensors(tmp_path / "small/model.safetensors")
    assert all(torch.equal(small.pop(name), tensor.bfloat16()) for name, tensor in tensors.items())
    assert not small
    assert read_record(tmp_path / "small/config.json") == {"prompt_size": 16}


# -- adapters/real ---------------------------------------------------------------------------------


@pytest.fixture()
def adapter():
    if not ADAPTER.is_dir():
        pytest.skip("adapters/real is not there: runs/real.sh and tools/publish.py make it")
    return ADAPTER


def test_published_adapter_is_small_and_whole(adapter):
    tensors = load_tensors(adapter / "model.safetensors")  # checks the sha256
    assert {str(tensor.dtype) for tensor in tensors.values()} == {"torch.bfloat16"}
    assert all(name.startswith("perception.connector.") for name in tensors)
    assert (adapter / "model.safetensors").stat().st_size <= 25e6
    config = read_record(adapter / "config.json")
    assert config["llm_model_id"] == "weights/smollm2-135m-instruct"
    assert config["encoder_model_id"] == "weights/whisper-tiny.en"
    assert config["context"] == json.loads((ROOT / "demo/real/context.json").read_text())
    readme = (adapter / "README.md").read_text(encoding="utf-8")
    assert all(
        name in readme
        for name in ("CC BY-SA 4.0", "EmoDB", "Philharmonia", "Free Spoken Digit", "Animal")
    )


def ask(file, adapter):
    command = [
        sys.executable,
        "model.py",
        str(file),
        "--prompt",
        "What do you hear?",
        "--adapter",
        str(adapter),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_published_adapter_answers(adapter, smollm2_folder, tiny_en_folder, tmp_path):
    """As a user does who has cloned the repository and prepared the weights: any file gets an
    answer in the trained form.
    """
    noise = 0.1 * np.random.default_rng(0).standard_normal(16000)
    soundfile.write(tmp_path / "my.wav", noise, 16000)
    assert ":" in ask(tmp_path / "my.wav", adapter)


# -- tools/instructions.py -------------------------------------------------------------------------


def test_share_of_answers_that_name_an_attribute(tmp_path):
    animals = ["cow", "dog", "cat", "lion"]
    said = {"Which animal?": "A {}.", "Is it loud?": "It is.", "Guess.": "A cow or a {}."}
    rows = [
        {"id": a, "prompt": prompt, "response": form.format(a), "seed_description": f"(Animal: {a})",
         "messages": [{"role": "user", "content": "<|AUDIO|>", "audios": [{"audio": a, "text": ""}]}]}
        for a in animals for prompt, form in said.items()
    ]  # fmt: skip
    write_jsonl(tmp_path / "few.jsonl", rows)
    clip = lambda a: {
        "id": a,
        "domain": "sound",
        "segments": [{"start": 0, "end": 1, "attributes": {"Animal": a}}],
    }
    write_jsonl(tmp_path / "few.metadata.jsonl", map(clip, animals))
    done = script("tools/instructions.py", tmp_path / "few.jsonl")
    assert done.out.splitlines() == [
        "## sound: 1 of 3 instructions name 0.70 or more", "", "| instruction | Animal |", "| --- | --- |",
        "| Which animal? | 1.00 |", "| Guess. | 0.25 |", "| Is it loud? | 0.00 |", "",
    ], done.err  # fmt: skip
