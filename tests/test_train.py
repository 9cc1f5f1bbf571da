"""train.py run as a user runs it, on tiny models: any number of processes, kills and resumes, bad
input; and its pure functions.
"""

import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import time
import types
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import flags, read_jsonl, script, start, torchrun, write_jsonl
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

import train
from engine import checkpoint
from engine.rows import Batches, epoch_order, step_rows
from llama import Llama, LlamaConfig
from model import DeSTA
from qformer import QFormer, QFormerConfig
from whisper import Whisper, WhisperConfig, tap_layers


def command(world, out, **changes):
    settings = dict(
        data=world.data / "train.jsonl", eval_data=world.data / "test.jsonl", out=out, max_steps=3,
        global_batch=8, micro_batch=2, warmup=2,
        standardize=4, eval_every=2, eval_rows=3, save_every=2, max_answer_tokens=300, **world.adapter,
    )  # fmt: skip
    return ["train.py", *world.models, *flags(**settings | changes)]


def steps(out):
    """The log's records of steps, without those of evaluations."""
    return (
        [record for record in read_jsonl(out / "log.jsonl") if "loss" in record]
        if (out / "log.jsonl").exists()
        else []
    )


def test_pure_functions_of_the_schedule():
    rates = [train.learning_rate(step, 2.0, 4, 14) for step in range(15)]
    assert rates[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert rates[9] == pytest.approx(1.0)
    assert rates[14] == pytest.approx(0)
    assert all(a > b for a, b in zip(rates[4:], rates[5:]))
    assert train.learning_rate(0, 2.0, 0, 10) == 2.0


# -- the order of rows -----------------------------------------------------------------------------


def in_memory(lengths):
    """What `Batches` needs of a JsonLines."""

    class Rows(list):
        lengths = lambda self, rows: np.asarray(self)[rows]  # noqa: E731

    return Rows(lengths)


def test_epoch_is_a_pure_function_with_every_row_at_most_once():
    lengths = np.random.default_rng(0).integers(1, 1000, 1003)

    def run(seed=0, epoch=0, pool=4):
        return [
            step_rows(step, 1003, lengths.__getitem__, 8, pool, seed)
            for step in range(epoch * 125, epoch * 125 + 125)
        ]

    rows = sum(run(), [])
    assert all(len(batch) == 8 for batch in run())
    assert len(rows) == len(set(rows)) == 1000
    assert set(rows) <= set(range(1003))
    assert run() == run()
    assert run() != run(seed=1)
    assert run() != run(epoch=1)
    assert run(seed=1) != run(epoch=1)
    assert len({tuple(sum(run(epoch=e), [])) for e in range(3)}) == 3 and set(
        sum(run(epoch=1), [])
    ) != set(rows), "always the same rows sit out"
    torch.manual_seed(5)
    assert sum(run(), []) == rows
    # sorting within pools makes a batch's lengths alike, and leaves the order of the batches random
    spread = lambda batches: np.mean([np.ptp(lengths[batch]) for batch in batches])
    assert spread(run(pool=32)) < 0.25 * spread(run(pool=1))
    means = [lengths[batch].mean() for batch in run(pool=32)]
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.5


def test_epochs_have_orders_of_their_own():
    orders = [epoch_order(1003, seed, epoch).tolist() for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    assert all(sorted(order) == list(range(1003)) for order in orders)
    assert len(set(map(tuple, orders))) == 3
    assert orders[0] == epoch_order(1003, 0, 0).tolist()


@pytest.mark.parametrize("world, micro", [(1, 4), (2, 2), (2, 6), (3, 4), (1, 12)])
def test_global_batches_do_not_depend_on_the_processes(world, micro):
    """The micro-batches of all ranks, put together step by step, are the batches of the epochs,
    from whatever step a run resumes.
    """
    rows, settings = (
        in_memory(range(100)),
        types.SimpleNamespace(global_batch=12, micro_batch=micro, length_pool=2, seed=3),
    )
    expected = [
        step_rows(step, 100, rows.lengths, 12, 2, 3) for step in range(24)
    ]  # 8 steps an epoch
    for first in (0, 5, 8, 11):
        ranks = [list(Batches(rows, settings, first, 20, rank, world)) for rank in range(world)]
        accumulate = 12 // micro // world
        for i, step in enumerate(range(first, 20)):
            mine = [rank[i * accumulate : (i + 1) * accumulate] for rank in ranks]
            assert sum((batch for m in zip(*mine) for batch in m), []) == expected[step]
        assert all(len(rank) == accumulate * (20 - first) for rank in ranks)


# -- any number of processes, any number of stops --------------------------------------------------


def assert_same_adapter(a, b):
    a, b, early = (
        load_file(folder / "adapter/model.safetensors")
        for folder in (a, b, b / "checkpoints/step_00000001")
    )
    assert max((b[name] - early[name]).abs().max() for name in b) > 1e-3, (
        "nothing was learned: this test shows nothing"
    )
    for name in b:
        torch.testing.assert_close(
            a[name], b[name], atol=1e-5, rtol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_accumulated_micro_batches_equal_one_large_batch(tiny_world, tmp_path, float32):
    """Every target token of the global batch weighs the same, however many rows go through the
    model at once.
    """
    for micro_batch in (1, 8):
        done = script(
            *command(
                tiny_world,
                tmp_path / str(micro_batch),
                micro_batch=micro_batch,
                eval_data="",
                save_every=1,
                keep=9,
            )
        )
        assert done.status == 0
        assert (
            f"= {micro_batch} rows x 1 processes x {8 // micro_batch} accumulation steps"
            in done.out
        )
    assert_same_adapter(tmp_path / "1", tmp_path / "8")


def test_two_processes_equal_one(tiny_world, tmp_path, float32):
    """With dropout, which is drawn per micro-batch, and with one held-out row, so that the second
    process has nothing to evaluate.
    """
    options = dict(dropout=0.1, eval_rows=1, save_every=1, keep=9)
    said = torchrun(2, *command(tiny_world, tmp_path / "two", **options))
    assert "8 rows a step = 2 rows x 2 processes x 2 accumulation steps" in said
    assert script(*command(tiny_world, tmp_path / "one", **options)).status == 0
    assert_same_adapter(tmp_path / "two", tmp_path / "one")
    for a, b in zip(
        read_jsonl(tmp_path / "one/log.jsonl"), read_jsonl(tmp_path / "two/log.jsonl"), strict=True
    ):
        for key in {"step", "loss", "lr", "grad_norm", "eval_loss"} & a.keys():
            assert b[key] == pytest.approx(a[key], rel=1e-4), f"{key} at step {a['step']}"


def test_the_wrong_clip_is_the_same_on_any_number_of_processes(model, tiny_world):
    settings = train.Settings(eval_rows=5, audio_root=str(tiny_world.data))
    settings.eval_data = tiny_world.data / "test.jsonl"
    alone = train.held_out_rows(settings, model, 0, 1)
    assert len(alone) == 5
    for row, other in zip(alone, alone[1:] + alone[:1]):
        assert row["name"] != other["name"]
        assert torch.equal(row["wrong_mels"][0], other["mels"][0])
    parts = [train.held_out_rows(settings, model, rank, 4) for rank in range(4)]
    assert [len(part) for part in parts] == [2, 1, 1, 1]
    for rank, part in enumerate(parts):
        for row, same in zip(part, alone[rank::4], strict=True):
            assert row["name"] == same["name"]
            assert torch.equal(row["wrong_mels"][0], same["wrong_mels"][0])


LONG = dict(max_steps=14, global_batch=4, save_every=3, eval_every=6, dropout=0.1)


@pytest.fixture(scope="module")
def straight(tiny_world, tmp_path_factory):
    """14 steps in one go."""
    out = tmp_path_factory.mktemp("straight")
    assert script(*command(tiny_world, out, **LONG)).status == 0
    return out


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_stopped_and_continued_equals_straight(tiny_world, tmp_path, straight, number):
    process, at = (
        start(*command(tiny_world, tmp_path, **LONG)),
        random.choice([4, 5, 7, 8]),
    )  # checkpoints at 3, 6, 9
    print(f"{number.name} is sent after step {at}")
    while len(steps(tmp_path)) < at:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.005)
    process.send_signal(number)
    said, _ = process.communicate(timeout=300)
    last = steps(tmp_path)[-1]["step"]
    assert at <= last < 14, "the run was over before the signal came"
    if number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:  # the step is finished and saved
        assert process.returncode == 0
        assert f"stopped by {number.name} at step {last}, saved" in said
        assert "Traceback" not in said
        assert (
            json.loads((tmp_path / f"checkpoints/step_{last:08d}/trainer.json").read_text())["step"]
            == last
        )
    saved = sorted(folder.name for folder in (tmp_path / "checkpoints").glob("step_*"))
    again = script(*command(tiny_world, tmp_path, **LONG))
    assert again.status == 0
    assert (
        not saved
        or f"continuing {tmp_path} at step {int(saved[-1].removeprefix('step_'))}\n" in again.out
    )
    for file in ("adapter/model.safetensors", "checkpoints/step_00000014/trainer.safetensors"):
        assert (tmp_path / file).read_bytes() == (straight / file).read_bytes(), (
            f"{file} is not the same, bit for bit"
        )
    assert [record["step"] for record in steps(tmp_path)] == list(range(1, 15))
    assert [record["loss"] for record in steps(tmp_path)] == [
        record["loss"] for record in steps(straight)
    ]
    evaluations = {
        record["step"]: record
        for record in read_jsonl(tmp_path / "log.jsonl")
        if "eval_loss" in record
    }
    assert all(
        evaluations[r["step"]] == r for r in read_jsonl(straight / "log.jsonl") if "eval_loss" in r
    )


def test_log_header_and_kept_checkpoints(straight, tiny_world):
    assert [folder.name for folder in sorted((straight / "checkpoints").iterdir())] == [
        "step_00000012",
        "step_00000014",
    ]
    assert set(steps(straight)[0]) == {
        "step",
        "loss",
        "lr",
        "grad_norm",
        "seconds",
        "rows_per_second",
        "mfu",
        "memory_gb",
    }
    assert [r["step"] for r in read_jsonl(straight / "log.jsonl") if "eval_loss" in r] == [
        0,
        6,
        12,
        14,
    ]
    assert steps(straight)[-1]["loss"] < steps(straight)[0]["loss"]
    assert all(
        r["eval_loss"] != r["eval_loss_wrong_clip"]
        for r in read_jsonl(straight / "log.jsonl")
        if "eval_loss" in r
    )
    run = json.loads((straight / "run.json").read_text())
    assert run["settings"]["max_steps"] == 14
    assert run["settings"]["llm"] == str(tiny_world.llm)
    assert run["command"].startswith("train.py --llm")
    assert run["torch"] == torch.__version__
    assert run["git"]
    assert run["device"]


def test_finished_run_stays_as_it_is_and_longer_ones_go_on(tiny_world, straight):
    before = {
        file: file.read_bytes()
        for file in straight.rglob("*")
        if file.is_file() and file.name != "run.json"
    }
    assert script(*command(tiny_world, straight, **LONG)).status == 0
    shorter = script(*command(tiny_world, straight, **LONG | {"max_steps": 6}))
    assert shorter.status == 0
    assert {file: file.read_bytes() for file in before} == before
    other = script(*command(tiny_world, straight, **LONG | {"lr": 0.5, "seed": 1}))
    assert other.status == 1
    assert other.err.splitlines()[-1].startswith("error: ")
    assert "another lr, seed" in other.err


@pytest.fixture(scope="module")
def model(tiny_world):
    return DeSTA.from_pretrained(
        tiny_world.llm, tiny_world.whisper, dtype=torch.float32, device="cpu", **tiny_world.adapter
    )


class Crash(BaseException):
    pass


def test_crash_anywhere_in_saving_leaves_a_whole_checkpoint(model, tmp_path, monkeypatch):
    """Die before each file operation of save_checkpoint in turn: what is found afterwards is the
    old step or the new one, never a mixture.
    """
    out, weights = tmp_path / "out", list(model.adapter.parameters())
    record = {"settings": {}, "made_from": None}

    def trainer(value):
        """An optimizer and weights that say which step they are from."""
        optimizer = torch.optim.AdamW(weights, lr=0.0)
        for weight in weights:
            weight.data.fill_(value)
            optimizer.state[weight] = {
                "step": torch.tensor(float(value)),
                "exp_avg": weight.data + 0.25,
                "exp_avg_sq": weight.data + 0.5,
            }
        return optimizer

    def found():
        optimizer = trainer(0)
        step = checkpoint.load(out, model, optimizer, record, {}, set())
        for weight in weights:
            state = optimizer.state[weight]
            assert (weight == step).all()
            assert state["step"] == step
            assert (state["exp_avg"] == step + 0.25).all()
            assert (state["exp_avg_sq"] == step + 0.5).all()
        model.load_adapter(out / "adapter")
        assert len({weight.flatten()[0].item() for weight in weights}) == 1
        # Who finds the last step's checkpoint has nothing left to do, and would leave an older one.
        assert weights[0].flatten()[0] >= step, "OUT/adapter is as new as the checkpoint"
        return step

    save = lambda step: checkpoint.save(out, model, trainer(step), step, record, keep=1)
    save(1)
    shutil.copytree(out, tmp_path / "before")
    after_crash = []
    for deadline in range(1000):
        operations = itertools.count()

        def mortal(operation, operations=operations, deadline=deadline):
            def call(*args, **kwargs):
                if next(operations) == deadline:
                    raise Crash
                return operation(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            for owner, name in (
                (os, "replace"),
                (os, "fsync"),
                (Path, "rename"),
                (shutil, "rmtree"),
                (Path, "write_bytes"),
                (Path, "write_text"),
            ):
                patch.setattr(owner, name, mortal(getattr(owner, name)))
            try:
                save(2)
                break
            except Crash:
                pass
        after_crash.append(found())
        save(2)
        assert found() == 2
        shutil.rmtree(out)
        shutil.copytree(tmp_path / "before", out)
    assert found() == 2
    assert len(after_crash) > 8
    assert after_crash == sorted(after_crash)
    assert set(after_crash) == {1, 2}


# -- what is trained, and on what ------------------------------------------------------------------


def test_frozen_parts_stay_as_they_are(tiny_world, tmp_path, monkeypatch, float32):
    made, load = [], DeSTA.from_pretrained.__func__
    monkeypatch.setattr(
        DeSTA,
        "from_pretrained",
        classmethod(lambda *args, **options: made.append(load(*args, **options)) or made[0]),
    )
    assert script(*command(tiny_world, tmp_path)).status == 0
    for part, fresh in (
        (made[0].llm, Llama.from_pretrained(tiny_world.llm)),
        (made[0].whisper, Whisper.from_pretrained(tiny_world.whisper)),
    ):
        assert all(
            torch.equal(tensor, part.state_dict()[name])
            for name, tensor in fresh.state_dict().items()
        )
        assert not any(p.requires_grad or p.grad is not None for p in part.parameters())
    assert all(p.requires_grad and p.dtype == torch.float32 for p in made[0].adapter.parameters())


def test_initial_statistics(model, tiny_world):
    """standardize: the taps of the clips get mean 0 and deviation 1; and the fresh adapter's
    vectors are spread like the embeddings.
    """
    rows = train.Rows(
        tiny_world.data / "train.jsonl",
        model.reader,
        types.SimpleNamespace(audio_root=tiny_world.data, max_answer_tokens=300, max_prompt=1000),
    )
    mean, std = train.measure_taps(model, rows, 6)  # every fourth of 24 rows
    taps = torch.cat(
        [
            model.whisper.encode(torch.stack(rows[i]["mels"]), [0, 1, 2, 3]).flatten(0, 2)
            for i in range(0, 24, 4)
        ]
    )
    torch.testing.assert_close(mean, taps.mean(0), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(std, taps.std(0), atol=1e-4, rtol=1e-3)
    # Clips of one row that differ in length, as with --fit_window 1: each frame counts once.
    long = rows[0]["mels"][0]
    short = long[:, :100]
    mean, _ = train.measure_taps(model, [{"mels": [long, short]}], 1)
    taps = [model.whisper.encode(mel[None], [0, 1, 2, 3]).flatten(0, 2) for mel in (long, short)]
    torch.testing.assert_close(mean, torch.cat(taps).mean(0), atol=1e-4, rtol=1e-4)
    torch.manual_seed(0)
    table = 3 + torch.randn(1000, 24) @ torch.diag(torch.linspace(0.01, 2, 24)) @ torch.randn(
        24, 24
    )
    for d_model in (
        64,
        16,
    ):  # more channels than the LLM has, or fewer: then the largest directions
        adapter = QFormer(
            QFormerConfig(d_model=d_model, n_heads=4, d_llm=24, n_layers=1, n_queries=500)
        ).eval()
        adapter.fit(torch.zeros(d_model), torch.ones(d_model), table)
        vectors = adapter(torch.randn(2, 4, 20, d_model)).detach().flatten(0, 1)
        error = (torch.cov(vectors.T) - torch.cov(table.T)).norm() / torch.cov(table.T).norm()
        assert error < 0.3
        assert (vectors.mean(0) - table.mean(0)).norm() < 0.5 * torch.cov(table.T).trace().sqrt()


@pytest.fixture(scope="module")
def bad_rows(tiny_world):
    """Lines that must not stop a run: (line, what is said about it)."""
    folder = tiny_world.data
    soundfile.write(folder / "nan.wav", np.full(8000, np.nan), 16000, subtype="FLOAT")
    (folder / "empty.wav").touch()
    good = tiny_world.rows[0]
    spoken = lambda path: [
        *good["messages"][:-1],
        good["messages"][-1] | {"audios": [{"audio": str(path), "text": "x"}]},
    ]
    return [
        ('{"messages": [', "is not JSON"),
        ("[1, 2]", "is not a JSON object"),
        (
            good | {"messages": spoken("clips/missing.wav")},
            "clips/missing.wav: no such readable file",
        ),
        (good | {"messages": spoken(folder / "nan.wav")}, "NaN"),
        (good | {"messages": spoken(folder / "empty.wav")}, "empty.wav is empty"),
        (
            good | {"messages": [{"role": "user", "content": "<|AUDIO|>\n\nWho?"}]},
            "has 1 <|AUDIO|> but 0 audios",
        ),
        ({"messages": good["messages"]}, "KeyError('response')"),
        (good | {"response": "word " * 301}, "answer longer than --max_answer_tokens 300"),
        (good | {"response": None}, "not in the form of a training row"),
        (good | {"messages": "hello"}, "not in the form of a training row"),
        (good | {"messages": [{"role": "user"}]}, "KeyError('content')"),
        (
            good | {"messages": [good["messages"][-1] | {"audios": [{"text": "x"}]}]},
            "KeyError('audio')",
        ),
    ]


def test_bad_rows_among_good_ones_are_left_out_and_counted(tiny_world, tmp_path, bad_rows, model):
    lines = [line if isinstance(line, str) else json.dumps(line) for line, _ in bad_rows] + [
        json.dumps(row) for row in tiny_world.rows[:4]
    ]
    (tmp_path / "mixed.jsonl").write_text("\n".join(lines) + "\n\n")
    done = script(
        *command(
            tiny_world,
            tmp_path / "out",
            data=tmp_path / "mixed.jsonl",
            global_batch=16,
            micro_batch=2,
            max_steps=1,
            standardize=0,
        )
    )
    assert done.status == 0, done.err
    said = [line for line in done.err.splitlines() if "row left out: " in line]
    assert len(said) == 3 and "12 rows left out" in done.err.splitlines(), (
        "the first three by name, then the total"
    )
    settings = types.SimpleNamespace(
        audio_root=tiny_world.data, max_answer_tokens=300, max_prompt=1000
    )
    rows = train.Rows(tmp_path / "mixed.jsonl", model.reader, settings)
    for i, (_, reason) in enumerate(bad_rows):
        assert (
            f"mixed.jsonl, row {i + 1}: " in rows[i]["left_out"] and reason in rows[i]["left_out"]
        ), f"row {i + 1}"
    (record,) = steps(tmp_path / "out")
    assert record["rows_per_second"] * record["seconds"] == pytest.approx(4)
    assert math.isfinite(record["loss"])


def test_rows_without_audio_among_rows_with_it(tiny_world, tmp_path):
    """A micro-batch that is all text has a loss and no gradient; two audios in one row are fine
    too.
    """
    row = tiny_world.rows[0]
    text = row | {"messages": [{"role": "user", "content": "Say hello."}]}
    two = row | {
        "messages": [
            row["messages"][-1],
            {"role": "assistant", "content": "Yes."},
            row["messages"][-1],
        ]
    }
    data = write_jsonl(tmp_path / "mixed.jsonl", [text, text, two, row])
    done = script(
        *command(
            tiny_world, tmp_path / "out", data=data, global_batch=4, micro_batch=1, max_steps=2
        )
    )
    assert done.status == 0
    assert "left out" not in done.out + done.err
    assert "--warmup 2 takes most of the 2 steps" in done.err
    assert [record["step"] for record in steps(tmp_path / "out")] == [1, 2]


@pytest.mark.parametrize("change, message", [
    (["--learning_rate", "1"], "unrecognized arguments: --learning_rate 1"),
    (["--max_step", "1"], "unrecognized arguments: --max_step 1"),  # no guessing at shortened names either
    (["--lr", "fast"], "argument --lr: invalid float value: 'fast'"),
    (["--epochs", "1.5"], "argument --epochs: invalid int value: '1.5'"),
    (["--llm", "nowhere"], "nowhere/.*demo/prepare.py"),
    (["--whisper", "nowhere"], "nowhere.*demo/prepare.py"),
    (["--data", "nowhere.jsonl"], "nowhere.jsonl is missing.*generate_data.py"),
    (["--eval_data", "nowhere.jsonl"], "nowhere.jsonl is missing.*generate_data.py"),
    (["--global_batch", "7"], "global_batch 7 is not a multiple of micro_batch 2 x 1 processes"),
    (["--global_batch", "50"], "train.jsonl has 24 rows, fewer than one global batch of 50"),
    (["--audio_root", "nowhere"], "test.jsonl has no usable row.* --audio_root"),
    (["--audio_root", "nowhere", "--eval_data", ""], "none of 4 rows of .*train.jsonl .* --audio_root"),
])  # fmt: skip
def test_what_a_user_can_get_wrong_is_one_clear_line(tiny_world, tmp_path, change, message):
    done = script(*command(tiny_world, tmp_path), *change)
    assert done.status != 0
    assert not (tmp_path / "adapter").exists()
    assert re.search(rf"^(train.py: )?error: .*{message}", done.err.splitlines()[-1]), done.err


# -- the cost model --------------------------------------------------------------------------------


def test_flops_agree_with_torchs_counter_at_full_size():
    """Llama-3.1-8B, Whisper large-v3 and the 131.5M adapter on the meta device: shapes only.
    design.md: about 11.4 TFLOP a sample.
    """
    with torch.device("meta"):
        llm = Llama(
            LlamaConfig(128256, 4096, 32, 32, 8, 128, 14336, 1e-5, 5e5, None, False)
        ).requires_grad_(False)
        whisper = Whisper(
            WhisperConfig(128, 1280, 32, 20, 5120, 1, 20, 5120, 51866)
        ).requires_grad_(False)
        qformer = QFormer(QFormerConfig(1280, 20, 4096))
        mels, tokens = torch.empty(1, 128, 3000), 300
    count = {}
    for name in ("encoder", "adapter", "llm", "head"):
        with FlopCounterMode(display=False) as counter:
            if name == "encoder":
                taps = whisper.encode(mels, tap_layers(32))
            elif name == "adapter":
                vectors = qformer(taps)
                vectors.sum().backward()
            elif name == "llm":
                x = torch.empty(1, tokens, 4096, device="meta", requires_grad=True)
                llm.hidden_states(x).sum().backward()
            else:
                x = torch.empty(100, 4096, device="meta", requires_grad=True)
                llm.lm_head(x).sum().backward()
        count[name] = counter.get_total_flops()
    model = types.SimpleNamespace(
        llm=llm,
        whisper=whisper,
        adapter=qformer,
        config=types.SimpleNamespace(audio_seconds=30, train_llm=0),
    )
    assert train.flops(model, 1, 0, 0) == pytest.approx(
        count["encoder"] + count["adapter"], rel=0.03
    )
    assert train.flops(model, 0, tokens, 0) == pytest.approx(count["llm"], rel=0.03)
    assert train.flops(model, 0, 0, 100) == pytest.approx(count["head"], rel=0.03)
    assert train.flops(model, 1, tokens, 100) == pytest.approx(11.4e12, rel=0.03)
