"""generate_data.py as a user runs it, on tiny models: the text shown to the LLM, kills and
processes, bad clips, the record of how it was made.
"""

import hashlib
import json
import shutil
import time

import numpy as np
import pytest
import soundfile
from conftest import ROOT, flags, in_float32, read_jsonl, script, start, torchrun, write_jsonl

import generate_data
from model import DeSTAConfig, Reader
from tokenizer import Tokenizer


def command(world, out, **changes):
    settings = dict(
        metadata=world.data / "train.metadata.jsonl", instructions=world.instructions, out=out,
        per_clip=2, audio_seconds=3, max_new_tokens=16,
        keep_truncated=1, batch_size=4, block=3,
    )  # fmt: skip
    return ["generate_data.py", *world.models, *flags(**settings | changes)]


def info(out):
    return json.loads(out.with_name(out.name + ".info.json").read_text())


@pytest.fixture(scope="module")
def straight(tiny_world, tmp_path_factory):
    """All 24 rows in one go, cut answers kept, float32."""
    out = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    with in_float32():
        assert script(*command(tiny_world, out)).status == 0
    return out


# -- the text --------------------------------------------------------------------------------------


def test_descriptions_known_by_heart():
    attributes = {"Gender": "Female", "Emotion": "Happy", "Duration": "5s"}
    speech = {"start": 0.0, "end": 5.2, "text": "Hello world", "attributes": attributes}
    assert (
        generate_data.describe([speech])
        == "[00:00-00:05] Hello world (Gender: Female, Emotion: Happy, Duration: 5s)"
    )
    dog = {"start": 59.9, "end": 3599.6, "attributes": {"Sound": "dog"}}
    plain = {"start": 61, "end": 75, "text": "Bye"}
    assert generate_data.describe([speech, dog, plain]).split("\n")[1:] == [
        "[00:59-60:00] (Sound: dog)",
        "[01:01-01:15] Bye",
    ]
    caption = {
        "start": 0,
        "end": 10,
        "attributes": {"": "A dog barks.", "Kind": "animal"},
    }  # a caption has no name
    assert generate_data.describe([caption]) == "[00:00-00:10] (A dog barks., Kind: animal)"
    assert generate_data.describe([]) == ""


def test_rows_have_the_public_form(straight, tiny_world):
    rows = read_jsonl(straight)
    assert [row["id"] for row in rows] == [
        clip["id"] for clip in tiny_world.clips for _ in range(2)
    ]
    for row, clip in zip(rows, [clip for clip in tiny_world.clips for _ in range(2)]):
        assert set(row) - {"truncated"} == {
            "id",
            "dataset",
            "seed_description",
            "prompt",
            "response",
            "messages",
        }
        assert row["dataset"] == "tiny"
        assert row["seed_description"] == generate_data.describe(clip["segments"])
        *context, user = row["messages"]
        (audio,) = user["audios"]
        assert context == json.loads((ROOT / "demo/context.json").read_text())
        assert user["role"] == "user"
        assert user["content"] == f"<start_audio><|AUDIO|><end_audio>\n\n{row['prompt']}"
        assert audio["audio"] == clip["id"]
        assert isinstance(audio["text"], str)
        assert audio["text"]
        assert (
            row["prompt"]
            in (tiny_world.instructions / f"{clip['domain']}.txt").read_text().splitlines()
        )
    assert all(a["prompt"] != b["prompt"] for a, b in zip(rows[::2], rows[1::2])), (
        "one clip must not get the same instruction twice"
    )
    assert len({row["prompt"] for row in rows if "speech" in row["prompt"]}) == 3, (
        "all clips got the same instructions"
    )
    assert len({row["messages"][-1]["audios"][0]["text"] for row in rows}) > 6
    assert len({row["response"] for row in rows}) > 6


def test_answers_are_what_the_llm_says_to_the_description(tiny_world, tmp_path, float32):
    """Without sampling, from a chat string put together by hand; the description is tokenized on
    its own.
    """
    out = tmp_path / "rows.jsonl"
    assert script(*command(tiny_world, out, temperature=0.0, limit=3)).status == 0
    llm, tokenizer = (
        generate_data.Llama.from_pretrained(tiny_world.llm),
        generate_data.Tokenizer(tiny_world.llm),
    )
    for row in read_jsonl(out):
        text = f"<start_audio>{row['seed_description']}<end_audio>\n\n{row['prompt']}"
        before, after = tokenizer.apply_chat_template(
            [*row["messages"][:-1], {"role": "user", "content": text}]
        ).split(row["seed_description"])
        prompt = (
            tokenizer.encode(before)
            + tokenizer.encode(row["seed_description"])
            + tokenizer.encode(after)
        )
        (answer,) = generate_data.generate(llm, [prompt], 16, stop_ids=tokenizer.stop_ids)
        assert tokenizer.decode(answer).strip() == row["response"]


def test_instructions_are_drawn_per_row_from_the_seed(straight, tiny_world, tmp_path, float32):
    first = read_jsonl(straight)
    fewer = lambda name, **changes: (
        script(*command(tiny_world, tmp_path / name, **changes)).status
        or read_jsonl(tmp_path / name)
    )
    reordered = write_jsonl(tmp_path / "reordered.jsonl", tiny_world.clips[5:3:-1])
    assert [row["prompt"] for row in fewer("a", metadata=reordered)] == [
        row["prompt"] for n in (5, 4) for row in first[2 * n : 2 * n + 2]
    ]
    other = fewer("b", limit=6, seed=1)
    assert len(other) == 12
    assert [row["prompt"] for row in other] != [row["prompt"] for row in first[:12]]


def test_cut_answers_are_marked_or_left_out_and_counted(straight, tiny_world, tmp_path, float32):
    rows = read_jsonl(straight)
    whole = [row for row in rows if "truncated" not in row]
    assert 3 < len(whole) < 21
    assert all(row["truncated"] is True for row in rows if "truncated" in row)
    assert info(straight)["counts"] == {
        "rows": 24,
        "truncated": 24 - len(whole),
        "truncated_left_out": 0,
        "skipped": 0,
    }
    # Marked is what would have gone on, and nothing else: with more room those answers grow, the
    # others stay as they are.
    greedy = lambda room: (
        script(
            *command(tiny_world, tmp_path / f"{room}.jsonl", temperature=0.0, max_new_tokens=room)
        ).status
        or read_jsonl(tmp_path / f"{room}.jsonl")
    )
    short, long = greedy(16), greedy(40)
    assert [row.get("truncated", False) for row in short] == [
        a["response"] != b["response"] for a, b in zip(short, long, strict=True)
    ]
    assert 3 < sum("truncated" in row for row in short) < 24
    assert (
        script(*command(tiny_world, out := tmp_path / "whole.jsonl", keep_truncated=0)).status == 0
    )
    assert read_jsonl(out) == whole
    assert info(out)["counts"] == {
        "rows": len(whole),
        "truncated": 0,
        "truncated_left_out": 24 - len(whole),
        "skipped": 0,
    }


def test_rows_can_be_trained_on(straight, tiny_world, tmp_path):
    done = script("train.py", *tiny_world.models, *flags(
        data=straight, eval_data=straight, out=tmp_path, global_batch=8, micro_batch=8, max_steps=3,
        standardize=4, eval_rows=4, **tiny_world.adapter
    ))  # fmt: skip
    assert done.status == 0
    assert "left out" not in done.out + done.err
    assert (tmp_path / "adapter/model.safetensors").is_file()


def test_a_cut_answer_teaches_no_ending(straight, tiny_world):
    tokenizer = Tokenizer(tiny_world.llm)
    reader, endings = Reader(tokenizer, 4, 80, 3, "cut"), []
    for row in read_jsonl(straight):
        said, target = (
            tokenizer.encode(row["response"], special=False),
            reader.prepare(row, tiny_world.data)["target"],
        )
        assert target[: len(said)] == said
        endings.append((row.get("truncated", False), target[len(said) :]))
    assert {cut for cut, _ in endings} == {True, False}
    assert all(ending == ([] if cut else [tokenizer.eos_id]) for cut, ending in endings)


def test_data_for_an_adapter_that_is_there(tiny_world, tmp_path, float32):
    """--init_from: models, context, window and limit are the adapter's, unless a flag says
    otherwise.
    """
    context = [
        {"role": "system", "content": "Guess."},
        {"role": "user", "content": "A bark."},
        {"role": "assistant", "content": "A dog."},
    ]
    saved = dict(
        llm=str(tiny_world.llm),
        whisper=str(tiny_world.whisper),
        audio_seconds=2,
        long_audio="split",
    )
    DeSTAConfig(**saved, context=context, max_answer_tokens=7).write(
        adapter := tmp_path / "adapter"
    )
    data = dict(
        metadata=tiny_world.data / "train.metadata.jsonl",
        audio_root=tiny_world.data,
        instructions=tiny_world.instructions,
    )
    options = ["generate_data.py", *flags(**data, keep_truncated=1, limit=4, init_from=adapter)]
    done = script(*options, "--out", out := tmp_path / "rows.jsonl")
    assert done.status == 0, done.err
    assert saved | {"max_new_tokens": 7} == {
        name: info(out)["settings"][name] for name in (*saved, "max_new_tokens")
    }
    assert all(row["messages"][:-1] == context for row in read_jsonl(out))
    tokenizer = Tokenizer(tiny_world.llm)
    assert (
        max(len(tokenizer.encode(row["response"])) for row in read_jsonl(out)) <= 8
    )  # 7, and what decoding may change
    flagged = dict(
        whisper=str(tiny_world.whisper) + "/.", audio_seconds=3, long_audio="cut", max_new_tokens=5
    )
    done = script(
        *options, *flags(**flagged, system="You hear a clip.", out=tmp_path / "other.jsonl")
    )
    assert done.status == 0, done.err
    assert flagged == {name: info(tmp_path / "other.jsonl")["settings"][name] for name in flagged}
    assert all(
        row["messages"][:-1] == [{"role": "system", "content": "You hear a clip."}]
        for row in read_jsonl(tmp_path / "other.jsonl")
    )


# -- what it says about itself ---------------------------------------------------------------------


def test_provenance(straight, tiny_world):
    found = info(straight)
    assert (
        found["weights_sha256"]
        == hashlib.sha256((tiny_world.llm / "model.safetensors").read_bytes()).hexdigest()
    )
    settings = found["settings"]
    assert (settings["llm"], settings["temperature"], settings["top_p"], settings["seed"]) == (
        str(tiny_world.llm),
        0.05,
        1.0,
        0,
    )
    assert found["skipped"] == []
    assert found["command"].startswith("generate_data.py --llm")
    assert found["git"]
    left = {file.name for file in straight.parent.iterdir()} - {
        "rows.jsonl.index"
    }  # whoever reads the rows leaves that
    assert left == {"rows.jsonl", "rows.jsonl.info.json"}, "something was left behind"


def test_finished_work_is_not_done_again(straight, tiny_world):
    before = straight.stat().st_mtime_ns
    done = script(*command(tiny_world, straight))
    assert done.status == 0
    assert "nothing to do" in done.out
    assert straight.stat().st_mtime_ns == before


# -- kills, processes ------------------------------------------------------------------------------


def test_killed_then_continued_by_two_processes_equals_straight(straight, tiny_world, tmp_path):
    """kill -9 after a block or two of twelve; other settings are then refused; the same ones go on,
    and do no finished block again.
    """
    out, parts = tmp_path / "rows.jsonl", tmp_path / "rows.jsonl.parts"
    process = start("tests/in_float32.py", *command(tiny_world, out, block=1))
    finished = lambda: sorted(parts.glob("0*.jsonl"))
    while not finished():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert 0 < len(finished()) < 12 and not out.exists(), "the job was over before the kill came"
    done = {file: file.stat().st_mtime_ns for file in finished()}
    for changes in ({"seed": 1}, {"temperature": 1.0}, {"limit": 4}):
        other = script(*command(tiny_world, out, block=1, **changes))
        assert other.status == 1
        assert other.err.splitlines()[-1].startswith(
            f"error: {parts} holds blocks made with other settings"
        )
    assert {file: file.stat().st_mtime_ns for file in finished()} == done
    first = finished()[0]
    write_jsonl(first, [row | {"dataset": "not done again"} for row in read_jsonl(first)])
    # --batch_size may change: it is what an error about memory says to lower
    torchrun(2, *command(tiny_world, out, block=1, batch_size=2))
    rows = read_jsonl(out)
    assert [row["dataset"] for row in rows].count("not done again") == 2, (
        "a finished block was made again"
    )
    assert [row | {"dataset": "tiny"} for row in rows] == read_jsonl(straight), (
        "rows are missing, double, or others than those of one go"
    )
    assert info(out)["counts"] == info(straight)["counts"]
    assert info(out)["world_size"] == 2
    assert not parts.exists()


# -- bad input -------------------------------------------------------------------------------------


def test_bad_clips_are_skipped_and_listed(straight, tiny_world, tmp_path, float32):
    data = tmp_path / "data"
    shutil.copytree(tiny_world.data / "clips", data / "clips")
    soundfile.write(data / "nan.wav", np.full(8000, np.nan), 16000, subtype="FLOAT")
    soundfile.write(data / "none.wav", np.zeros(0), 16000)
    (data / "empty.wav").touch()
    good = tiny_world.clips[0]
    bad = [
        (good | {"id": "clips/missing.wav"}, "no such readable file"),
        (good | {"id": "nan.wav"}, "NaN"),
        (good | {"id": "none.wav"}, "holds 0 samples"),
        (good | {"id": "empty.wav"}, "is empty (0 bytes)"),
        ('{"id": ', "is not JSON"),
        ({"id": "clips/00.wav"}, "has no domain, segments"),
        (good | {"domain": "smell"}, "no instructions for domain 'smell'"),
        (good | {"segments": [{"end": 1}]}, "start"),
        (good | {"segments": None}, "segments"),
    ]
    lines = [
        json.dumps(clip) if isinstance(clip, dict) else clip
        for clip in (good, *(clip for clip, _ in bad), tiny_world.clips[1])
    ]
    (tmp_path / "mixed.jsonl").write_text("\n".join(lines) + "\n")
    out = tmp_path / "rows.jsonl"
    done = script(*command(tiny_world, out, metadata=tmp_path / "mixed.jsonl", audio_root=data))
    assert done.status == 0 and "9 clips skipped" in done.out, done.err
    assert [row["messages"] for row in read_jsonl(out)] == [
        row["messages"] for row in read_jsonl(straight)[:4]
    ]
    assert info(out)["counts"]["rows"] == 4
    assert info(out)["counts"]["skipped"] == 9
    for number, (listed, (_, reason)) in enumerate(zip(info(out)["skipped"], bad, strict=True), 2):
        assert listed["id"] == f"row {number}"
        assert reason in listed["skipped"]


@pytest.mark.parametrize("change, message", [
    (["--llm", "nowhere"], "nowhere/.* is missing.*demo/prepare.py"),
    (["--whisper", "nowhere"], "nowhere.*demo/prepare.py"),
    (["--metadata", "nowhere.jsonl"], "nowhere.jsonl is missing.*demo/prepare.py"),
    (["--instructions", "nowhere"], "nowhere holds no instructions"),
    (["--temp", "0"], "unrecognized arguments: --temp 0"),
])  # fmt: skip
def test_what_a_user_can_get_wrong_is_one_clear_line(tiny_world, tmp_path, change, message):
    done = script(*command(tiny_world, tmp_path / "rows.jsonl"), *change)
    assert done.status != 0
    assert not (tmp_path / "rows.jsonl").exists()
    with pytest.raises(ValueError, match=rf"error: .*{message}"):
        raise ValueError(done.err.splitlines()[-1])
