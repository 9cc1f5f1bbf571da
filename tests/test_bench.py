"""tools/bench.py: every comparison runs, both sides agree (bench.py asserts it in float32), and the
last line is one JSON object.
"""

import json

import pytest
from conftest import flags, script, torchrun

RANDOM = [
    "--llm",
    "random:tiny",
    "--whisper",
    "random:tiny-whisper",
    "--device",
    "cpu",
    "--dtype",
    "float32",
    "--repeats",
    "1",
]
TINY = {
    "generate": ["--rows", 9, "--batches", "2,4", "--peer_batches", "4", "--max_new_tokens", 20],
    "train": ["--batches", "2"],
    "encode": ["--batches", "2"],
    "audio": [],
    "growth": ["--rows", 8, "--max_new_tokens", 2],
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """{name: (its JSON line, what it printed)}, run once each"""
    out = tmp_path_factory.mktemp("bench") / "bench.jsonl"
    done = {
        name: script("tools/bench.py", name, *RANDOM, "--out", out, *more)
        for name, more in TINY.items()
    }
    assert all(d.status == 0 for d in done.values()), {name: d.err for name, d in done.items()}
    return {name: json.loads(d.out.splitlines()[-1]) for name, d in done.items()} | {"file": out}


def test_both_sides_are_timed(results):
    for name in ("generate", "train", "encode"):
        r = results[name]
        assert r["bench"] == name
        assert r["dtype"] == "torch.float32"
        assert r["ratio"] == pytest.approx(
            r["peer_seconds"] / r["ours_seconds"], rel=1e-6
        )  # one turn: the median ratio is its ratio
        assert r["ours_warm_up"] > 0
        assert r["cpu_ratio"] > 0
        assert r["ceiling_flops"] > 1e8


def test_generate_counts_what_was_done(results):
    r = results["generate"]
    assert r["same_answers"] == 1
    assert r["rows"] == 9
    assert r["ours_batch"] in (2, 4)
    assert r["peer_batch"] == 4
    assert 9 <= r["new_tokens"] <= 9 * 20
    assert r["shared_prefix"] >= 25
    assert 9 * 30 <= r["prompt_tokens"] <= 9 * 200
    assert 0 < r["fraction_of_floor"] < 1


def test_train_step_agrees_with_the_official_composition(results):
    r = results["train"]
    assert abs(r["losses"][0] - r["losses"][1]) < 1e-4
    assert r["losses"][0] > 1
    assert r["peer_peak_bytes"] > 0  # which is larger shows at the real size, below
    assert r["ours_peak_bytes"] >= 0
    assert 0 < r["mfu"] < 1


@pytest.mark.slow
def test_train_step_takes_less_memory_than_the_official_composition(
    smollm2_folder, tiny_en_folder, tmp_path
):
    done = script(
        "tools/bench.py",
        "train",
        *flags(
            llm=smollm2_folder,
            whisper=tiny_en_folder,
            batches=4,
            repeats=1,
            out=tmp_path / "bench.jsonl",
        ),
    )
    r = json.loads(done.out.splitlines()[-1])
    assert abs(r["losses"][0] - r["losses"][1]) < 1e-2 * r["losses"][0]
    assert r["peer_peak_bytes"] > 1.2 * r["ours_peak_bytes"] > 1e8


def test_data(results):
    assert all(
        results["audio"][name]["times_real_time"] > 1
        for name in ("16000.wav", "44100.mp3", "44101.wav")
    )


def test_growth_is_drawn(results, tmp_path):
    assert {p["axis"] for p in results["growth"]["points"]} == {"batch", "prompt length", "rows"}
    done = script(
        "tools/plot.py", "--speed", results["file"], "--out", tmp_path / "new" / "speed.svg"
    )
    assert done.status == 0 and "</svg>" in (tmp_path / "new" / "speed.svg").read_text(
        encoding="utf-8"
    ), done.err


@pytest.mark.parametrize("name", ["generate", "train"])
def test_two_processes_share_our_side(name, results, tmp_path):
    out = tmp_path / "bench.jsonl"
    torchrun(2, "tools/bench.py", name, *RANDOM, "--out", out, *TINY[name])
    r, one = json.loads(out.read_text()), results[name]
    assert r["processes"] == 2
    assert r["device"].startswith("2 × CPU")
    assert r["ratio"] > 0
    for key in ("same_answers", "new_tokens", "prompt_tokens") if name == "generate" else ():
        assert r[key] == one[key]
    if name == "train":
        assert r["losses"] == pytest.approx(one["losses"], rel=1e-4)


@pytest.mark.slow
def test_load_in_fresh_processes(tiny_world):
    done = script("tools/bench.py", "load", "--llm", tiny_world.llm, "--whisper",
        tiny_world.whisper, "--repeats", "1", "--dtype", "float32",
                  "--device", "cpu", "--out", tiny_world.folder / "bench.jsonl")  # fmt: skip
    seconds = json.loads(done.out.splitlines()[-1])["seconds"]
    assert 0 < seconds["torch alone"] < seconds["peer"]
    assert seconds["ours"] > 0


def test_without_a_name_it_says_what_there_is():
    done = script("tools/bench.py")
    assert done.status == 1
    assert "generate|train|encode|audio|load" in done.err
    assert "--peer_batches" in script("tools/bench.py", "--help").out
