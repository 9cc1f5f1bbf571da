"""tools/experiments.py: the table of runs, going on, what predictions say, tables; and what
train.py and generate_data.py got for it.
"""

import json
import math
import sys

import pytest
import torch
from conftest import ROOT, flags, read_jsonl, script, write_jsonl

import train
from engine import fast
from model import DeSTA
from qformer import QFormer, QFormerConfig

sys.path.insert(0, str(ROOT / "tools"))
import experiment_tables as tables  # noqa: E402
import experiments as ex  # noqa: E402

# -- the table of runs -----------------------------------------------------------------------------


def test_runs_are_those_of_the_claims():
    runs = list(ex.all_runs())
    arms = lambda claim: {
        (run.llm, run.targets, *sorted(run.train.items())): 0 for run in runs if run.claim == claim
    }
    targets = lambda claim, llm: {
        run.targets for run in runs if run.claim == claim and run.llm == llm
    }
    assert [claim for claim in dict.fromkeys(run.claim for run in runs)] == [1, 2, 6, 3, 4, 5]
    assert targets(1, ex.SMOLLM2) == {"self", "qwen", "labels", "self_t1"}
    assert targets(1, ex.QWEN) == {"self", "qwen"}
    assert len(runs) == 3 * len(ex.RUNS), "three seeds"
    assert len(arms(2)) == 6
    assert targets(2, ex.SMOLLM2) == {"self", "labels"}
    assert {run.train.get("lora_rank", 0) for run in runs if run.claim == 2} == {0, 16}
    assert targets(6, ex.SMOLLM2) == {"self", "one_instruction", "no_instruction"}
    assert targets(3, ex.SMOLLM2) == {"self", "no_speech", "no_sound", "no_music"}
    assert {run.train.get("n_queries", 16) for run in runs if run.claim == 4} == {8, 16, 32}
    assert any(run.train.get("n_taps") == 1 for run in runs)
    assert {run.llm for run in runs if {"mmau", "cot"} <= set(run.tests)} == {ex.SMOLLM2, ex.QWEN}


def test_the_table_is_well_formed():
    runs = list(ex.all_runs())
    settings = train.Settings.__dataclass_fields__
    tests = {
        "targets",
        "seen",
        "new",
        "vectors",
        "obey",
        "text",
        "mmau",
        "cot",
        "mmau_text",
        "cot_text",
    }
    for run in runs:
        assert run.targets in ex.TARGETS
        assert set(run.tests) <= tests
        assert set(run.train) <= set(settings)
        assert (run.train | ex.TRAIN)["max_steps"] <= 300, "no run over 15 minutes"
    assert len({(run.claim, run.name, run.seed) for run in runs}) == len(runs)
    assert set(ex.TRAIN) <= set(settings)
    assert set(tables.COLUMNS) == set(ex.ORDER)
    # what several claims share is one run
    assert (
        len({run.key for run in runs})
        == len({(run.llm, run.targets, str(sorted(run.train.items())), run.seed) for run in runs})
        < len(runs)
    )
    for claim, columns in tables.COLUMNS.items():
        for run in (run for run in runs if run.claim == claim):
            assert {test for _, test, _ in columns} <= set(run.tests), run


def test_instructions_and_classes_are_held_out():
    lines = [f"{i}?" for i in range(20)]
    pool, new = ex.INSTRUCTIONS["pool"](lines), ex.INSTRUCTIONS["new"](lines)
    assert sorted(pool + new) == sorted(lines)
    assert len(new) == 6
    assert len(ex.INSTRUCTIONS["one"](lines)) == 1
    assert ex.INSTRUCTIONS["none"](lines) == []
    assert ex.is_new("Sound", "dog barking")
    assert not ex.is_new("Sound", "rain")
    assert not ex.is_new("Volume", "violin")


def test_label_templates():
    row = {
        "seed_description": "[00:00-00:02] Ja (so). (Gender: female, Speaking rate: slow)",
        "prompt": "?",
        "response": "x",
        "truncated": True,
    }
    assert ex.template(row) == {
        "seed_description": row["seed_description"],
        "prompt": "?",
        "response": "The gender is female. The speaking rate is slow.",
    }
    assert ex.without("speech")({"dataset": "demo-speech"}) is None
    assert ex.without("speech")({"dataset": "demo-music"})


# -- doing them ------------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A workplace whose tests take no time. .asked: the tests that were made."""
    monkeypatch.chdir(tmp_path)
    place = ex.Workplace()
    place.asked = []

    def test(run, name):
        place.asked.append((run.key, name))
        folder = place.out / run.key
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "run.json").write_text(json.dumps({"git": "abc"}))
        write_jsonl(
            folder / "log.jsonl",
            [{"step": 0, "tap_weights": [[0.5, 0.5]]}, {"step": 1, "loss": 1.0}],
        )
        if run.targets == "qwen":
            raise ValueError("no weights")
        return {"figure": [1, 0]}

    monkeypatch.setattr(place, "test", test)
    return place


def test_a_second_run_does_what_is_missing(place):
    runs = [run for run in ex.all_runs([1, 2]) if run.llm == ex.SMOLLM2]
    failing = [run for run in runs if run.targets == "qwen"]
    assert place.do_all(runs, -1, 2) == len(failing) == 3
    lines = place.results()
    assert len(lines) == len(runs) - 3
    assert {line["claim"] for line in lines} == {1, 2}
    one = lines[0]
    assert one["commit"] == "abc"
    assert one["tap_weights"] == {"0": [[0.5, 0.5]]}
    assert one["train"]["max_steps"] == 300
    assert one["results"] == {test: {"figure": [1, 0]} for test in ex.STANDARD}
    # what claim 1 had found of the same training was not asked again
    assert len(place.asked) == len(set(place.asked))
    assert {name for key, name in place.asked if key == "smollm2-self-max_steps_300-seed_0"} == {
        *ex.STANDARD,
        "text",
    }
    place.asked.clear()
    assert place.do_all(runs, -1, 1) == 3
    assert len(place.results()) == len(lines)
    assert {key for key, _ in place.asked} == {run.key for run in failing}
    # a kill tore the last line: its run is done again, on a line of its own
    file = place.file(1)
    file.write_text(file.read_text()[:-9])
    assert len(place.results()) == len(lines) - 1
    place.do_all(runs, -1, 1)
    assert len(place.results()) == len(lines)
    assert {(line["claim"], line["name"], line["seed"]) for line in place.results()} == {
        (line["claim"], line["name"], line["seed"]) for line in lines
    }


def test_no_run_begins_after_the_minutes(place):
    assert place.do_all(list(ex.all_runs([6])), 0, 2) == 0
    assert place.results() == []
    assert place.asked == []


def test_files_are_made_once(tmp_path):
    place, made = ex.Workplace(), []
    make = lambda path: (made.append(path), path.write_text("x"))
    assert (
        place.once(tmp_path / "a/b", make) == place.once(tmp_path / "a/b", make) == tmp_path / "a/b"
    )
    assert len(made) == 1


def test_a_failing_script_is_told_of(tmp_path):
    with pytest.raises(ValueError, match="train.py ended with status 1, see .*log: error: nowhere"):
        ex.Workplace().call(
            tmp_path / "log",
            "train.py",
            data="x.jsonl",
            llm="nowhere",
            out=tmp_path / "out",
            standardize=0,
        )


def test_wrong_commands(tmp_path):
    for arguments, said in (
        (["sing"], "neither run nor tables"),
        (["run", "--claims", "7"], "some of 1 to 6"),
        (["run", "--claims", "1,x"], "some of 1 to 6"),
    ):
        done = script("tools/experiments.py", *arguments)
        assert done.status == 1
        assert said in done.err


@pytest.mark.slow
def test_quick(tmp_path, monkeypatch, smollm2_folder, tiny_en_folder):
    """Two arms from clips to lines, with the real scripts and small models."""
    done = script(
        "demo/prepare.py", *flags(models="", data_dir=tmp_path / "clips", n_train=27, n_test=9)
    )
    assert done.status == 0, done.err
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").symlink_to(ROOT / "weights")
    done = script("tools/experiments.py", "run", "--quick", "1", "--clips", "clips")
    assert done.status == 0, done.err
    lines = read_jsonl(tmp_path / "out/experiments.quick/claim1.jsonl")
    assert sorted(line["name"] for line in lines) == ["SmolLM2: label templates", "SmolLM2: own"]
    for line in lines:
        assert set(line["results"]) == set(ex.STANDARD)
        assert line["tap_weights"]
        assert set(line["results"]["obey"]) == {"description", "sound", "delta"}
    again = script("tools/experiments.py", "run", "--quick", "1", "--clips", "clips")
    assert again.status == 0
    assert "0 runs to do, 2 done" in again.out


# -- what predictions say --------------------------------------------------------------------------


def predicted(domain, attributes, right, text):
    return {
        "domain": domain,
        "attributes": attributes,
        "answers": {"right": right, "text": text, "wrong": ""},
        "loss": {"right": 8.0},
        "target_tokens": 4,
    }


def test_naming():
    rows = [
        predicted("sound", {"Sound": "rain", "Volume": "loud"}, "loud rain", "rain"),
        predicted(
            "sound",
            {"Sound": "dog barking", "Volume": "quiet"},
            "loud dogs barking",
            "a dog barking",
        ),
        predicted("music", {"Instrument": "piano"}, "an organ", "a piano"),
        predicted("music", {"Instrument": "violin"}, "a piano", "a violin"),
    ]
    found = ex.naming(rows)
    assert found["right"] == [1, 0]
    assert found["text"] == [0.5, 1]
    assert found["wrong"] == [0, 0]
    assert found["right, new class"] == [1, 0]
    assert found["text, new class"] == [1, 1]
    assert found["right, sound"] == [1]
    assert found["right, music"] == [0]
    assert found["right, speech"] == []
    assert found["chance"] == [0.5, 1], "the answers to the other clips of the domain"
    more = [*rows, predicted("sound", {"Sound": "rain", "Volume": "quiet"}, "rain", "")]
    assert ex.naming(more)["chance"] == [0.5, 0.25, 1], "their mean"
    assert found["loss right"] == 2
    rows = [row | {"loss": {"description": 4 * math.log(3)}} for row in rows]
    assert ex.target_figures(rows) == {
        "perplexity": pytest.approx(3),
        "names": pytest.approx(3 / 4),
        "tokens": 4,
    }


def test_obeyed_and_chosen():
    rule = {"kind": "x", "instruction_id_list": ["change_case:english_lowercase"], "kwargs": [{}]}
    rows = [
        rule | {"instruction": asked, "answers": {"description": "yes", "sound": said}}
        for asked, said in [("in small letters", "no"), ("small", "NO"), ("in small letters", "")]
    ]
    found = ex.obeyed(rows)
    assert found.pop("unasked") == [0, 0], "one kind alone"
    assert found == {"description": [1, 1], "sound": [0.5, 0], "delta": [-0.5, -1]}
    rows = [
        {"choices": ["low", "high"], "answer": "low", "model_prediction": said}
        for said in ("It is low.", "high", "neither")
    ]
    assert ex.chosen(rows) == {"accuracy": [1, 0, 0], "parsed": [1, 1, 0], "chance": 0.5}


# -- tables ----------------------------------------------------------------------------------------


def line(name, seed, right, llm=ex.SMOLLM2, claim=1):
    results = {
        "seen": {"right": right, "text": [1] * 40}, "targets": {"perplexity": 1.5, "names": 0.7},
        "obey": {"sound": [1, 0] * 20, "description": [1] * 40, "delta": [0, -1] * 20},
    }  # fmt: skip
    weights = {"0": [[0.25] * 4] * 3, "50": [[0.1, 0.2, 0.3, 0.4]] * 3}
    [key] = [run.key for run in ex.all_runs([claim]) if (run.name, run.seed) == (name, seed)]
    return dict(
        claim=claim, name=name, seed=seed, llm=llm, key=key, results=results, tap_weights=weights
    )


def test_tables_and_figures(tmp_path):
    lines = [line("SmolLM2: by Qwen", seed, [0.25, 0.5, 0, 0.25] * 10) for seed in range(2)]
    lines += [line("SmolLM2: own", seed, [0.75, 1, 0.5, 0.75] * 10) for seed in range(3)]
    lines.append(line("SmolLM2: by Qwen", 2, [1, 1, 1, 1] * 10) | {"key": "of other settings"})
    lines += [
        line("SmolLM2: own, T 1", 0, [0.75, 1, 0.75, 0.5] * 10),
        line("Qwen: own", 0, [1, 0, 0, 1] * 10, llm=ex.QWEN),
    ]
    page = tmp_path / "experiments.md"
    page.write_text(
        "".join(f"text {claim}\n<!-- table {claim} -->\nold\n<!-- end -->\n" for claim in ex.ORDER)
    )
    tables.write(lines, page, tmp_path)
    text = page.read_text()
    assert "old" not in text
    assert text.count("Not run yet.") == 5
    assert all(f"text {claim}\n" in text for claim in ex.ORDER)
    rows = [row.split(" | ") for row in text.split("<!-- table 1 -->\n")[1].split("\n")[:6]]
    assert [row[0] for row in rows[2:]] == [
        "| SmolLM2: own",
        "| SmolLM2: by Qwen",
        "| SmolLM2: own, T 1",
        "| Qwen: own",
    ], "the order of the runs' table"
    named = [row[2] for row in rows[2:]]
    assert named[0].startswith("0.750 (0.6")
    assert "<br>" not in named[0]
    assert named[1].startswith("0.250 (0.") and "<br>-0.500 (-0.500 to -0.500)" in named[1], (
        "paired by clip"
    )
    assert "<br>none (" in named[2] and "<br>" not in named[3], "compared within a backbone"
    assert rows[2][1] == "3"
    assert rows[2][5] == "1.500"
    assert rows[2][4].startswith("-0.500 (-0.")
    assert all(
        "</svg>" in (tmp_path / name).read_text()
        for name in ("experiments.claim1.svg", "experiments.taps.svg")
    )
    tables.write(lines, page, tmp_path)
    assert page.read_text() == text
    page.write_text("no marks")
    with pytest.raises(ValueError, match="marks of table 1"):
        tables.write(lines, page, tmp_path)


def test_the_page_holds_all_tables():
    text = (ROOT / "docs/experiments.md").read_text(encoding="utf-8")
    assert all(text.count(f"<!-- table {claim} -->\n") == 1 for claim in ex.ORDER)
    assert text.count("<!-- end -->") == 6


def test_intervals_cover_clips_and_seeds():
    import numpy as np

    random = np.random.default_rng(0)
    values = random.integers(0, 2, (3, 150)).astype(float)
    low, high = tables.interval(tables.draws(values, "a"))
    expected = 1.96 * values.mean(0).std() / 150**0.5  # of the clips alone
    assert low < values.mean() < high
    assert 0.8 * expected < (high - low) / 2 < 2 * expected
    apart = values + [[0.0], [0.3], [0.6]]
    low_apart, high_apart = tables.interval(tables.draws(apart, "a"))
    assert high_apart - low_apart > 1.3 * (high - low), "seeds that differ widen it"
    same = values[:1].repeat(3, 0)  # what a frozen LLM answers to the description
    assert "<br>" in tables.cell(values, "a", same, "b")
    assert "<br>" not in tables.cell(same, "a", same, "b"), "no difference to tell of"
    assert tables.cell(np.array([[0.6], [0.7]]), "a") == "0.650", "two numbers have no interval"


def test_an_arm_has_the_same_interval_in_every_claim():
    lines = [
        [line(name, seed, [0, 1, 1, seed] * 10, claim=claim) for seed in range(3)]
        for claim, name in [(1, "SmolLM2: own"), (2, "adapter, own"), (6, "pool")]
    ]
    values = tables.figure_of(lines[0], "seen", "right")
    assert len({tables.cell(values, tables.arm_of(of_claim)) for of_claim in lines}) == 1


# -- what train.py and generate_data.py got for it -------------------------------------------------


def gradients(world, textbook, **options):
    torch.manual_seed(0)
    model = DeSTA.from_pretrained(
        world.llm,
        world.whisper,
        None,
        torch.float32,
        "cpu",
        dropout=0.0,
        **world.adapter,
        **options,
    )
    for name, p in model.trained().items():
        if "lora_B" in name:
            p.data.normal_(std=0.1)
    model.train()
    fast.textbook = textbook
    try:
        for _ in range(2):  # the second pass would meet what the first has kept
            model.zero_grad()
            loss = model.loss(world.rows[:3], root=world.data)
            loss.backward()
    finally:
        fast.textbook = False
    return loss.item(), {name: p.grad for name, p in model.trained().items()}


@pytest.mark.parametrize("options", [dict(train_llm=1), dict(lora_rank=2), dict(n_taps=1)])
def test_gradients_equal_the_textbooks(tiny_world, options):
    loss, ours = gradients(tiny_world, False, **options)
    expected, textbook = gradients(tiny_world, True, **options)
    assert loss == pytest.approx(expected, abs=1e-5)
    assert ours.keys() == textbook.keys()
    for name, gradient in ours.items():
        if (
            gradient is None
        ):  # the fast cross-attention drops the key's bias, which softmax does not see
            assert name.endswith("crossattention.self.key.bias")
            assert textbook[name].abs().max() < 1e-6
            continue
        torch.testing.assert_close(
            gradient, textbook[name], atol=1e-5, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}"
        )
    inside = [name for name in ours if name.startswith("llm_model.")]
    assert all(ours[name].any() for name in inside if "k_proj.bias" not in name)
    n_weights = {"train_llm": 2 + 2 * 9, "lora_rank": 2 * 3 * 2, "n_taps": 0}[next(iter(options))]
    assert len(inside) == n_weights


def command(world, out, **changes):
    settings = dict(
        data=world.data / "train.jsonl", eval_data=world.data / "test.jsonl", out=out, max_steps=2,
        global_batch=4, micro_batch=2, warmup=1,
        standardize=4, eval_every=1, eval_rows=3, max_answer_tokens=300, **world.adapter,
    )  # fmt: skip
    return ["train.py", *world.models, *flags(**settings | changes)]


@pytest.mark.parametrize("train_llm", [0, 1])
def test_train_llm_trains_the_llm_and_is_loaded_again(tiny_world, tmp_path, float32, train_llm):
    done = script(*command(tiny_world, tmp_path, train_llm=train_llm, llm_lr=1e-2, save_every=1))
    assert done.status == 0, done.err
    load = lambda *adapter: DeSTA.from_pretrained(
        tiny_world.llm, tiny_world.whisper, *adapter, dtype=torch.float32, device="cpu"
    )
    before, after = load().llm.state_dict(), load(tmp_path / "adapter").llm.state_dict()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert bool(changed) == train_llm
    assert not train_llm or len(changed) == len(before)
    # a run that goes on from its checkpoint begins with what it had learned
    straight = read_jsonl(tmp_path / "log.jsonl")
    done = script(*command(tiny_world, tmp_path, train_llm=train_llm, llm_lr=1e-2, max_steps=3))
    assert done.status == 0
    assert f"continuing {tmp_path} at step 2" in done.out
    again = script(
        *command(
            tiny_world,
            tmp_path / "on",
            init_from=tmp_path / "checkpoints/step_00000002/adapter",
            max_steps=1,
        )
    )
    assert again.status == 0, again.err
    first = read_jsonl(tmp_path / "on/log.jsonl")[0]
    last = [record for record in straight if "eval_loss" in record][-1]
    assert first["eval_loss"] == pytest.approx(last["eval_loss"], rel=1e-5)


def test_the_llm_has_a_rate_of_its_own(tiny_world):
    model = DeSTA.from_pretrained(
        tiny_world.llm,
        tiny_world.whisper,
        None,
        torch.float32,
        "cpu",
        **tiny_world.adapter,
        lora_rank=2,
    )
    settings = train.Settings(lr=1e-3, llm_lr=2e-4)
    optimizer = train.make_optimizer(settings, model)
    weights = list(model.trained().values())
    train.flat_gradients(weights)
    loss, norm = torch.tensor(1.0), train.flat_gradients(weights).fill_(1.0)
    train.update(optimizer, weights, norm, 5e-4, 1.0, loss)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([5e-4, 1e-4])
    assert [len(group["params"]) for group in optimizer.param_groups] == [len(weights) - 12, 12]
    settings = train.Settings(lr=1e-3)
    assert [
        group.get("share", 1) for group in train.make_optimizer(settings, model).param_groups
    ] == [1, 1]


def test_last_taps_alone(tiny_world, tmp_path, float32):
    done = script(*command(tiny_world, tmp_path, n_taps=1))
    assert done.status == 0, done.err
    model = DeSTA.from_pretrained(
        tiny_world.llm, tiny_world.whisper, tmp_path / "adapter", torch.float32, "cpu"
    )
    assert model.taps == [3]
    assert model.adapter.layer_weights.shape == (4, 1)
    records = [record for record in read_jsonl(tmp_path / "log.jsonl") if "eval_loss" in record]
    assert [record["tap_weights"] for record in records] == [[[1.0]] * 4] * 3
    assert "tap_weights" not in done.out, "tables are for the file"


def test_tap_weights_in_the_log():
    adapter = QFormer(QFormerConfig(d_model=64, n_heads=4, d_llm=48, n_layers=1, n_queries=3))
    assert adapter.tables() == {"tap_weights": [[0.25] * 4] * 3}
    adapter.layer_weights.data[0, 3] = math.log(3)
    assert adapter.tables()["tap_weights"][0] == pytest.approx([1 / 6, 1 / 6, 1 / 6, 0.5], abs=1e-4)


def test_sharded_llms_are_not_trained(tiny_world, tmp_path):
    settings = train.Settings(global_batch=4, micro_batch=4, shard_llm=1, train_llm=1)
    with pytest.raises(ValueError, match="torchrun|--train_llm"):
        train.n_accumulated(settings, 1)


def test_no_instruction(tiny_world, tmp_path, float32):
    """An empty file: the description alone is answered, and nothing stands after the slot."""
    for domain in ("speech", "sound", "music"):
        (tmp_path / f"{domain}.txt").write_text("\n" if domain == "music" else "")
    settings = dict(
        metadata=tiny_world.data / "test.metadata.jsonl",
        instructions=tmp_path,
        out=tmp_path / "out.jsonl",
        max_new_tokens=4,
        keep_truncated=1,
    )
    done = script("generate_data.py", *tiny_world.models, *flags(**settings), "--system", "Hear.")
    assert done.status == 0, done.err
    rows = read_jsonl(tmp_path / "out.jsonl")
    assert len(rows) == 6
    assert all(
        row["prompt"] == ""
        and row["messages"][-1]["content"] == "<start_audio><|AUDIO|><end_audio>"
        for row in rows
    )
    assert (
        "speech.txt is empty: the LLM answers the description without any instruction" in done.err
    )
