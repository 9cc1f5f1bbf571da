"""
carry.py: does what was learned carry over? Corpora and speakers are left out of the training and
asked about afterwards.

    CORPORA=DIR bash runs/real.sh        # first: data/real/all.*.jsonl
    python tools/carry.py                # out/carry/…, and a table; a second run goes on
    python tools/carry.py --only emodb   # the runs with these words in their names alone
    python demo/report.py --data_dir data/real --out out/carry/NAME      # a page to listen to

What is left out is the list LEFT_OUT below: a quarter of an hour a line, on two cores.
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

# A line is one training: without a corpus, and without two of EmoDB's ten speakers, a man and a
# woman, for these two have little to do with each other. EmoDB's fifth pair is the test part of
# runs/real.sh.
LEFT_OUT = [
    ("animals", "emodb 03 08"),
    ("philharmonia", "emodb 10 09"),
    ("asterisk", "emodb 12 14"),
    ("emodb",),
    ("digits", "emodb 11 13"),
    (),  # the same number of steps on everything
]


@dataclass
class Settings:
    data: str = setting("data/real", "folder of runs/real.sh: all.train.jsonl, all.test.jsonl, …")
    out: str = setting("out/carry", "a folder for each run goes here")
    only: str = setting("", "the runs with these words in their names alone: with commas")
    max_steps: int = setting(800, "of each training; 200 teach too little (LOG.md)", low=1)
    processes: int = setting(2, "as many as cores", low=1)


def is_left_out(row, parts):
    """parts: one line of LEFT_OUT."""
    for corpus, *speakers in (part.split() for part in parts):
        if row["dataset"] == corpus and (not speakers or row["group"] in speakers):
            return True
    return False


def runs(train, test):
    """-> {name: (rows to train on, rows to test on)}. Rows hold "dataset" and "group"."""
    found = {}
    for parts in LEFT_OUT:
        if not {part.split()[0] for part in parts} <= {row["dataset"] for row in train}:
            continue  # a corpus is not there
        # Two speakers are asked about; all others are trained on, those of the test part too.
        paired = {part.split()[0] for part in parts if " " in part}
        ours = train + [row for row in test if row["dataset"] in paired]
        asked = test + [row for row in train if row["dataset"] in paired]
        found["without " + " and ".join(parts) if parts else "everything"] = (
            [row for row in ours if not is_left_out(row, parts)],
            [row for row in asked if is_left_out(row, parts) or not parts],
        )
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
        training += ["--out", folder, "--max_steps", s.max_steps]
        training += ["--fit_window", 1, "--n_queries", 32]  # as runs/real.sh
        evaluation = ["eval.py", "--data", test_file, *common, "--adapter", adapter]
        evaluation += ["--out", folder / "predictions.jsonl"]
        for command in (training, evaluation):
            print(f"== {name}: {command[0]}", flush=True)
            child = subprocess.Popen([*torchrun, *map(str, command)])
            try:
                status = child.wait()
            except BaseException:  # Ctrl-C, SIGTERM: the training finishes its step and saves
                child.terminate()
                child.wait()
                raise
            if status:
                raise ValueError(f"{name}: {command[0]} ended with status {status}, see above")
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
    words = [word.strip() for word in s.only.split(",")]
    todo = {name: rows for name, rows in runs(*parts).items() if any(w in name for w in words)}
    if not todo:
        raise ValueError(f"--only {s.only!r}: in none of {', '.join(runs(*parts))}")
    print(table({name: do(name, *rows, s) for name, rows in todo.items()}))


if __name__ == "__main__":
    run.main(main)
