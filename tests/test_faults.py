"""Faults that days bring: losses that are not finite, damaged files, kills at any moment, full and
read-only disks, signals, lost ranks, long runs.

All of them are real: signals, tmpfs, flipped bytes. The slow ones are run by `bash
tests/torture.sh`.
"""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import killed
import numpy as np
import pytest
import torch
from conftest import ROOT, flags, read_jsonl, script, start, torchrun, write_jsonl
from safetensors.torch import load_file, save_file

import train
from engine import checkpoint, run
from engine.rows import step_rows
from llama import Llama
from model import DeSTA
from tokenizer import Tokenizer
from whisper import Whisper

STEPS = 6


def training(world, out, **changes):
    settings = dict(
        data=world.data / "train.jsonl", eval_data=world.data / "test.jsonl", out=out,
        max_steps=STEPS, global_batch=4, micro_batch=2, warmup=2,
        standardize=4, eval_every=4, eval_rows=2, save_every=2, dropout=0.1, **world.adapter,
    )  # fmt: skip
    return ["train.py", *world.models, *flags(**settings | changes)]


def generating(world, out, **changes):
    settings = dict(
        metadata=world.data / "train.metadata.jsonl", instructions=world.instructions, out=out,
        per_clip=2, audio_seconds=3, max_new_tokens=16,
        keep_truncated=1, batch_size=4, block=1, system="You hear a clip.",
    )  # fmt: skip
    return ["generate_data.py", *world.models, *flags(**settings | changes)]


def evaluating(world, out, **changes):
    settings = dict(
        data=world.data / "test.jsonl",
        adapter=world.folder / "adapter",
        out=out,
        block=1,
        batch_size=4,
        max_new_tokens=6,
    )
    return ["eval.py", *world.models, *flags(**settings | changes)]


def preparing(world, out, **changes):
    return [
        "demo/prepare.py",
        *flags(**dict(weights_dir=ROOT / "weights", data_dir=out, n_train=30, n_test=15) | changes),
    ]


COMMANDS = {
    "train.py": training,
    "generate_data.py": generating,
    "eval.py": evaluating,
    "demo/prepare.py": preparing,
}


@pytest.fixture(scope="module")
def world(tiny_world):
    """The tiny world with an adapter to evaluate."""
    torch.manual_seed(0)
    DeSTA.from_pretrained(
        tiny_world.llm, tiny_world.whisper, device="cpu", **tiny_world.adapter
    ).save_adapter(tiny_world.folder / "adapter")
    return tiny_world


def contents(folder):
    """{path: bytes} of what a script made, without what tells the time: log.jsonl keeps steps and
    losses, run.json and info.json go.
    """
    found = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = str(file.relative_to(folder))
        if name == "log.jsonl":
            found[name] = [
                {k: r.get(k) for k in ("step", "loss", "grad_norm", "eval_loss", "skipped")}
                for r in read_jsonl(file)
            ]
        elif file.name == "trainer.json":
            found[name] = json.loads(file.read_text())["step"]
        elif name != "run.json" and not name.endswith(".info.json"):
            found[name] = file.read_bytes()
        else:
            found[name] = "there"
    return found


_straight = {}


def straight(world, name, tmp_path_factory):
    """What `name` makes in one go, by the same machine."""
    if name not in _straight:
        folder = tmp_path_factory.mktemp("straight")
        done = script(*COMMANDS[name](world, target(name, folder)))
        assert done.status == 0, done.err
        _straight[name] = contents(folder)
    return _straight[name]


def target(name, folder):
    return folder if name in ("train.py", "demo/prepare.py") else folder / "rows.jsonl"


def one_line(done, pattern):
    """The script ended in one line that matches, and in no traceback."""
    assert done.status not in (0, None), done.out + done.err
    lines = [
        line for line in re.split("[\r\n]+", done.err) if "error: " in line
    ]  # a progress bar may say good-bye after it
    assert len(lines) == 1 and re.search(pattern, lines[0]) and "Traceback" not in done.err, (
        done.err
    )
    return lines[0]


# -- losses that are not finite --------------------------------------------------------------------


@pytest.fixture(scope="module")
def poisoned(world, tmp_path_factory):
    """An LLM with one broken weight: the embedding of "zebra" is NaN. Rows with that word have no
    finite loss. -> flags, and the rows spoilt
    """
    folder = tmp_path_factory.mktemp("poisoned") / "llm"
    shutil.copytree(world.llm, folder)
    config, state = (
        json.loads((folder / "config.json").read_text()),
        load_file(folder / "model.safetensors"),
    )
    state["lm_head.weight"] = state[
        "model.embed_tokens.weight"
    ].clone()  # untied, so that only rows with the word are hit
    (token,) = Tokenizer(world.llm).encode(" zebra")
    state["model.embed_tokens.weight"][token] = torch.nan
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))

    def spoil(path, rows, word="zebra"):
        spoilt = json.loads(json.dumps(world.rows))
        for i in rows:
            spoilt[i]["messages"][1]["content"] += f" {word}"
        return write_jsonl(path, spoilt)

    return folder, spoil


def global_batches():
    return [step_rows(step, 24, lambda rows: np.ones(len(rows)), 4, 1, 0) for step in range(6)]


def test_step_without_finite_loss_is_skipped_counted_and_named(world, poisoned, tmp_path):
    llm, spoil = poisoned
    batches = global_batches()
    row = batches[2][1]
    weights = {
        name: checkpoint.file_hash(folder)
        for name, folder in (("llm", llm), ("whisper", world.whisper))
    }
    done = script(
        *training(
            world,
            tmp_path / "out",
            llm=llm,
            data=spoil(tmp_path / "a.jsonl", [row]),
            max_steps=6,
            eval_data="",
            standardize=0,
        )
    )
    assert done.status == 0 and "1 steps skipped" in done.out, done.err
    log = read_jsonl(tmp_path / "out/log.jsonl")
    (skipped,) = [record for record in log if "skipped" in record]
    assert skipped["step"] == 3
    assert "nan" in skipped["skipped"]
    assert sorted(skipped["rows"]) == sorted(
        f"{tmp_path}/a.jsonl, row {i + 1} ({world.rows[i]['id']})" for i in batches[2]
    )
    assert [record["step"] for record in log if record.get("loss") is not None] == [1, 2, 4, 5, 6]
    adapter = load_file(tmp_path / "out/adapter/model.safetensors")
    assert all(tensor.isfinite().all() for tensor in adapter.values())
    assert {
        name: checkpoint.file_hash(folder)
        for name, folder in (("llm", llm), ("whisper", world.whisper))
    } == weights


def test_training_gives_up_with_the_last_good_checkpoint_and_goes_on_when_mended(
    world, poisoned, tmp_path
):
    llm, spoil = poisoned
    batches = global_batches()
    bad, out = [batch[0] for batch in batches[2:5]], tmp_path / "out"
    command = training(
        world,
        out,
        llm=llm,
        data=spoil(tmp_path / "a.jsonl", bad),
        max_steps=6,
        max_skipped=3,
        save_every=1,
        keep=9,
        eval_data="",
        standardize=0,
    )
    done = script(*command)
    one_line(
        done,
        r"^error: 3 steps in a row were skipped, at last step 5 \(loss nan, gradient norm nan\)",
    )
    assert [folder.name for folder in sorted((out / "checkpoints").iterdir())] == [
        "step_00000001",
        "step_00000002",
    ]
    good = (out / "checkpoints/step_00000002/adapter/model.safetensors").read_bytes()
    assert (out / "adapter/model.safetensors").read_bytes() == good
    assert len([record for record in read_jsonl(out / "log.jsonl") if "skipped" in record]) == 3
    spoil(tmp_path / "a.jsonl", bad, "horse")  # as many bytes, so the order of rows is the same
    done = script(*command)
    assert (
        done.status == 0 and f"continuing {out} at step 2" in done.out and "skipped" not in done.out
    ), done.err
    assert all(record["loss"] > 0 for record in read_jsonl(out / "log.jsonl"))
    with open(tmp_path / "a.jsonl", "a") as file:
        file.write(json.dumps(world.rows[0]) + "\n")
    one_line(script(*command), "was made with another data_bytes")


def test_a_run_that_lost_its_audio_stops(world, tmp_path):
    """The disk with the clips goes away: steps without any row must not look like training."""
    rows = [json.loads(json.dumps(row)) for row in world.rows]
    for i in [i for batch in global_batches()[2:] for i in batch]:
        rows[i]["messages"][1]["audios"][0]["audio"] = "gone/" + rows[i]["id"]
    data = write_jsonl(tmp_path / "a.jsonl", rows)
    done = script(
        *training(
            world,
            tmp_path / "out",
            data=data,
            max_steps=6,
            max_skipped=3,
            eval_data="",
            save_every=1,
            standardize=0,
        )
    )
    one_line(done, "3 steps in a row were skipped, at last step 5 .no row of the batch can be used")
    assert (tmp_path / "out/checkpoints/step_00000002").is_dir()
    assert not (tmp_path / "out/checkpoints/step_00000003").exists()


# -- damaged files ---------------------------------------------------------------------------------


def damage(data, random):
    """One fault of a disk: a flipped bit, or a lost end."""
    if random.random() < 0.3:
        return data[: random.randrange(len(data))]
    at = (
        random.randrange(len(data))
        if random.random() < 0.5
        else random.randrange(min(len(data), 3000))
    )  # half of them in the header
    return data[:at] + bytes([data[at] ^ 1 << random.randrange(8)]) + data[at + 1 :]


def test_every_damage_of_an_adapter_is_found(world, tmp_path):
    """Flip a bit or cut the end, 300 times: the adapter is refused with its file's name, or what is
    loaded is what was saved.
    """
    model = DeSTA.from_pretrained(world.llm, world.whisper, world.folder / "adapter", device="cpu")
    before = {name: tensor.clone() for name, tensor in model.adapter.state_dict().items()}
    refused = 0
    for n in range(300):
        name = ("model.safetensors", "config.json")[n % 10 == 0]
        shutil.copytree(world.folder / "adapter", tmp_path, dirs_exist_ok=True)
        (tmp_path / name).write_bytes(
            damage((world.folder / "adapter" / name).read_bytes(), random.Random(n))
        )
        try:
            assert (
                checkpoint.read_record(tmp_path / "config.json").get("audio_seconds") == 3
                or name != "config.json"
            )
            model.load_adapter(tmp_path)
        except ValueError as error:
            assert name in str(error), n
            refused += 1
        assert all(
            torch.equal(tensor, before[name]) for name, tensor in model.adapter.state_dict().items()
        ), f"damage {n} went unnoticed"
    assert refused > 250


def test_every_damage_of_a_models_header_is_found(world, tmp_path):
    """Weights of others carry no hash: what can be told is structure. A cut file and a damaged
    header are refused by name.
    """
    for folder, load in (
        (world.llm, Llama.from_pretrained),
        (world.whisper, Whisper.from_pretrained),
    ):
        shutil.copytree(folder, tmp_path / folder.name)
        file = tmp_path / folder.name / "model.safetensors"
        whole = file.read_bytes()
        header = 8 + int.from_bytes(whole[:8], "little")
        for n in range(60):
            chance = random.Random(n)
            at = chance.randrange(header - 1)
            broken = (
                whole[: chance.randrange(len(whole))]
                if n % 3 == 0
                else whole[:at] + bytes([whole[at] ^ 1 << chance.randrange(8)]) + whole[at + 1 :]
            )
            file.write_bytes(broken)
            try:
                load(tmp_path / folder.name)
            except ValueError as error:
                assert str(tmp_path / folder.name) in str(error)
            else:  # a flip in what does not matter: metadata, or a blank
                assert n % 3
                assert b"__metadata__" in whole[:header]
                assert at < whole.index(b"}", 0, header)
        for name in ("config.json", "tokenizer.json"):
            file.write_bytes(whole)
            text = (folder / name).read_bytes()
            (tmp_path / folder.name / name).write_bytes(text[: len(text) // 2])
            with pytest.raises(ValueError, match=name):
                load(
                    tmp_path / folder.name
                ) if name == "config.json" or load != Llama.from_pretrained else train.DeSTA.from_pretrained(
                    tmp_path / folder.name, world.whisper
                )
            (tmp_path / folder.name / name).write_bytes(text)


@pytest.mark.parametrize(
    "name", ["trainer.safetensors", pytest.param("trainer.json", marks=pytest.mark.slow)]
)
def test_damaged_checkpoint_is_set_aside_for_the_older_one(world, tmp_path, tmp_path_factory, name):
    expected = straight(world, "train.py", tmp_path_factory)
    assert script(*training(world, tmp_path)).status == 0
    file = tmp_path / f"checkpoints/step_{STEPS:08d}" / name
    whole = file.read_bytes()
    file.write_bytes(
        whole[: len(whole) // 2]
        + bytes([whole[len(whole) // 2] ^ 4])
        + whole[len(whole) // 2 + 1 :]
    )
    done = script(*training(world, tmp_path))
    assert done.status == 0
    assert f"{file.parent} is damaged and set aside" in done.err
    assert f"at step {STEPS - 2}" in done.out
    shutil.rmtree(tmp_path / f"checkpoints/damaged_step_{STEPS:08d}")
    assert contents(tmp_path) == expected
    for folder in (tmp_path / "checkpoints").iterdir():
        (folder / name).write_bytes(b"")
    for _ in range(2):  # the second time it finds none but those set aside
        one_line(script(*training(world, tmp_path)), "^error: no checkpoint in .* is whole: delete")


def test_a_checkpoint_that_cannot_be_read_now_is_not_set_aside(world, tmp_path, monkeypatch):
    assert script(*training(world, tmp_path)).status == 0

    def refused(file):
        raise PermissionError(13, "Permission denied", str(file))

    monkeypatch.setattr(checkpoint, "load_tensors", refused)
    with pytest.raises(PermissionError, match="trainer.safetensors"):
        checkpoint.load(tmp_path, None, None, {}, {}, set())
    assert not list((tmp_path / "checkpoints").glob("damaged_*"))


def test_no_git_no_commit(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run.description(train.Settings())["git"] == "unknown"


def test_half_deleted_checkpoint_goes_when_the_run_goes_on(world, tmp_path, tmp_path_factory):
    """What a kill leaves that comes in the middle of deleting an old one."""
    expected = straight(world, "train.py", tmp_path_factory)
    assert script(*training(world, tmp_path)).status == 0
    (tmp_path / "checkpoints/step_00000001").mkdir()
    shutil.copy(
        tmp_path / f"checkpoints/step_{STEPS:08d}/trainer.json",
        tmp_path / "checkpoints/step_00000001",
    )
    assert script(*training(world, tmp_path)).status == 0
    assert contents(tmp_path) == expected


def test_other_weights_are_not_gone_on_with(world, tmp_path):
    llm = shutil.copytree(world.llm, tmp_path / "llm")
    assert script(*training(world, tmp_path / "out", llm=llm, max_steps=2)).status == 0
    state = load_file(llm / "model.safetensors")
    state["model.norm.weight"][0] += 1
    save_file(state, llm / "model.safetensors", {"format": "pt"})
    one_line(
        script(*training(world, tmp_path / "out", llm=llm, max_steps=4)),
        "was made with another llm_sha256",
    )


# -- kills -----------------------------------------------------------------------------------------


def kill_again_and_again(world, name, tmp_path_factory, kills):
    """SIGKILL at `kills` random moments, every second one between two file operations, on one
    folder that goes on from kill to kill. Whenever a run gets through, its files are those of an
    undisturbed run; then all is begun anew.
    """
    expected, chance = straight(world, name, tmp_path_factory), random.Random()
    folder, said = tmp_path_factory.mktemp("killed"), tmp_path_factory.getbasetemp() / "said.txt"
    command = COMMANDS[name](world, target(name, folder))
    begin = time.time()
    code = killed.run(command, folder, said)
    assert code == 0
    seconds, changes = (
        time.time() - begin,
        int(re.search(r"(\d+) changes$", said.read_text().strip())[1]),
    )
    n, finished, moments = 0, 0, []
    while True:
        if code == 0:
            found = contents(folder)
            assert found.keys() == expected.keys(), f"{name}: after {moments} the files are others"
            assert found == expected, (
                f"{name}: after {moments} "
                f"{[file for file in expected if found[file] != expected[file]]} differ"
            )
            finished += 1
            if n >= kills:
                return (
                    f"{name}: {n} kills, {finished} times through to the end, "
                    f"each time the same files; {changes} file operations to be killed at"
                )
            shutil.rmtree(folder)
            folder.mkdir()
        moment = (
            {}
            if n >= kills
            else {"change": chance.randint(1, changes)}
            if n % 2
            else {"after": chance.uniform(0.3, 1) * seconds}
        )
        code = killed.run(command, folder, said, **moment)
        n += code != 0
        moments.append(moment)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_killed_at_twenty_random_moments(world, tmp_path_factory, name):
    print(kill_again_and_again(world, name, tmp_path_factory, 20))


@pytest.mark.slow
def test_killed_once_between_two_file_operations(world, tmp_path_factory):
    """The reduced form; test_train, test_generate_data and test_eval have one by time each."""
    name = "demo/prepare.py"
    folder, expected = tmp_path_factory.mktemp("killed"), straight(world, name, tmp_path_factory)
    said = tmp_path_factory.getbasetemp() / "said.txt"
    assert killed.run(preparing(world, folder), folder, said) == 0
    changes = int(re.search(r"(\d+) changes$", said.read_text().strip())[1])
    shutil.rmtree(folder)
    folder.mkdir()
    assert (
        killed.run(preparing(world, folder), folder, said, change=random.randint(5, changes))
        == -signal.SIGKILL
    )
    assert script(*preparing(world, folder)).status == 0
    assert contents(folder) == expected


# -- full and read-only disks ----------------------------------------------------------------------


@contextlib.contextmanager
def small_disk(folder, size):
    """A disk of its own of `size` bytes; skips where mounting is not permitted. -> function that
    mounts it anew with other options
    """
    folder.mkdir(exist_ok=True)
    mount = lambda options, *more: subprocess.run(
        ["mount", *more, "-t", "tmpfs", "-o", options, "tmpfs", str(folder)],
        capture_output=True,
        text=True,
    )
    try:
        done = mount(f"size={size}")
    except FileNotFoundError:
        pytest.skip("no mount here")
    if done.returncode:
        pytest.skip(f"mounting a tmpfs is not permitted: {done.stderr.strip()}")
    try:
        yield lambda options: subprocess.run(
            ["mount", "-o", f"remount,{options}", str(folder)], check=True
        )
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


SOME = [
    "train.py",
    pytest.param("generate_data.py", marks=pytest.mark.slow),
    pytest.param("eval.py", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("name", SOME)
def test_full_disk(world, tmp_path, tmp_path_factory, name):
    """One clear line that names the file; what was finished is kept; with more space the same
    command ends with the same files.
    """
    expected, disk = straight(world, name, tmp_path_factory), tmp_path / "disk"
    # The first checkpoint of training fits, and half of the second; or four blocks of rows, each a
    # page of 4096 bytes.
    size = sum(
        len(data)
        for file, data in expected.items()
        if f"step_{STEPS:08d}" in file and isinstance(data, bytes)
    )
    with small_disk(disk, 2 * size if name == "train.py" else 6 * 4096) as remount:
        command = COMMANDS[name](world, target(name, disk))
        one_line(
            script(*command),
            f"^error: {disk}.* cannot be written .No space left on device.: free space",
        )
        finished = [
            file
            for file in disk.rglob("*")
            if file.is_file()
            and ("/step_" in str(file) or "parts/0" in str(file))
            and file.suffix != ".tmp"
        ]
        kept = {file: file.stat().st_mtime_ns for file in finished}
        assert len(kept) > 2, "the disk was too small for this test"
        if name == "train.py":
            for file in (
                disk / "checkpoints/step_00000002/trainer.safetensors",
                disk / "adapter/model.safetensors",
            ):
                assert checkpoint.load_tensors(file)
        remount("size=100m")
        done = script(*command)
        assert done.status == 0 and (
            name != "train.py" or f"continuing {disk} at step 2" in done.out
        ), done.err
        assert contents(disk) == expected


@pytest.mark.parametrize("name", SOME)
def test_read_only_disk(world, tmp_path, name):
    with small_disk(tmp_path / "disk", 10**6) as remount:
        remount("ro")
        one_line(
            script(*COMMANDS[name](world, target(name, tmp_path / "disk"))),
            f"^error: {tmp_path}/disk.* cannot be written .Read-only file system.",
        )


# -- signals and lost ranks ------------------------------------------------------------------------


def descendants(pid):
    """Process ids of the children of pid, theirs, and so on."""
    children = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rsplit(")", 1)[1].split()
            children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found = children.get(pid, [])
    return found + [grandchild for child in found for grandchild in descendants(child)]


def alive(pid):
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    return False


def rank_of(pid):
    environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return next((int(entry[5:]) for entry in environment if entry.startswith(b"RANK=")), None)


BEGUN = {
    "train.py": lambda folder: (
        (folder / "log.jsonl").exists()
        and sum('"loss"' in line for line in open(folder / "log.jsonl")) > 2
    ),
    "generate_data.py": lambda folder: any(folder.glob("rows.jsonl.parts/0*.jsonl")),
    "eval.py": lambda folder: any(folder.glob("rows.jsonl.parts/0*.jsonl")),
    "demo/prepare.py": lambda folder: any(folder.glob("clips/*.wav")),
}


def begin(name, world, folder, processes=1, **changes):
    """Start the script, wait until it is at work. -> (Popen, all process ids)"""
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        if processes > 1
        else []
    )
    process = start(*launcher, *COMMANDS[name](world, target(name, folder), **changes))
    while not BEGUN[name](folder):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.01)
    return process, [process.pid, *descendants(process.pid)]


def ended(process, pids, seconds):
    """Wait for the end of all. -> what was said"""
    begin = time.time()
    try:
        said, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        for pid in pids:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        pytest.fail(f"still running after {seconds} s: {process.communicate()[0]}")
    while left := [pid for pid in pids if alive(pid)]:
        assert time.time() - begin < seconds, f"orphans: {left}"
        time.sleep(0.05)
    return said


LONGER = {
    "train.py": dict(max_steps=2000, epochs=400, save_every=1000),
    "generate_data.py": {},
    "eval.py": {},
}


@pytest.mark.parametrize("name, number", [
    ("generate_data.py", signal.SIGTERM), ("train.py", signal.SIGINT),
    pytest.param("eval.py", signal.SIGINT, marks=pytest.mark.slow)
])  # fmt: skip
def test_signal_is_answered(world, tmp_path, name, number):
    process, pids = begin(
        name, world, tmp_path, **LONGER[name] | ({"workers": 2} if name == "train.py" else {})
    )
    process.send_signal(number)
    said = ended(process, pids, 60)
    assert (
        f"stopped by {number.name}" in said
        and "the same command continues" in said
        and "Traceback" not in said
    ), said
    assert process.returncode == (0 if name == "train.py" else 128 + number)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("name", LONGER)
def test_signal_to_torchrun(world, tmp_path, name, number):
    process, pids = begin(name, world, tmp_path, 2, **LONGER[name])
    process.send_signal(number)
    said = ended(process, pids, 60)
    assert f"stopped by {number.name}" in said
    assert process.returncode != 0
    if name == "train.py":
        step = int(re.search(r"at step (\d+), saved", said)[1])
        assert (tmp_path / f"checkpoints/step_{step:08d}/trainer.safetensors").exists()


MANY = dict(max_steps=40, epochs=400, save_every=1000, eval_data="", workers=2)


@pytest.fixture(scope="module")
def straight_with_workers(world, tmp_path_factory):
    """The folder of MANY steps by two processes with two data-loading processes each."""
    process, pids = begin("train.py", world, folder := tmp_path_factory.mktemp("many"), 2, **MANY)
    said = ended(process, pids, 300)
    assert process.returncode == 0, said
    return folder


@pytest.mark.parametrize(
    "number, workers", [(signal.SIGTERM, 2), pytest.param(signal.SIGINT, 4, marks=pytest.mark.slow)]
)
def test_signal_with_workers_saves_and_goes_on_to_the_same_bits(
    world, straight_with_workers, tmp_path, number, workers
):
    """torchrun hands the signal to the data-loading processes too: the step that is under way needs
    them. Several epochs.
    """
    process, pids = begin("train.py", world, tmp_path, 2, **MANY | {"workers": workers})
    process.send_signal(number)
    said = ended(process, pids, 60)
    step = int(
        re.search(
            rf"stopped by {number.name} at step (\d+), saved; the same command continues", said
        )[1]
    )
    assert 2 < step < MANY["max_steps"] and [
        folder.name for folder in (tmp_path / "checkpoints").iterdir()
    ] == [f"step_{step:08d}"], said
    process, pids = begin("train.py", world, tmp_path, 2, **MANY | {"workers": workers})
    said = ended(process, pids, 300)
    assert process.returncode == 0 and f"continuing {tmp_path} at step {step}" in said, said
    mine, other = contents(tmp_path), contents(straight_with_workers)
    assert mine.keys() - other.keys() == {file for file in mine if f"step_{step:08d}" in file}
    assert all(mine[file] == other[file] for file in other), [
        file for file in other if mine[file] != other[file]
    ]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("seconds", [0.5, 1.5, 2.5, 3.5])
def test_signal_while_starting(world, tmp_path, number, seconds):
    """Before there is anything to save: no traceback of ours (the first second is Python's own,
    importing torch).
    """
    for name in LONGER:
        process = start(*COMMANDS[name](world, target(name, tmp_path / name), **LONGER[name]))
        time.sleep(seconds)
        process.send_signal(number)
        said = ended(process, [process.pid], 60)
        assert process.returncode in (-number, 0, 1, 128 + number), said
        assert "Traceback" not in said or "import" in said, said


@pytest.mark.slow
@pytest.mark.parametrize("name", ["train.py", "generate_data.py", "eval.py"])
def test_one_of_two_ranks_killed(world, tmp_path, name):
    """The job ends within a minute, says which rank, and leaves nobody behind."""
    process, pids = begin(name, world, tmp_path, 2, **LONGER[name])
    (victim,) = [pid for pid in pids if rank_of(pid) == 1 and pid in descendants(process.pid)]
    os.kill(victim, signal.SIGKILL)
    said = ended(process, pids, 60)
    assert (
        process.returncode != 0
        and re.search(r"rank *: 1 ", said)
        and f"Signal 9 (SIGKILL) received by PID {victim}" in said
    ), said


@pytest.mark.slow
def test_a_rank_that_hangs_is_given_up(world, tmp_path):
    """SIGSTOP: the process lives and answers nothing. With a time limit of 10 s instead of 30
    minutes the other one ends the job.
    """
    (tmp_path / "impatient.py").write_text(
        f"import sys, runpy, datetime; sys.path.insert(0, {str(ROOT)!r}); "
        "from engine import run; run.TIMEOUT = datetime.timedelta(seconds=10)\n"
        "del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    launcher = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        tmp_path / "impatient.py",
    ]
    process = start(*launcher, *training(world, tmp_path / "out", **LONGER["train.py"]))
    while not ((tmp_path / "out").exists() and BEGUN["train.py"](tmp_path / "out")):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.01)
    pids = [process.pid, *descendants(process.pid)]
    (victim,) = [pid for pid in pids if rank_of(pid) == 1]
    os.kill(victim, signal.SIGSTOP)
    said = ended(process, pids, 100)
    assert process.returncode != 0 and "rank 0 lost another rank" in said, said


# -- long runs -------------------------------------------------------------------------------------


def watch(process, every=0.5):
    """-> [(seconds, resident MB, open files)] until the process ends"""
    samples, begin = [], time.time()
    while process.poll() is None:
        with contextlib.suppress(OSError, IndexError):
            pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
            samples.append(
                (
                    time.time() - begin,
                    pages * 4096 / 1e6,
                    len(list(Path(f"/proc/{process.pid}/fd").iterdir())),
                )
            )
        time.sleep(every)
    return np.array(samples)


def flat(samples, what):
    """Memory and handles do not grow over the second two thirds of a run. -> a line that says so"""
    late = samples[len(samples) // 3 :]
    slope = np.polyfit(late[:, 0], late[:, 1], 1)[0] * (late[-1, 0] - late[0, 0])
    line = (
        f"{what}: {samples[-1, 0]:.0f} s, RSS {late[0, 1]:.0f} MB, "
        f"fitted growth over the last two thirds {slope:+.1f} MB, "
        f"files open {int(late[0, 2])} -> {int(late[:, 2].max())}"
    )
    print(line)
    assert slope < 0.05 * late[0, 1] and late[:, 2].max() <= late[: len(late) // 4, 2].max() + 2, (
        line
    )
    return line


@pytest.mark.slow
def test_ten_thousand_rows(world, tmp_path):
    clips = [world.clips[i % 12] for i in range(10_000)]
    out, metadata = tmp_path / "rows.jsonl", write_jsonl(tmp_path / "m.jsonl", clips)
    with open(tmp_path / "said", "w") as said:
        command = generating(
            world,
            out,
            metadata=metadata,
            per_clip=1,
            block=64,
            batch_size=64,
            max_new_tokens=4,
            audio_seconds=1,
        )
        process = subprocess.Popen(
            [sys.executable, *map(str, command)], cwd=ROOT, stdout=said, stderr=said
        )
        samples = watch(process)
    assert process.returncode == 0, (tmp_path / "said").read_text()[-2000:]
    assert len(read_jsonl(out)) == 10_000
    flat(samples, "generate_data.py, 10,000 rows")
    parts = [float(x) for x in re.findall(r"([\d.]+)row/s", (tmp_path / "said").read_text())]
    print(
        f"tqdm's rate: {parts[len(parts) // 4]:.0f} rows/s after a quarter, {parts[-1]:.0f} at the end"
    )


@pytest.mark.slow
def test_two_thousand_steps(world, tmp_path):
    with open(tmp_path / "said", "w") as said:
        command = training(
            world,
            tmp_path / "out",
            max_steps=2000,
            save_every=200,
            global_batch=2,
            micro_batch=1,
            eval_data="",
            audio_seconds=1,
        )
        process = subprocess.Popen(
            [sys.executable, *map(str, command)], cwd=ROOT, stdout=said, stderr=said
        )
        samples = watch(process)
    assert process.returncode == 0, (tmp_path / "said").read_text()[-2000:]
    flat(samples, "train.py, 2,000 steps")
    seconds = [
        record["seconds"] for record in read_jsonl(tmp_path / "out/log.jsonl") if "loss" in record
    ]
    assert len(seconds) == 2000
    first, last = np.median(seconds[200:800]), np.median(seconds[-600:])
    print(
        f"median step: {1000 * first:.1f} ms in steps 200-800, {1000 * last:.1f} ms in the last 600"
    )
    assert last < 1.5 * first


def test_a_process_group_leaves_no_threads_behind(tmp_path):
    """A thread of gloo that outlives Python aborts the process now and then, after all work is
    done: "terminate called without an active exception".
    """
    program = tmp_path / "program.py"
    program.write_text(f"""
import atexit, os, pathlib, sys
sys.path.insert(0, {str(ROOT)!r})
from engine import run

def work():
    run.start_processes()
    import torch._dynamo  # as torch.optim and transformers do
    run.sum_over_ranks(torch.ones(3))

import torch
threads = lambda: [file.read_text().strip() for file in pathlib.Path("/proc/self/task").glob("*/comm")]
file = pathlib.Path({str(tmp_path)!r}) / os.environ["RANK"]
atexit.register(lambda: file.write_text(" ".join(threads())))
run.main(work)
""")
    torchrun(2, program)
    names = [(tmp_path / rank).read_text() for rank in "01"]
    assert all(names) and "gloo" not in "".join(names), names
