"""eval.py as a user runs it, on tiny models: the held-out table, a kill, scoring without a model, a
published benchmark; and heldout's arithmetic.
"""

import json
import random
import shutil
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import flags, in_float32, read_jsonl, script, start, torchrun, write_jsonl

from benchmarks import heldout
from model import MAX_TRANSCRIPT, DeSTA, description_slot


@pytest.fixture(scope="module")
def model(tiny_world):
    torch.manual_seed(0)
    return DeSTA.from_pretrained(
        tiny_world.llm, tiny_world.whisper, dtype=torch.float32, device="cpu", **tiny_world.adapter
    )


@pytest.fixture(scope="module")
def adapter(model, tmp_path_factory):
    model.save_adapter(folder := tmp_path_factory.mktemp("adapter"))
    return folder


def command(world, adapter, out, /, **changes):
    settings = dict(
        data=world.data / "test.jsonl",
        adapter=adapter,
        out=out,
        block=1,
        batch_size=4,
        max_new_tokens=6,
    )
    return ["eval.py", *world.models, *flags(**settings | changes)]


@pytest.fixture(scope="module")
def straight(tiny_world, adapter, tmp_path_factory):
    """(predictions file, what was printed) of the six held-out rows, float32."""
    out = tmp_path_factory.mktemp("straight") / "predictions.jsonl"
    with in_float32():
        done = script(*command(tiny_world, adapter, out))
    assert done.status == 0, done.err
    return out, done.out


# -- the held-out rows, end to end -----------------------------------------------------------------


def test_last_line_is_one_json_object(straight):
    out, said = straight
    summary = json.loads(said.splitlines()[-1])
    assert set(summary) == {"loss", "naming", "share_of_text", "n"}
    assert summary["n"] == 6
    assert set(summary["naming"]) == {"speech", "sound", "music"}
    assert set(summary["loss"]) == set(heldout.CLIPS)
    scores = json.loads(out.with_name("predictions.jsonl.scores.json").read_text())
    assert scores == json.loads(json.dumps(heldout.score(read_jsonl(out))))
    assert set(scores["attributes"]["speech"]) == {"Pitch", "Kind"}
    info = json.loads(out.with_name("predictions.jsonl.info.json").read_text())
    assert info["settings"]["task"] == "heldout"
    assert len(info["adapter_sha256"]) == 64
    assert not out.with_name("predictions.jsonl.parts").exists()


def test_losses_and_answers_are_those_of_the_model(straight, tiny_world, model):
    predictions = read_jsonl(straight[0])
    rows = {row["id"]: row for row in read_jsonl(tiny_world.data / "test.jsonl")}
    assert [row["id"] for row in predictions] == list(rows)
    assert sorted(row["wrong_id"] for row in predictions) == sorted(rows), (
        "each clip is the wrong one exactly once"
    )
    for row in predictions:
        mine, wrong = rows[row["id"]], rows[row["wrong_id"]]
        assert row["id"] != row["wrong_id"]
        (*context, user), audio = mine["messages"], mine["messages"][-1]["audios"][0]
        conversations = {
            "right": mine["messages"],
            "wrong": [*context, user | {"audios": wrong["messages"][-1]["audios"]}],
            "description": [
                *context,
                user | {"audios": [audio | {"description": mine["seed_description"]}]},
            ],
            "none": mine["messages"],
            "transcript": mine["messages"],
        }
        text_alone = lambda audio: model.tokenizer.encode(audio["text"], special=False)[
            :MAX_TRANSCRIPT
        ]
        fills = {
            "description": description_slot(model.tokenizer),
            "none": lambda audio: [],
            "transcript": text_alone,
        }
        # the right transcript with the wrong clip's vectors
        heard = user | {"audios": [wrong["messages"][-1]["audios"][0] | {"text": audio["text"]}]}
        conversations["wrong_sound"] = [*context, heard]
        assert conversations.keys() == set(heldout.CLIPS)
        for slot, messages in conversations.items():
            loss, count = model.row_losses(
                [
                    model.reader.prepare(
                        mine | {"messages": messages}, tiny_world.data, fills.get(slot)
                    )
                ]
            )
            assert (
                row["loss"][slot] == pytest.approx(loss.item(), rel=1e-4)
                and row["target_tokens"] == count.item()
            ), f"{row['id']} {slot}"
        assert row["answers"] == {"text": mine["response"]} | {
            slot: model.generate(
                conversations[slot], 6, root=tiny_world.data, fill=fills.get(slot)
            )[0]
            for slot in heldout.ASKED
        }
    assert len({row["answers"]["right"] for row in predictions}) > 2


def test_killed_then_continued_by_two_processes_equals_straight(
    straight, tiny_world, adapter, tmp_path
):
    out = tmp_path / "predictions.jsonl"
    finished = lambda: list((tmp_path / "predictions.jsonl.parts").glob("0*.jsonl"))
    process = start("tests/in_float32.py", *command(tiny_world, adapter, out))
    while not finished():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert 0 < len(finished()) < 6 and not out.exists(), "the job was over before the kill came"
    other = script(*command(tiny_world, adapter, out, max_new_tokens=5))
    assert other.status == 1
    assert "made with other settings" in other.err.splitlines()[-1]
    said = torchrun(2, *command(tiny_world, adapter, out, batch_size=2))
    mine, theirs = read_jsonl(out), read_jsonl(straight[0])
    for a, b in zip(mine, theirs, strict=True):
        assert a.pop("loss") == pytest.approx(b.pop("loss"), rel=1e-5)
        assert a == b
    assert straight[1].splitlines()[-1] in said


def test_scoring_needs_no_model(straight, tmp_path):
    out, said = straight
    done = script(
        "eval.py",
        *flags(
            score=out, llm=tmp_path, whisper=tmp_path, adapter=tmp_path, data=tmp_path / "nowhere"
        ),
    )
    assert done.status == 0
    assert done.out.splitlines()[-1] == said.splitlines()[-1]


@pytest.mark.parametrize("changes, message", [
    (dict(task="mmmu"), "--task 'mmmu' is none of dynamic_superb, heldout, mmau, "),
    (dict(data="nowhere.jsonl"),
        "nowhere.jsonl is missing: `python demo/prepare.py` and `python generate_data.py`"),
    (dict(adapter="nowhere"), "nowhere/config.json is missing: train an adapter"),
    (dict(llm="nowhere"), "nowhere/.* is missing"),
    (dict(score="nowhere.jsonl"), "nowhere.jsonl"),
    (dict(task="sakura", judge="nowhere"), "nowhere/.* is missing"),
    (dict(task="mmau", options='{"subset": 1}'), "--task mmau takes no subset"),
    (dict(options="{"), "--options"),
    (dict(tasks="mmau"), "unrecognized arguments: --tasks mmau"),
])  # fmt: skip
def test_what_a_user_can_get_wrong_is_one_clear_line(
    tiny_world, adapter, tmp_path, changes, message
):
    done = script(*command(tiny_world, adapter, tmp_path / "predictions.jsonl", **changes))
    assert done.status != 0
    assert not (tmp_path / "predictions.jsonl").exists()
    with pytest.raises(ValueError, match=rf"error: .*{message}"):
        raise ValueError(done.err.splitlines()[-1])


def test_asked_as_the_adapter_was_trained(straight, tiny_world, model, adapter, tmp_path, float32):
    """Context, limit and models come from the adapter's config.json, unless a flag says otherwise."""
    shutil.copytree(adapter, tmp_path / "adapter")
    context = [
        {"role": "system", "content": "Guess."},
        {"role": "user", "content": "A bark."},
        {"role": "assistant", "content": "A dog."},
    ]
    replace(model.config, context=context, max_answer_tokens=5).write(tmp_path / "adapter")
    options = flags(
        data=tiny_world.data / "test.jsonl",
        audio_root=tiny_world.data,
        adapter=tmp_path / "adapter",
    )
    done = script("eval.py", *options, "--out", out := tmp_path / "p.jsonl")
    assert (
        done.status == 0
        and "at most 5 new tokens" in done.out
        and "  system: Guess.\n  user: A bark.\n  assistant: A dog.\n  user: " in done.out
    ), done.err
    rows = {row["id"]: row for row in read_jsonl(tiny_world.data / "test.jsonl")}
    for row, before in zip(read_jsonl(out), read_jsonl(straight[0]), strict=True):
        user, other = (rows[row[key]]["messages"][-1] for key in ("id", "wrong_id"))
        mine, wrong = [*context, user], [*context, user | {"audios": other["audios"]}]
        assert [row["answers"][slot] for slot in ("right", "wrong")] == [
            model.generate(messages, 5, root=tiny_world.data)[0] for messages in (mine, wrong)
        ]
        loss, _ = model.row_losses(
            [model.reader.prepare(rows[row["id"]] | {"messages": mine}, tiny_world.data)]
        )
        assert (
            row["loss"]["right"] == pytest.approx(loss.item(), rel=1e-4) != before["loss"]["right"]
        )
    done = script("eval.py", *options, *flags(out=tmp_path / "q.jsonl", limit=2, max_new_tokens=3))
    assert done.status == 0
    assert "at most 3 new tokens" in done.out
    replace(model.config, llm="gone").write(tmp_path / "adapter")
    done = script("eval.py", *options, "--out", tmp_path / "r.jsonl")
    assert done.status == 1
    assert (
        f"{tmp_path}/adapter was trained with gone, which is no folder here: give --llm" in done.err
    )


# -- a published benchmark, from an official-format file -------------------------------------------


def test_mmau_from_file_to_score(tiny_world, adapter, tmp_path):
    questions = [
        {
            "id": f"q{i}", "audio_id": f"./clips/{i:02d}.wav", "question": "What is heard?",
            "choices": ["noise", "a tone"], "answer": "noise",
            "dataset": "tiny", "task": ("speech", "sound", "music")[i % 3], "split": "test-mini",
            "category": "Perception",
            "sub-category": "Source", "difficulty": ("easy", "hard")[i % 2],
        }
        for i in range(5)
    ]  # fmt: skip
    (tmp_path / "mmau-test-mini.json").write_text(json.dumps(questions))
    out = tmp_path / "predictions.jsonl"
    done = script(
        *command(
            tiny_world, adapter, out, task="mmau", data=tmp_path / "mmau-test-mini.json", block=3
        )
    )
    assert done.status == 0, done.err
    summary = json.loads(done.out.splitlines()[-1])
    assert set(summary) == {"total", "sound", "music", "speech", "n"}
    assert summary["n"] == 5
    predictions = read_jsonl(out)
    assert [row["id"] for row in predictions] == [q["id"] for q in questions]
    assert all(isinstance(row["model_output"], str) for row in predictions)
    for row, said in zip(
        predictions, ("Noise.", "a tone", "noise", "noise and a tone", "")
    ):  # somebody's better model
        row["model_prediction"] = said
    better = script(
        "eval.py", "--task", "mmau", "--score", write_jsonl(tmp_path / "better.jsonl", predictions)
    )
    assert json.loads(better.out.splitlines()[-1]) == {
        "total": 40.0,
        "sound": 0.0,
        "music": 100.0,
        "speech": 50.0,
        "n": 5,
    }
    questions[2]["audio_id"] = "clips/missing.wav"
    (tmp_path / "mmau-test-mini.json").write_text(json.dumps(questions))
    missing = script(
        *command(
            tiny_world,
            adapter,
            tmp_path / "other.jsonl",
            task="mmau",
            data=tmp_path / "mmau-test-mini.json",
        )
    )
    assert missing.status == 1
    assert "1 of 5 rows lack their audio" in missing.err.splitlines()[-1]


# -- heldout's arithmetic --------------------------------------------------------------------------


@pytest.mark.parametrize("answer, value, values, named", [
    ("A high pitch.", "high", {"high", "low"}, True),
    ("HIGH", "high", {"high", "low"}, True),
    ("Highway noise", "high", {"high", "low"}, False),  # whole words only
    ("Two dogs bark.", "dog", {"dog", "cat"}, True),  # a plural s is allowed
    ("dogsled", "dog", {"dog", "cat"}, False),
    ("high or low", "high", {"high", "low"}, False),  # names them all: no
    ("not loud, so quiet", "quiet", {"quiet", "loud"}, False),
    ("A very fast voice", "very fast", {"fast", "very fast"}, True),  # the other value is part of this one
    ("A fast voice", "very fast", {"fast", "very fast"}, False),
    ("A very fast voice", "fast", {"fast", "very fast"}, False),
    ("fast, and very clear", "very fast", {"slow", "very fast"}, True),  # all words, in any order
    ("C major (scale)", "C major", {"C major", "C minor"}, True),
    ("", "high", {"high", "low"}, False),
    ("a*b", "a.b", {"a.b"}, True),  # signs are no words, and no expressions either
    ("Ünïcödé", "ünïcödé", {"ünïcödé"}, True),
])  # fmt: skip
def test_naming(answer, value, values, named):
    assert heldout.is_named(answer, value, values) is named


def test_interval_is_a_ratio_of_sums_with_its_bootstrap():
    assert heldout.interval([1, 0, 3], [2, 1, 5])[0] == 0.5
    assert heldout.interval([2] * 9, [4] * 9) == [0.5, 0.5, 0.5]
    assert np.isnan(heldout.interval([0, 0], [0, 0])).all()
    rng, hits = random.Random(0), 0
    for _ in range(100):  # of a hundred samples of a known ratio, about 95 intervals hold it
        draws = [rng.random() < 0.3 for _ in range(60)]
        _, low, high = heldout.interval(draws, [1] * 60, draws=300)
        assert low <= sum(draws) / 60 <= high
        hits += low <= 0.3 <= high
    assert 88 <= hits <= 100


def prediction(domain, attributes, right, wrong="", text="", loss=1.0, tokens=2):
    return {
        "id": "x", "domain": domain, "attributes": attributes,
        "answers": {"text": text, "right": right, "wrong": wrong},
        "loss": {"description": loss, "right": loss, "wrong": 2 * loss, "none": 3 * loss},
        "target_tokens": tokens,
    }  # fmt: skip


def test_scores_by_hand():
    rows = [
        prediction("sound", {"Pitch": "low"}, "low", "high", "low", loss=1.0, tokens=1),
        prediction("sound", {"Pitch": "low"}, "high", "low", "low", loss=2.0, tokens=1),
        prediction(
            "sound", {"Pitch": "high", "Kind": "bell"}, "high bell", "", "high", loss=3.0, tokens=4
        ),
        prediction("music", {"Pitch": "low"}, "low", "low", ""),
    ]
    scores = heldout.score(rows)
    value = lambda rates: {
        slot: rates[slot][0] for slot in ("text", "right", "wrong", "same_domain")
    }
    # same_domain: the other rows' right answers. Row 0: "high", "high bell" do not say low: 0 of 2.
    # Row 1: "low" does, "high bell"
    # does not: 1 of 2. Row 2, pitch: "low" no, "high" yes: 1 of 2; kind: 0 of 2. The music row has
    # no others.
    assert value(scores["attributes"]["sound"]["Pitch"]) == pytest.approx(
        {"text": 1, "right": 2 / 3, "wrong": 1 / 3, "same_domain": 1 / 3}, abs=1e-4
    )
    assert value(scores["naming"]["sound"]) == {
        "text": 0.75,
        "right": 0.75,
        "wrong": 0.25,
        "same_domain": 0.25,
    }
    assert value(scores["attributes"]["sound"]["Kind"]) == {
        "text": 0,
        "right": 1,
        "wrong": 0,
        "same_domain": 0,
    }
    assert value(scores["naming"]["music"]) == {"text": 0, "right": 1, "wrong": 1, "same_domain": 0}
    assert [scores["naming"][d]["rows"] for d in ("sound", "music")] == [3, 1]
    assert scores["attributes"]["sound"]["Kind"]["rows"] == 1
    assert {slot: v[0] for slot, v in scores["loss"].items()} == {
        "description": 0.875,
        "right": 0.875,
        "wrong": 1.75,
        "none": 2.625,
    }  # 7 / 8 tokens
    summary = heldout.summary(heldout.score(rows[:3]))
    assert summary["share_of_text"] == {"right": 1.0, "wrong": 0.3333, "same_domain": 0.3333}
    assert summary["n"] == 3


def test_scores_of_a_corpus_by_hand():
    """Only what differs within the corpus counts, and chance is taken among its own clips."""
    row = lambda dataset, kind, said: (
        prediction("speech", {"Kind": kind, "Language": "German"}, f"{said} German", text=kind)
        | {"dataset": dataset}
    )
    rows = [
        row("a", "calm", "calm"),
        row("a", "calm", "angry"),
        row("a", "angry", "angry"),
        row("b", "calm", "calm"),
    ]
    for row, alone in zip(rows, ("calm", "", "", "angry")):
        row["answers"] |= {"transcript": alone, "wrong_sound": "German"}
    scores = heldout.score(rows)
    assert {name: list(attributes) for name, attributes in scores["datasets"].items()} == {
        "a": ["Kind"],
        "b": [],
    }
    value = {
        slot: rate[0] for slot, rate in scores["datasets"]["a"]["Kind"].items() if slot != "rows"
    }
    # chance: row 0 of "angry", "angry": 0; row 1 of "calm", "angry": 1 / 2; row 2 of "calm",
    # "angry": 1 / 2
    third = {
        "right": 2 / 3,
        "wrong": 0,
        "transcript": 1 / 3,
        "wrong_sound": 0,
        "same_domain": 1 / 3,
    }
    assert value == pytest.approx({"text": 1} | third, abs=1e-4)
    shares = heldout.summary(scores)[
        "share_of_text"
    ]  # of 4 kinds and 4 languages; the text names the kinds alone
    assert shares["right"] == 1.75
    assert shares["transcript"] == 0.25
    assert shares["wrong_sound"] == 1.0
