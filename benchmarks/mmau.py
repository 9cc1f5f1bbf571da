"""
mmau.py: MMAU (Sakshi et al., ICLR 2025), 1,000 multiple-choice questions (test-mini) on sound,
music and speech.

Data: github.com/Sakshi113/MMAU `mmau-test-mini.json`, a JSON array, and the folder
`test-mini-audios`. The labels were revised several times (v05.15.25 changed a quarter of them), so
a score means little without the hash of its label file.

Official rule (`evaluation.py` there; the DeSTA authors use the same): an answer is right if it has
all words of the right choice, and none that only wrong choices have. Prompt and 512 greedy tokens
are those of the DeSTA2.5-Audio evaluation (its
examples/evaluation/MMAU-v05.15.25/inference_desta25_audio.py; that repository has two other system
prompts).
"""

import json
import re
from pathlib import Path

from benchmarks import common
from benchmarks.common import chat, mean, percent, require, tally, warn

SYSTEM = (
    "Focus on the audio clips and instructions. "
    'Put your answer in the format "The correct answer is: "___" ".'
)
MAX_NEW_TOKENS = 512
TASKS = ("sound", "music", "speech")
LABELS = ("question", "choices", "answer", "task", "difficulty")


def prompt(row):
    *others, last = [f'"{choice}"' for choice in row["choices"]]
    listed = f"{', '.join(others)} or {last}" if others else last
    return f"{row['question']} Choose from the following options: {listed}"


def load(path, audio_root, text_only=False, cot=False, system=None, skip_missing=False):
    """The rows of an official label file. audio_root: the folder that holds `test-mini-audios/`.

    text_only: the clip is given in words, by the `description` that we add to each row.
    """
    rows, system = common.read_rows(path), (system or SYSTEM) + common.COT * cot
    needed = ("id", "audio_id", "question", "choices", *["description"] * text_only)
    for number, row in enumerate(rows, 1):
        require(row, needed, f"{path}, row {number}")
        row["messages"] = chat(system, prompt(row), [row["audio_id"].removeprefix("./")])
        if text_only:
            row["messages"][1]["audios"][0]["description"] = row["description"]
        row |= {"id": str(row["id"])} | ({"cot": True} if cot else {})
    return common.check(rows, audio_root, skip_missing)


def with_answer(row, text):
    """The row with `model_output`, what the model said, and `model_prediction`, what is scored:
    after reasoning (cot) only its last answer, or where no answer is announced, the last line.
    """
    prediction = text.replace("The correct answer is: ", "").strip()
    if row.get("cot"):
        *before, last = re.split(r"(?i)the correct answer is:?", text)
        lines = last.strip().split("\n")
        prediction = (lines[0] if before else lines[-1]).strip() or prediction
    said = {"model_output": text, "model_prediction": prediction}
    return common.without(row, "messages") | said


def dump(rows, path):
    """The JSON array that the official `evaluation.py --input` reads."""
    Path(path).write_text(json.dumps(rows, ensure_ascii=False, indent=2), encoding="utf-8")


def read_predictions(path):
    rows = common.read_rows(path)
    for number, row in enumerate(rows, 1):
        require(row, ("id",), f"{path}, row {number}")
        row["id"] = str(row["id"])  # as load() makes them
    return common.unique(rows)


def words(text):
    return set(re.findall(r"\b\w+\b", str(text).lower()))


def is_right(prediction, answer, choices):
    said, right = words(prediction), words(answer)
    wrong = set().union(*(words(choice) - right for choice in choices))
    return bool(said) and right <= said and not said & wrong


def score(rows, judge=None, labels=None, key="model_prediction"):
    """Accuracies in percent.

    labels: the label file, whose hash is given; predictions for another revision are not scored.
    key: the field that holds the prediction.
    """
    if all(key not in row for row in rows) and any("model_output" in row for row in rows):
        warn(f"no row has {key}; the raw model_output is scored")
        key = "model_output"
    skipped, hashes = {}, {}
    if labels is not None:
        hashes["file"] = common.sha256(Path(labels).read_bytes())
        rows, skipped = common.same_labels(rows, read_predictions(labels), LABELS)
    skipped["no_prediction"] = sum(not isinstance(row.get(key), str) for row in rows)
    rows = [row for row in rows if isinstance(row.get(key), str)]
    skipped["no_answer"] = sum(not str(row.get("answer") or "").strip() for row in rows)
    rows = [row for row in rows if str(row.get("answer") or "").strip()]
    for why in ("no_prediction", "no_answer"):
        if skipped[why]:
            warn(f"{skipped[why]} rows are not scored: {why}")
    if not rows:
        raise ValueError(f"nothing to score: {skipped} (a prediction is read from the key {key})")
    scored = sorted([row["id"], *map(row.get, LABELS)] for row in rows)
    hashes["scored_rows"] = common.sha256(json.dumps(scored, ensure_ascii=False).encode())
    for row in rows:
        where = f"row {row['id']}"
        require(row, ("choices", "task", "difficulty"), where)
        if row["task"] not in TASKS:
            known = ", ".join(TASKS)
            raise ValueError(f"{where}: unknown task {row['task']!r}, expected one of {known}")
    right = [is_right(row[key], row["answer"], row["choices"]) for row in rows]
    by = {}
    for field in ("task", "difficulty", "sub-category"):
        pairs = [(row.get(field), ok) for row, ok in zip(rows, right)]
        by[field] = tally((str(name), ok) for name, ok in pairs if name is not None)
    chance = {}  # of a choice drawn at random
    for name in ("total", *TASKS):
        odds = [1 / len(row["choices"]) for row in rows if name in ("total", row["task"])]
        if odds:
            chance[name] = round(100 * mean(odds), 2)
    total = {"accuracy": percent(sum(right), len(rows)), "correct": sum(right), "n": len(rows)}
    source = {"skipped": skipped, "prediction_key": key, "labels_sha256": hashes}
    return {"total": total, "chance": chance} | by | source


def summary(scores):
    tasks = {task: scores["task"].get(task, {}).get("accuracy", 0.0) for task in TASKS}
    return {"total": scores["total"]["accuracy"], **tasks, "n": scores["total"]["n"]}
