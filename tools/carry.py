"""
carry.py: does what was learned carry over? One corpus, or two speakers, are left out of the
training and asked about afterwards.

    CORPORA=DIR bash runs/real.sh        # first: data/real/all.train.jsonl, all.test.jsonl
    python tools/carry.py                # out/carry/NAME/…, and a table; a second run goes on
    python tools/carry.py --only "without emodb,emodb without 03 08"

What is trained on and tested on is the list `runs` below: a quarter of an hour each on two cores.
EmoDB has ten speakers. Two of them say little, so each pair is held out in turn.
"""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))
from benchmarks.common import read_rows
from engine import run
from engine.checkpoint import write_jsonl
from engine.run import setting
from engine.weights import read_json

SPEAKERS = {"emodb": ("03 08", "10 09", "11 13", "12 14", "15 16")}  # a man, a woman


@dataclass
class Settings:
    data: str = setting("data/real", "folder of runs/real.sh: all.train.jsonl, all.test.jsonl, …")
    out: str = setting("out/carry", "a folder for each run goes here")
    only: str = setting("", "these runs alone: names, with commas")
    max_steps: int = setting(1600, "of each training; 200 teach too little (LOG.md)", low=1)
    processes: int = setting(2, "as many as cores", low=1)


def runs(train, test):
    """-> {name: (rows to train on, rows to test on)}. Rows hold "dataset" and "group"."""
    found = {"everything": (train, test)}
    corpora = sorted({row["dataset"] for row in train})
    for corpus in corpora:
        rest = [row for row in train if row["dataset"] != corpus]
        asked = [row for row in test if row["dataset"] == corpus]
        if len(asked) > 10:  # not the few clips of the demo
            found[f"without {corpus}"] = rest, asked
    for corpus, groups in SPEAKERS.items():
        for pair in groups if corpus in corpora else ():
            out = lambda row: row["dataset"] == corpus and row["group"] in pair.split()
            rows = [row for row in train + test if row["dataset"] == corpus]
            rest = [row for row in rows if not out(row)]
            rest += [row for row in train if row["dataset"] != corpus]
            found[f"{corpus} without {pair}"] = rest, [row for row in rows if out(row)]
    return found


def do(name, train, test, s):
    """One run, unless its scores are there -> the scores of eval.py"""
    folder = Path(s.out) / f"{name.replace(' ', '_')}-{s.max_steps}"
    scores = folder / "predictions.jsonl.scores.json"
    if not scores.is_file():
        for part, rows in (("train", train), ("test", test)):
            write_jsonl(folder / f"{part}.jsonl", [row | {"metadata": None} for row in rows])
            write_jsonl(folder / f"{part}.metadata.jsonl", [row["metadata"] for row in rows])
        torchrun = ["torchrun", "--standalone", f"--nproc_per_node={s.processes}"]
        common = ["--audio_root", s.data]
        test_file, adapter = folder / "test.jsonl", folder / "adapter"
        training = ["train.py", "--data", folder / "train.jsonl", "--eval_data", "", *common]
        training += ["--out", folder, "--fit_window", 1, "--max_steps", s.max_steps]
        evaluation = ["eval.py", "--data", test_file, *common, "--adapter", adapter]
        evaluation += ["--out", folder / "predictions.jsonl"]
        for command in (training, evaluation):
            print(f"== {name}: {command[0]}", flush=True)
            subprocess.run([*torchrun, *map(str, command)], check=True)
    return read_json(scores)


def table(results):
    """Markdown: for each run, attribute and corpus what is named with the right clip."""
    percent = lambda rate: "{:.0f} ({:.0f}–{:.0f})".format(*(100 * x for x in rate))
    lines = ["| run | tested on | clips | text | right clip | wrong clip | chance |"]
    lines += ["| --- " * 7 + "|"]
    for name, scores in results.items():
        for corpus, attributes in scores["datasets"].items():
            for attribute, rates in attributes.items():
                sources = ("text", "right", "wrong", "same_domain")
                cells = [name, f"{corpus}: {attribute}", str(rates["rows"])]
                cells += [percent(rates[source]) for source in sources]
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main():
    s = run.parse_settings(Settings, __doc__)
    parts = []
    for part in ("train", "test"):
        clips = {row["id"]: row for row in read_rows(f"{s.data}/all.{part}.metadata.jsonl")}
        rows = [
            row | {"metadata": clips[row["id"]]} for row in read_rows(f"{s.data}/all.{part}.jsonl")
        ]
        parts.append([row | {"group": row["metadata"].get("group")} for row in rows])
    todo = runs(*parts)
    names = [name.strip() for name in s.only.split(",") if name.strip()] or list(todo)
    if unknown := [name for name in names if name not in todo]:
        raise ValueError(f"--only {unknown[0]!r} is none of {', '.join(todo)}")
    results = {name: do(name, *todo[name], s) for name in names}
    print(table(results))


if __name__ == "__main__":
    run.main(main)
