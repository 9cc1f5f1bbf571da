"""generate_data.py with the answers of another engine, which a test plays; and with the next block
heard while the LLM answers this one.
"""

import json
import random
import threading
import time

import pytest
import torch
from conftest import flags, in_float32, read_jsonl, script, write_jsonl

import generate_data
from engine.rows import one_ahead, work_in_blocks


def command(world, out, **changes):
    settings = dict(
        metadata=world.data / "train.metadata.jsonl", instructions=world.instructions, out=out,
        per_clip=2, audio_seconds=3, max_new_tokens=16,
        keep_truncated=1, batch_size=4, block=3, temperature=0.0,
    )  # fmt: skip
    return ["generate_data.py", *world.models, *flags(**settings | changes)]


def info(out):
    return json.loads(out.with_name(out.name + ".info.json").read_text())


@pytest.fixture(scope="module")
def direct(tiny_world, tmp_path_factory):
    out = tmp_path_factory.mktemp("direct") / "rows.jsonl"
    with in_float32():
        assert script(*command(tiny_world, out)).status == 0
    return out


@pytest.fixture(scope="module")
def exported(tiny_world, tmp_path_factory):
    """The prompts, and what an engine makes of them: token ids with and without the stop id, more
    than was asked for, and text.
    """
    out = tmp_path_factory.mktemp("export") / "prompts.jsonl"
    done = script(*command(tiny_world, "unused.jsonl", export=out))
    assert done.status == 0 and "24 rows" in done.out, done.err
    llm, tokenizer = (
        generate_data.Llama.from_pretrained(tiny_world.llm),
        generate_data.Tokenizer(tiny_world.llm),
    )
    told, answers = info(out)["sampling"], []
    assert told == {
        "temperature": 0.0,
        "top_p": 1.0,
        "max_tokens": 16,
        "stop_token_ids": sorted(tokenizer.stop_ids),
    }
    for n, line in enumerate(read_jsonl(out)):
        limit = told["max_tokens"] + (
            9 if n % 4 == 0 else 0
        )  # only token ids can be cut again to the same length
        (ids,) = generate_data.generate(
            llm, [line["prompt_token_ids"]], limit, stop_ids=told["stop_token_ids"]
        )
        ended = ids[-1] in tokenizer.stop_ids
        answer = (
            {"token_ids": ids[:-1] if ended and n % 4 == 1 else ids}
            if n % 4 < 3
            else {"text": tokenizer.decode(ids)}
        )
        answers.append({"id": line["id"], "finish_reason": "stop" if ended else "length"} | answer)
    random.Random(0).shuffle(answers)
    return out, answers


def test_prompts_are_those_the_llm_reads(exported, direct, tiny_world):
    lines, rows = read_jsonl(exported[0]), read_jsonl(direct)
    assert len({line["id"] for line in lines}) == len(lines) == len(rows)
    tokenizer = generate_data.Tokenizer(tiny_world.llm)
    for line, row in zip(lines, rows):
        asked = f"<start_audio>{row['seed_description']}<end_audio>\n\n{row['prompt']}"
        text = tokenizer.apply_chat_template(
            [*row["messages"][:-1], {"role": "user", "content": asked}]
        )
        assert (
            line["prompt"]
            == text
            == tokenizer.decode(line["prompt_token_ids"], skip_special_tokens=False)
        )
        assert line["clip"] == row["id"]
    left = {file.name for file in exported[0].parent.iterdir()}
    assert left == {"prompts.jsonl", "prompts.jsonl.info.json"}
    assert "weights_sha256" not in info(exported[0])


@pytest.mark.parametrize("keep_truncated", [0, 1])
def test_answers_of_another_engine_give_the_same_rows(
    exported, direct, tiny_world, tmp_path, float32, keep_truncated
):
    """Also those that it cut where they ended by themselves later, and that it let grow longer than
    was asked for.
    """
    answers = write_jsonl(tmp_path / "answers.jsonl", exported[1])
    done = script(
        *command(
            tiny_world,
            out := tmp_path / "rows.jsonl",
            answers=answers,
            keep_truncated=keep_truncated,
        )
    )
    assert done.status == 0, done.err
    rows = [row for row in read_jsonl(direct) if keep_truncated or "truncated" not in row]
    assert 0 < sum("truncated" in row for row in read_jsonl(direct)) < 24
    assert read_jsonl(out) == rows
    assert info(out)["counts"]["rows"] == len(rows)
    assert info(out)["weights_sha256"] == info(direct)["weights_sha256"]


def test_missing_answers_are_an_error_and_finished_blocks_stay(
    exported, direct, tiny_world, tmp_path, float32
):
    lines, answers = read_jsonl(exported[0]), {answer["id"]: answer for answer in exported[1]}
    some = write_jsonl(
        tmp_path / "answers.jsonl", [answers[line["id"]] for line in lines[:9] + lines[11:]]
    )
    arguments = command(tiny_world, out := tmp_path / "rows.jsonl", answers=some)
    done = script(*arguments)
    assert done.status == 1
    assert done.err.splitlines()[-1].startswith(
        f"error: {some}: no answer to 2 of 6 prompts, first to {lines[9]['id']} ("
    )
    assert not out.exists()
    assert len(list(tmp_path.glob("rows.jsonl.parts/0*.jsonl"))) == 1
    write_jsonl(some, exported[1])
    assert script(*arguments).status == 0
    assert read_jsonl(out) == read_jsonl(direct)
    # answers to other prompts are none: another seed draws other instructions
    other = script(*command(tiny_world, tmp_path / "other.jsonl", answers=some, seed=1))
    assert other.status == 1
    assert "no answer to" in other.err
    both = script(*command(tiny_world, out, answers=some, export=tmp_path / "x"))
    assert both.status == 1
    assert "--export comes first" in both.err


def test_broken_answers_are_counted(exported, direct, tiny_world, tmp_path, float32):
    answers = [dict(answer) for answer in exported[1]]
    answers[0]["finish_reason"] = "content_filter"
    del answers[1]["finish_reason"]
    answers[2] = {"id": answers[2]["id"], "finish_reason": "stop"}
    file = write_jsonl(tmp_path / "answers.jsonl", answers)
    assert script(*command(tiny_world, out := tmp_path / "rows.jsonl", answers=file)).status == 0
    assert info(out)["counts"]["rows"] == 21
    assert info(out)["counts"]["skipped"] == 3
    assert all(row in read_jsonl(direct) for row in read_jsonl(out))
    assert {row["skipped"].split(" needs")[0] for row in info(out)["skipped"]} == {
        f"{file}, row {n}" for n in (1, 2, 3)
    }
    write_jsonl(file, [answers[3], {"text": "whose?"}])
    nameless = script(*command(tiny_world, tmp_path / "x.jsonl", answers=file))
    assert nameless.status == 1
    assert (
        nameless.err.splitlines()[-1]
        == f"error: {file}, row 2: each line needs the id of the exported prompt"
    )


# -- the next block, heard meanwhile ---------------------------------------------------------------


def test_hearing_ahead_gives_the_same_rows(direct, tiny_world, tmp_path, float32):
    done = script(*command(tiny_world, out := tmp_path / "rows.jsonl", ahead=1))
    assert done.status == 0 and read_jsonl(out) == read_jsonl(direct), done.err
    assert all(
        f"{what} " in done.out.splitlines()[1] for what in ("reading", "transcripts", "answers")
    )
    assert "while the LLM answered" in done.out


def test_the_next_block_is_prepared_meanwhile(tmp_path):
    """One ahead and no more; its errors come through; claimed blocks are others'."""
    log, main = [], threading.get_ident()

    def prepare(numbers):
        assert threading.get_ident() != main
        assert not torch.is_inference_mode_enabled()
        log.append(f"prepare {numbers.start}")
        if numbers.start == 6 and "fail" in log:
            raise ValueError("unreadable")
        return numbers

    def make(numbers):
        time.sleep(0.2)
        log.append(f"make {numbers.start}")
        return [{"n": n} for n in numbers]

    parts = work_in_blocks(8, 2, tmp_path / "a", {}, 0, 1, make, prepare)
    assert [row["n"] for part in parts for row in read_jsonl(part)] == list(range(8))
    assert log == [
        "prepare 0",
        "prepare 2",
        "make 0",
        "prepare 4",
        "make 2",
        "prepare 6",
        "make 4",
        "make 6",
    ]
    log[:] = ["fail"]
    with pytest.raises(ValueError, match="unreadable"):
        work_in_blocks(8, 2, tmp_path / "b", {}, 0, 1, make, prepare)
    assert len(list((tmp_path / "b").glob("*.jsonl"))) == 3, "what came before the error is kept"
    assert list(one_ahead(iter("abc"))) == list("abc")
