"""The five benchmarks end to end, as a user runs them: official files in, eval.py as a process, a
kill, judges, references, bad input.

Weights are random and small, so scores mean nothing here; `pytest -m slow` runs the real SmolLM2
and Whisper tiny.en.
"""

import json
import shutil
import time

import pytest
import torch
from conftest import flags, read_jsonl, script, start, write_jsonl

from benchmarks import common, mmau
from model import DeSTA, build_prompt, description_slot

SHORT = dict(block=1, max_new_tokens=6)
# task -> (tokens, system prompt): benchmarks.md. SAKURA and Dynamic-SUPERB name none; there it is
# DeSTA2.5-Audio's default.
OFFICIAL = {
    "mmau": (
        512,
        "Focus on the audio clips and instructions. "
        'Put your answer in the format "The correct answer is: "___" ".',
    ),
    "sakura": (512, "Focus on the audio clips and instructions."),
    "speech_ifeval": (2048, "Follow the given instructions."),
    "voicebench": (2048, "You are a voice assistant. Act as if you are a natural language partner"),
    "dynamic_superb": (512, "Focus on the audio clips and instructions."),
}
USER = {
    "mmau": '<|AUDIO|>\n\nWhat is heard? Choose from the following options: "noise", "a tone" or "both"',
    "sakura": "<|AUDIO|>\n\nWhich animal? (a) dog (b) cat",
    "speech_ifeval": "<|AUDIO|>\n\nSay what you hear in capitals.",
    "voicebench": "<|AUDIO|>",
    "dynamic_superb": "<|AUDIO|>\n\nWhat is said?",
}
JUDGED = ["sakura", "speech_ifeval", "voicebench", "dynamic_superb"]


@pytest.fixture(scope="module")
def files(tiny_world, tmp_path_factory):
    """The official files of every benchmark, a few rows each, and their clips. -> {task: {"data",
    "audio_root"}}
    """
    root = tmp_path_factory.mktemp("official")

    def clip(i, path):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(tiny_world.data / f"clips/{i:02d}.wav", root / path)
        return path

    def write(path, content):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(json.dumps(content))

    write("mmau/mini.json", [
        {"id": f"q{i}", "audio_id": "./" + clip(i,
            f"mmau/test-mini-audios/q{i}.wav").removeprefix("mmau/"), "question": "What is heard?",
         "choices": ["noise", "a tone", "both"], "answer": "noise", "dataset": "tiny",
         "task": ("speech", "sound", "music")[i % 3],
         "split": "test-mini", "category": "Perception", "sub-category": "Source",
         "difficulty": "easy", "description": f"(Pitch: {i})"}
        for i in range(6)
    ])  # fmt: skip
    for track, numbers in (("Animal", (0, 1)), ("Gender", (2,))):
        write(f"sakura/data/{track}/metadata.json", {
            clip(i, f"sakura/data/{track}/audio/{i}.wav").removeprefix("sakura/"): {
                "attribute_label": "dog", "single_instruction": "Which animal? (a) dog (b) cat",
                "single_answer": " (a) dog",
                "multi_instruction": "What does it do? (a) It barks. (b) It meows.",
                "multi_answer": "(a) It barks.",
            } for i in numbers
        })  # fmt: skip
    (root / "ifeval").mkdir()
    row = lambda i, metric, instruction, ids, kwargs: {
        "id": i, "audio_filepath": clip(i % 12,
            f"ifeval/audios/{i}.wav").removeprefix("ifeval/audios/"), "dataset": "tiny", "metric": metric,
        "textual_audio": f"[00:00:00 - 00:00:02] Hello {i}(Gender: Male)",
        "instruction": instruction, "instruction_id_list": ids, "kwargs": kwargs, "label": "x",
    }  # fmt: skip
    capitals = ("accuracy", "Say what you hear in capitals.", ["change_case:english_capital"], [{}])
    words = (
        "open",
        "Write fewer than nine words.",
        ["length_constraints:number_words"],
        [{"num_words": 9, "relation": "less than"}],
    )
    write_jsonl(root / "ifeval/closed_ended_questions.jsonl", [row(i, *capitals) for i in range(2)])
    write_jsonl(root / "ifeval/creative_writing.jsonl", [row(i, *words) for i in (934, 935)])
    write_jsonl(
        root / "ifeval/chain-of-thought.jsonl",
        [row(i, "cot", "Why? Think step by step.", [], []) for i in range(2)],
    )
    (root / "voice/data").mkdir(parents=True)
    spoken = lambda i, **fields: (
        {"audio": {"path": clip(i, f"voice/{i}.wav").removeprefix("voice/")}, "prompt": "Who?"}
        | fields
    )
    write_jsonl(root / "voice/data/alpacaeval_full.jsonl", [spoken(0), spoken(1)])
    write_jsonl(root / "voice/data/advbench.jsonl", [spoken(2)])
    write_jsonl(root / "voice/data/mmsu.jsonl", [spoken(3, reference="A")])
    write_jsonl(root / "voice/data/sd-qa.jsonl", [spoken(4, reference="Paris")])
    write_jsonl(
        root / "voice/data/ifeval.jsonl",
        [spoken(5, key=1, instruction_id_list=["punctuation:no_comma"], kwargs=[{}])],
    )
    write(
        "superb/ASR/metadata.json",
        {
            f"{i}.wav": {
                "file": clip(i, f"superb/ASR/{i}.wav").split("/")[-1],
                "instruction": "What is said?",
                "label": "one",
            }
            for i in range(3)
        },
    )
    write(
        "superb/Same/metadata.json",
        {
            "a.wav": {
                "file": clip(3, "superb/Same/a.wav")[12:],
                "file2": clip(4, "superb/Same/b.wav")[12:],
                "instruction": "Same?",
                "label": "No",
            }
        },
    )
    return {
        "mmau": dict(data=root / "mmau/mini.json", audio_root=root / "mmau"),
        "sakura": dict(data=root / "sakura/data", audio_root=root / "sakura"),
        "speech_ifeval": dict(data=root / "ifeval", audio_root=root / "ifeval/audios"),
        "voicebench": dict(data=root / "voice/data", audio_root=root / "voice"),
        "dynamic_superb": dict(data=root / "superb", audio_root=root / "superb"),
    }


def folders(tmp_path_factory, llm, whisper):
    """The demo's model with an adapter of random weights, as flags."""
    torch.manual_seed(0)
    adapter = tmp_path_factory.mktemp("adapter")
    DeSTA.from_pretrained(
        llm, whisper, device="cpu", n_layers=1, n_queries=4, audio_seconds=3
    ).save_adapter(adapter)
    return dict(llm=llm, whisper=whisper, adapter=adapter)


@pytest.fixture(scope="module")
def tiny(tiny_world, tmp_path_factory):
    return folders(tmp_path_factory, tiny_world.llm, tiny_world.whisper)


@pytest.fixture(scope="module")
def real(smollm2_folder, tiny_en_folder, tmp_path_factory):
    return folders(tmp_path_factory, smollm2_folder, tiny_en_folder)


def evaluate(task, files, models, out, **changes):
    return ["eval.py", "--task", task, *flags(**files[task] | models | dict(out=out) | changes)]


@pytest.fixture(scope="module")
def runs(files, tiny, tmp_path_factory):
    """Each benchmark once, uninterrupted, with its own prompts. -> {task: (predictions file, what
    was printed)}
    """
    done = {}
    for task in OFFICIAL:
        out = tmp_path_factory.mktemp("straight") / "predictions.jsonl"
        ran = script(*evaluate(task, files, tiny, out, max_new_tokens=6))
        assert ran.status == 0, ran.err
        done[task] = (out, ran.out)
    return done


# -- the whole run, and a kill in its middle -------------------------------------------------------


def killed_and_continued(task, files, models, folder, again):
    """Start eval.py, SIGKILL it half-way, continue with `again`; beside it an uninterrupted run of
    the same command.
    """
    out, straight = folder / "killed.jsonl", folder / "straight.jsonl"
    process = start(*evaluate(task, files, models, out, **SHORT))
    while len(finished := list(folder.glob("killed.jsonl.parts/0*.jsonl"))) < 2:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.002)
    process.kill()
    process.wait()
    kept = {file: file.read_bytes() for file in finished}
    assert not out.exists(), "the job was over before the kill came"
    said = again(*evaluate(task, files, models, out, **SHORT))
    done = script(*evaluate(task, files, models, straight, **SHORT))
    assert out.read_bytes() == straight.read_bytes()
    assert len(read_jsonl(out)) > len(kept)
    assert said.splitlines()[-1] == done.out.splitlines()[-1]
    assert json.loads(said.splitlines()[-1])["n"] > 0
    dumped = [sorted((file.name.removeprefix(name),
        file.read_bytes()) for file in [*folder.glob(f"{name}.official"),
        *folder.glob(f"{name}.official/*")] if file.is_file())
              for name in ("killed.jsonl", "straight.jsonl")]  # fmt: skip
    assert dumped[0] == dumped[1]
    assert bool(dumped[0]) == (task in ("mmau", "sakura", "dynamic_superb"))


@pytest.mark.parametrize("task", OFFICIAL)
def test_killed_and_continued_equals_straight(task, files, tiny, tmp_path):
    killed_and_continued(task, files, tiny, tmp_path, lambda *command: script(*command).out)


@pytest.mark.slow
@pytest.mark.parametrize("task", OFFICIAL)
def test_killed_and_continued_equals_straight_with_the_demo_model(task, files, real, tmp_path):
    killed_and_continued(
        task, files, real, tmp_path, lambda *command: start(*command).communicate()[0]
    )


@pytest.mark.parametrize("task", OFFICIAL)
def test_official_prompt_and_decoding_are_the_default_and_printed(
    task, runs, files, tiny, tmp_path
):
    out, said = runs[task]
    tokens, system = OFFICIAL[task]
    n = len(read_jsonl(out))
    assert (
        f"{task}: {n} rows, at most 6 new tokens, greedy; first prompt:\n"
        f"  system: {system}\n  user: {USER[task]}\n" in said
    )
    one = start(
        *evaluate(task, files, tiny, tmp_path / "p.jsonl", limit=1)
    )  # all defaults: only its header is waited for
    header = next((line for line in one.stdout if line.startswith(f"{task}: ")), "")
    one.kill()
    one.wait()
    assert header.startswith(f"{task}: 1 rows, at most {tokens} new tokens, greedy")
    assert (
        json.loads(out.with_name("predictions.jsonl.info.json").read_text())["settings"][
            "temperature"
        ]
        == 0.0
    )


def test_prompt_and_decoding_can_be_overridden(files, tiny, tmp_path):
    changes = dict(system="Guess.", temperature=0.7, top_p=0.9, limit=2, **SHORT)
    done = script(*evaluate("sakura", files, tiny, tmp_path / "p.jsonl", **changes))
    assert (
        "sakura: 2 rows, at most 6 new tokens, temperature 0.7, top-p 0.9; first prompt:\n  system: Guess.\n"
        in done.out
    )
    examples = [
        {"role": "system", "content": "Guess."},
        {"role": "user", "content": "A bark. Which animal?"},
        {"role": "assistant", "content": "(a) dog"},
    ]
    (tmp_path / "examples.json").write_text(json.dumps(examples))
    done = script(
        *evaluate(
            "sakura",
            files,
            tiny,
            tmp_path / "q.jsonl",
            system=tmp_path / "examples.json",
            limit=1,
            **SHORT,
        )
    )
    assert (
        f"  system: Guess.\n  user: A bark. Which animal?\n  assistant: (a) dog\n  user: {USER['sakura']}\n"
        in done.out
    )


# -- without audio, with reasoning -----------------------------------------------------------------


def test_text_only_needs_neither_whisper_nor_adapter(files, tiny_world, tmp_path, runs):
    nowhere = dict(
        llm=tiny_world.llm,
        whisper=tmp_path / "none",
        adapter=tmp_path / "none",
        text_only=1,
        max_new_tokens=6,
    )
    backbone = DeSTA.from_pretrained(tiny_world.llm, None)
    out = tmp_path / "ifeval.jsonl"
    done = script(*evaluate("speech_ifeval", files, nowhere, out, audio_root=tmp_path / "none"))
    assert done.status == 0, done.err
    rows = read_jsonl(out)
    assert (
        rows[0]["messages"][1]["content"]
        == "Speech Input: [00:00:00 - 00:00:02] Hello 0(Gender: Male)\n\nSay what you hear in capitals."
    )
    assert [row["response"] for row in rows] == backbone.generate(
        [row["messages"] for row in rows], 6, batch_size=32
    )
    assert json.loads(out.with_name("ifeval.jsonl.info.json").read_text())["adapter_sha256"] is None

    out = tmp_path / "mmau.jsonl"
    done = script(*evaluate("mmau", files, nowhere, out))
    assert done.status == 0 and done.out.splitlines()[1:3] == runs["mmau"][1].splitlines()[1:3], (
        "the same prompt, the slot filled with words"
    )
    rows = mmau.load(**{"path": files["mmau"]["data"], "audio_root": "none", "text_only": True})
    for row in rows:
        assert row["description"] in backbone.tokenizer.decode(
            build_prompt(backbone.tokenizer, row["messages"], description_slot(backbone.tokenizer))
        )
    # All together as eval.py does it: in bf16 two tokens may be so close that the company of other
    # rows decides.
    assert [row["model_output"] for row in read_jsonl(out)] == backbone.generate(
        [row["messages"] for row in rows], 6, batch_size=32
    )


@pytest.mark.parametrize("task", ["sakura", "voicebench", "dynamic_superb", "heldout"])
def test_text_only_where_there_is_no_text(task, files, tiny, tmp_path):
    done = script(*evaluate(task, files | {"heldout": {}}, tiny, tmp_path / "p.jsonl", text_only=1))
    assert done.status == 1
    assert done.err.splitlines()[-1] == f"error: --task {task} takes no text_only"


def test_scores_with_and_without_reasoning_side_by_side(files, tiny, runs, tmp_path):
    out = tmp_path / "cot.jsonl"
    done = script(*evaluate("mmau", files, tiny, out, cot=1, max_new_tokens=6))
    assert done.status == 0
    assert OFFICIAL["mmau"][1] + common.COT in done.out
    plain = runs["mmau"][0]
    for file, answers in ((plain, ["noise"] * 3 + ["a tone"] * 3), (out, ["noise"] * 6)):
        write_jsonl(
            file.with_name("said.jsonl"),
            [row | {"model_prediction": said} for row, said in zip(read_jsonl(file), answers)],
        )
    both = script(
        "eval.py",
        "--task",
        "mmau",
        "--score",
        f"{plain.with_name('said.jsonl')},{tmp_path / 'said.jsonl'}",
    )
    assert both.status == 0, both.err
    summary = json.loads(both.out.splitlines()[-1])
    assert [scores["total"] for scores in summary.values()] == [50.0, 100.0]
    assert list(summary) == [
        str(plain.with_name("said.jsonl")),
        str(tmp_path / "said.jsonl"),
    ]
    lines = [line.split() for line in both.out.splitlines()]
    assert ["accuracy", "50.0", "100.0"] in lines
    assert ["total", "33.33", "33.33"] in lines  # chance, of three choices


# -- questions about the demo's clips --------------------------------------------------------------


def test_questions_made_from_labels(tiny_world, tmp_path):
    done = script(
        "demo/mmau.py",
        "--metadata",
        tiny_world.data / "test.metadata.jsonl",
        "--out",
        tmp_path / "mmau.json",
    )
    assert done.status == 0
    assert "6 questions" in done.out
    rows = mmau.load(tmp_path / "mmau.json", tiny_world.data, text_only=True)
    labels = {clip["id"]: clip["segments"][0]["attributes"] for clip in tiny_world.clips}
    for row in rows:
        assert row["answer"] == labels[row["audio_id"]][row["sub-category"]]
        assert row["choices"].count(row["answer"]) == 1
        assert 2 <= len(row["choices"]) == len(set(row["choices"])) <= 4
        assert row["answer"] in row["description"]
        assert row["sub-category"].lower() in row["question"]
    said = [mmau.with_answer(row, f'The correct answer is: "{row["answer"]}".') for row in rows]
    scores = mmau.score(said)
    assert scores["total"] == {"accuracy": 100.0, "correct": 6, "n": 6}
    assert scores["chance"] == {
        "total": 50.0,
        "sound": 50.0,
        "music": 50.0,
        "speech": 50.0,
    }
    again = script(
        "demo/mmau.py",
        "--metadata",
        tiny_world.data / "test.metadata.jsonl",
        "--out",
        tmp_path / "again.json",
    )
    assert again.status == 0
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "mmau.json").read_bytes()
    missing = script(
        "demo/mmau.py", "--metadata", tmp_path / "no.jsonl", "--out", tmp_path / "x.json"
    )
    assert missing.status == 1
    assert "demo/prepare.py" in missing.err
    assert not (tmp_path / "x.json").exists()


# -- judges ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", JUDGED)
def test_a_local_judge_is_named_and_marked(task, runs, tiny_world):
    out, said = runs[task]
    alone, judged = (
        json.loads(said.splitlines()[-1]),
        script("eval.py", *flags(task=task, score=out, judge=tiny_world.llm)),
    )
    assert judged.status == 0, judged.err
    summary = json.loads(judged.out.splitlines()[-1])
    part = summary["cot"] if task == "speech_ifeval" else summary
    assert part["judge"] == tiny_world.llm.name
    assert part["proxy"] is True
    # random weights never say "Judgement: correct" or "Result: YES": everything is unparsed,
    # counted, and no point is given
    lines = [line.split() for line in judged.out.splitlines()]
    counted = [int(line[1]) for line in lines if line[:1] == ["unparsed"] and "." not in line[1]]
    assert (
        sum(counted)
        == {"sakura": 6, "speech_ifeval": 2, "voicebench": 3, "dynamic_superb": 4}[task]
    )
    assert "judge" not in json.dumps(alone)
    assert task == "dynamic_superb" or alone.get("cot", alone)["proxy"] is True
    offline = {
        "sakura": "exactly one option named",
        "speech_ifeval": "more_than_one_sentence",
        "voicebench": "reference_in_answer",
        "dynamic_superb": "consecutive_words",
    }
    assert offline[task] in said, "the offline stand-in goes by its own name"


def test_rules_need_no_judge(runs, tiny_world):
    done = script("eval.py", *flags(task="mmau", score=runs["mmau"][0], judge=tiny_world.llm))
    assert done.status == 1
    assert (
        done.err.splitlines()[-1]
        == "error: --task mmau is scored by rules alone: it takes no --judge"
    )


def test_judgements_made_elsewhere(runs, tmp_path):
    """Files as the official judge scripts leave them (GPT-4o, GPT-4o-mini, Llama-3.1-8B) are read,
    and are no proxies.
    """
    last_line = lambda **settings: json.loads(
        script("eval.py", *flags(**settings)).out.splitlines()[-1]
    )
    official = runs["sakura"][0].with_name("predictions.jsonl.official")
    for file in sorted(official.glob("*.json")):
        results = json.loads(file.read_text())["results"]
        verdict = "correct" if "single" in file.name else "No extracted judgement"
        judged = {
            wav: entry | {"Explanation": "x", "Judgement": verdict}
            for wav, entry in results.items()
        }
        (tmp_path / "sakura").mkdir(exist_ok=True)
        (tmp_path / f"sakura/{file.stem}_judgements.json").write_text(
            json.dumps({"judge_model": "gpt-4o-2024-11-20", "temperature": 0, "results": judged})
        )
    assert last_line(task="sakura", score=tmp_path / "sakura") == {
        "single": 100.0,
        "multi": 0.0,
        "n": 6,
        "judge": "gpt-4o-2024-11-20",
        "proxy": False,
    }

    rows = [row for row in read_jsonl(runs["speech_ifeval"][0]) if row["metric"] == "cot"]
    judged = [
        row | {"eval_response": said}
        for row, said in zip(rows, ("It explains. Result: YES", "Result: NO"))
    ]
    assert last_line(task="speech_ifeval", score=write_jsonl(tmp_path / "cot.jsonl", judged))["cot"] == {
        "judge": "read from the file", "followed": 1, "n": 2, "rate": 50.0, "unparsed": 0,
    }  # fmt: skip

    rows = [
        row | {"score": ["4", "[[5]]", "?"]}
        for row in read_jsonl(runs["voicebench"][0])
        if row["subset"] == "alpacaeval_full"
    ]
    scores = last_line(task="voicebench", score=write_jsonl(tmp_path / "voice.jsonl", rows))
    assert scores == {
        "alpacaeval_full": 90.0,
        "overall": None,
        "n": 2,
        "judge": "read from the file",
    }

    superb = runs["dynamic_superb"][0].with_name("predictions.jsonl.official") / "ASR.json"
    entries = {
        wav: entry | {"evaluation_response": f"Fine.\nResult:{said}"}
        for (wav, entry), said in zip(json.loads(superb.read_text()).items(), (" YES", "no", " ?"))
    }
    (tmp_path / "ASR.json").write_text(json.dumps(entries))
    scores = last_line(task="dynamic_superb", score=tmp_path / "ASR.json")
    assert scores["judge_yes"] == 33.33
    assert scores["judge"] == "read from the file"
    assert "proxy" not in scores


@pytest.mark.slow
def test_smollm2_as_judge(runs, smollm2_folder):
    for task in JUDGED:
        done = script("eval.py", *flags(task=task, score=runs[task][0], judge=smollm2_folder))
        assert done.status == 0, done.err
        summary = json.loads(done.out.splitlines()[-1])
        part = summary["cot"] if task == "speech_ifeval" else summary
        assert part["judge"] == "smollm2-135m-instruct" and part["proxy"] is True, task


# -- what goes wrong, in a process of its own ------------------------------------------------------


def fails(*command):
    process = start(*command)
    said = process.communicate()[0]
    assert process.returncode == 1
    assert "Traceback" not in said
    return said.splitlines()[-1]


def test_missing_audio_is_counted(files, tiny, tmp_path):
    rows = json.loads(files["mmau"]["data"].read_text())
    rows[4]["audio_id"] = "./test-mini-audios/gone.wav"
    (tmp_path / "mini.json").write_text(json.dumps(rows))
    command = evaluate(
        "mmau", files, tiny, tmp_path / "p.jsonl", data=tmp_path / "mini.json", **SHORT
    )
    said = fails(*command)
    assert said.startswith("error: 1 of 6 rows lack their audio under")
    assert "first: row q4, test-mini-audios/gone.wav" in said
    assert "skip_missing" in said
    assert not (tmp_path / "p.jsonl").exists()
    done = script(*command, "--options", '{"skip_missing": true}')
    assert done.status == 0
    assert "warning: 1 of 6 rows lack their audio" in done.err
    assert json.loads(done.out.splitlines()[-1])["n"] == 5


def test_unknown_track(files, tiny, tmp_path):
    shutil.copytree(files["sakura"]["data"] / "Animal", tmp_path / "data/Smell")
    said = fails(*evaluate("sakura", files, tiny, tmp_path / "p.jsonl", data=tmp_path / "data"))
    assert said.endswith("unknown track 'Smell', expected one of Animal, Emotion, Gender, Language")


# task -> (what a row loses, what it is called then)
WITHOUT = {
    "mmau": (("model_prediction", "no_prediction"), ("answer", "no_answer")),
    "sakura": (("response", "no_response_or_label"), ("label", "no_response_or_label")),
    "speech_ifeval": (("response", "no_response"),),
    "voicebench": (("response", "no_response"),),
    "dynamic_superb": (
        ("sllm_response", "no_response_or_label"),
        ("label", "no_response_or_label"),
    ),
}


@pytest.mark.parametrize("task", OFFICIAL)
def test_rows_without_an_answer_and_rows_of_other_labels_are_counted_not_scored(
    task, runs, files, tmp_path
):
    rows = read_jsonl(runs[task][0])
    for key, name in WITHOUT[task]:
        lacking = [rows[0] | {key: None}, *rows[1:]]
        done = script(
            "eval.py", *flags(task=task, score=write_jsonl(tmp_path / "p.jsonl", lacking))
        )
        assert (
            done.status == 0
            and [name, "1"] in [line.split() for line in done.out.splitlines()]
            and "not scored" in done.err
        ), key
    question = {"mmau": "question", "voicebench": "prompt"}.get(task, "instruction")
    other = [rows[0] | {question: "Another question?"}, *rows[1:-1]]
    done = script(
        "eval.py",
        *flags(task=task, score=write_jsonl(tmp_path / "p.jsonl", other), data=files[task]["data"]),
    )
    assert done.status == 0, done.err
    lines = [line.split() for line in done.out.splitlines()]
    assert ["other_revision", "1"] in lines
    assert ["not_predicted", "1"] in lines
    assert "belong to another label revision" in done.err


def test_another_label_revision_as_a_process(runs, files, tmp_path):
    rows = [
        row | {"answer": "both"} for row in read_jsonl(runs["mmau"][0])
    ]  # every label was changed
    said = fails(
        "eval.py",
        *flags(
            task="mmau", score=write_jsonl(tmp_path / "p.jsonl", rows), data=files["mmau"]["data"]
        ),
    )
    assert said.startswith("error: nothing to score: {'other_revision': 6,")
