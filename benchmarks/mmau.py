"""MMAU (Sakshi et al., ICLR 2025): 1,000 (test-mini) multiple-choice questions on sound, music and speech.

Data: github.com/Sakshi113/MMAU `mmau-test-mini.json`, a JSON array, and the folder `test-mini-audios`. The labels were revised several
times (v05.15.25 changed a quarter of them), so a score means little without the hash of its label file.

Official rule (`evaluation.py` there; the DeSTA authors use the same): by words. An answer is right when it has all words of
the right choice and none that occur only in a wrong choice. Prompt and 512 greedy tokens: the DeSTA2.5-Audio evaluation (its
examples/evaluation/MMAU-v05.15.25/inference_desta25_audio.py; two other system prompts occur in that repository).
"""

import json
import re
from pathlib import Path

from benchmarks import common
from benchmarks.common import chat, mean, percent, require, tally, warn

SYSTEM = 'Focus on the audio clips and instructions. Put your answer in the format "The correct answer is: "___" ".'
MAX_NEW_TOKENS = 512
TASKS = ("sound", "music", "speech")
LABELS = ("question", "choices", "answer", "task", "difficulty")


def prompt(row):
    choices = [f'"{choice}"' for choice in row["choices"]]
    listed = ", ".join(choices[:-1]) + " or " + choices[-1] if len(choices) > 1 else choices[0]
    return f"{row['question']} Choose from the following options: {listed}"


def load(path, audio_root, text_only=False, cot=False, system=None, skip_missing=False):
    """The rows of an official label file; `audio_root` holds `test-mini-audios/`. text_only: each row has a `description` (ours)."""
    rows = common.read_rows(path)
    for number, row in enumerate(rows, 1):
        require(row, ("id", "audio_id", "question", "choices", *["description"] * text_only), f"{path}, row {number}")
        row["messages"] = chat((system or SYSTEM) + common.COT * cot, prompt(row), [row["audio_id"].removeprefix("./")])
        if text_only:  # the same prompt, its slot filled with words
            row["messages"][1]["audios"][0]["description"] = row["description"]
        row |= {"id": str(row["id"])} | ({"cot": True} if cot else {})
    return common.check(rows, audio_root, skip_missing)


def with_answer(row, text):
    """`model_output` as the model said it, `model_prediction` as it is scored; after reasoning only the last answer counts."""
    prediction = text.replace("The correct answer is: ", "").strip()
    if row.get("cot"):
        prediction = re.split(r"(?i)the correct answer is:?", text)[-1].strip().split("\n")[0] or prediction
    return {key: value for key, value in row.items() if key != "messages"} | {"model_output": text, "model_prediction": prediction}


def dump(rows, path):
    """The JSON array that the official `evaluation.py --input` reads."""
    Path(path).write_text(json.dumps(rows, ensure_ascii=False, indent=2), encoding="utf-8")


def read_predictions(path):
    rows = common.read_rows(path)
    for number, row in enumerate(rows, 1):
        require(row, ("id",), f"{path}, row {number}")
    return common.unique(rows)


def words(text):
    return set(re.findall(r"\b\w+\b", str(text).lower()))


def is_right(prediction, answer, choices):
    said, right = words(prediction), words(answer)
    wrong = set().union(*(words(choice) - right for choice in choices))
    return bool(said) and right <= said and not said & wrong


def score(rows, judge=None, labels=None, key="model_prediction"):
    """Accuracies in percent. `labels`: the label file, to name its hash and refuse predictions made on another revision."""
    if all(key not in row for row in rows) and any("model_output" in row for row in rows):
        warn(f"no row has {key}; the raw model_output is scored")
        key = "model_output"
    skipped, hashes = {}, {}
    if labels is not None:
        hashes["file"] = common.sha256(Path(labels).read_bytes())
        rows, skipped = common.same_labels(rows, common.read_rows(labels), LABELS)
    skipped["no_prediction"] = sum(not isinstance(row.get(key), str) for row in rows)
    rows = [row for row in rows if isinstance(row.get(key), str)]
    skipped["no_answer"] = sum(not str(row.get("answer") or "").strip() for row in rows)
    rows = [row for row in rows if str(row.get("answer") or "").strip()]
    for why in ("no_prediction", "no_answer"):
        if skipped[why]:
            warn(f"{skipped[why]} rows are not scored: {why}")
    if not rows:
        raise ValueError(f"nothing to score: {skipped} (a prediction is read from the key {key})")
    hashes["scored_rows"] = common.sha256(json.dumps(sorted([row["id"], *map(row.get, LABELS)] for row in rows), ensure_ascii=False).encode())
    for row in rows:
        require(row, ("choices", "task", "difficulty"), f"row {row['id']}")
        if row["task"] not in TASKS:
            raise ValueError(f"row {row['id']}: unknown task {row['task']!r}, expected one of {', '.join(TASKS)}")
    right = [is_right(row[key], row["answer"], row["choices"]) for row in rows]
    by = {}
    for field in ("task", "difficulty", "sub-category"):
        by[field] = tally((str(row[field]), ok) for row, ok in zip(rows, right) if row.get(field) is not None)
    total = {"accuracy": percent(sum(right), len(rows)), "correct": sum(right), "n": len(rows)}
    guess = {name: [1 / len(row["choices"]) for row in rows if name in ("total", row["task"])] for name in ("total", *TASKS)}
    chance = {name: round(100 * mean(odds), 2) for name, odds in guess.items() if odds}  # a choice drawn at random
    return {"total": total, "chance": chance} | by | {"skipped": skipped, "prediction_key": key, "labels_sha256": hashes}


def summary(scores):
    tasks = {task: scores["task"].get(task, {}).get("accuracy", 0.0) for task in TASKS}
    return {"total": scores["total"]["accuracy"], **tasks, "n": scores["total"]["n"]}
