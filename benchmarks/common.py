"""
common.py: what the five benchmarks share. Reading and checking files, Whisper's text normalizer,
WER and CER, questions to a judge.

`normalize` follows openai/whisper `whisper/normalizers/basic.py` (BasicTextNormalizer, diacritics
kept), which the DeSTA authors score with; tests compare it with the one in transformers.
"""

# Nothing here comes from engine/: that would import torch, and scoring a file should start at once.

import hashlib
import json
import re
import sys
import unicodedata
from pathlib import Path

import numpy as np

# Appended to a system prompt by `cot=True`. The paper leaves open whether chain-of-thought helps.
COT = (
    " Before answering, reason step by step about what you hear,"
    " then state the final answer on the last line."
)


def warn(text):
    print(f"warning: {text}", file=sys.stderr)


def read_json(path):
    """The value in a JSON file, or the list of those in a JSONL file.

    Errors: FileNotFoundError; ValueError that names the file and the line.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix != ".jsonl":
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            if "\n{" not in text.strip():
                raise ValueError(f"{path}: not JSON ({error})") from None
    rows = []
    # Not splitlines(): that also cuts at U+2028, which may stand inside an answer.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: not JSON ({error})") from None
    return rows


def read_rows(path):
    """The rows, dicts, of a JSON array or a JSONL file; one object is one row."""
    rows = read_json(path)
    rows = [rows] if isinstance(rows, dict) else rows
    if not rows:
        raise ValueError(f"{path}: no rows")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            found = type(row).__name__
            raise ValueError(f"{path}, row {number}: expected an object, found {found}")
    return rows


def files_in(path, pattern):
    """[path] for a file; the files that match `pattern` in a folder, without what eval.py leaves
    beside its predictions.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    beside = (".scores.json", ".info.json")
    found = [file for file in sorted(path.glob(pattern)) if not file.name.endswith(beside)]
    found = [path] if path.is_file() else found
    if not found:
        raise FileNotFoundError(f"{path}: no {pattern} in this folder")
    return found


def require(row, keys, where):
    """ValueError if the row lacks one of the keys, or holds null. where: how to name the row."""
    missing = [key for key in keys if row.get(key) is None]
    if missing:
        raise ValueError(f"{where}: no {', '.join(missing)} (the row has: {', '.join(row)})")


def chat(system, user, audios=()):
    """Messages in the official form: one <|AUDIO|> per path, then the text."""
    if audios:
        user = "\n\n".join(part for part in ("<|AUDIO|>" * len(audios), user) if part)
    turn = {"role": "user", "content": user}
    if audios:
        turn["audios"] = [{"audio": str(audio), "text": None} for audio in audios]
    return [{"role": "system", "content": system}, turn]


def check(rows, audio_root, skip_missing):
    """The rows whose audio files exist.

    skip_missing: leave the others out with a warning; otherwise FileNotFoundError. ValueError where
    two rows have the same id.
    """
    seen, good, missing = set(), [], []
    for row in rows:
        if row["id"] in seen:
            raise ValueError(f"two rows have the id {row['id']!r}")
        seen.add(row["id"])
        audios = [audio for turn in row["messages"] for audio in turn.get("audios", [])]
        # A clip with a description is given in words (text_only): its file is not needed.
        paths = [audio["audio"] for audio in audios if "description" not in audio]
        absent = [path for path in paths if not (Path(audio_root) / path).is_file()]
        missing += [f"row {row['id']}, {path}" for path in absent]
        if not absent:
            good.append(row)
    if missing:
        count = f"{len(rows) - len(good)} of {len(rows)}"
        text = f"{count} rows lack their audio under {audio_root}; first: {missing[0]}"
        if not skip_missing:
            remedy = """--options '{"skip_missing": true}' leaves such rows out and counts them"""
            raise FileNotFoundError(f"{text} ({remedy})")
        warn(text + "; these rows are left out")
    return good


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def same_labels(rows, labels, fields):
    """The rows that agree with the label rows in `fields`. -> (rows, counts of the others)

    A prediction made for another revision of the labels answers another question: it is counted and
    named, never scored.
    """
    labels = {row["id"]: row for row in labels}
    good, other, unknown = [], [], []
    for row in rows:
        label = labels.get(row["id"])
        if label is None:
            unknown.append(row["id"])
        elif any(row.get(field) != label.get(field) for field in fields):
            other.append(row["id"])
        else:
            good.append(row)
    absent = len(labels.keys() - {row["id"] for row in rows})
    revision = f"another label revision ({', '.join(fields)} differ from the label file)"
    for ids, what in ((other, revision), (unknown, "no row of the label file")):
        if ids:
            count = f"{len(ids)} of {len(rows)} predictions"
            warn(f"{count} belong to {what} and are not scored; first: {ids[0]}")
    counts = {"other_revision": len(other), "unknown_id": len(unknown), "not_predicted": absent}
    return good, counts


def answered(rows):
    """The rows with a response. -> (rows, {} or {"no_response": count}). ValueError if none has."""
    good = [row for row in rows if isinstance(row.get("response"), str)]
    if not good:
        raise ValueError("no row has a response")
    rest = len(rows) - len(good)
    if not rest:
        return good, {}
    warn(f"{rest} of {len(rows)} rows have no response and are not scored")
    return good, {"no_response": rest}


def without(row, *keys):
    """The row less some of its fields."""
    return {key: value for key, value in row.items() if key not in keys}


def unique(rows):
    """The rows, with a warning where an id occurs twice: such a row counts twice."""
    twice = len(rows) - len({row["id"] for row in rows})
    if twice:
        warn(f"{twice} of {len(rows)} rows repeat an id and count again")
    return rows


def percent(part, whole):
    return round(100 * part / whole, 2) if whole else 0.0


def mean(values):
    return sum(values) / len(values) if values else None


def tally(pairs):
    """(name, right) pairs -> {name: {accuracy, correct, n}}, in the order of first appearance."""
    counts = {}
    for name, right in pairs:
        count = counts.setdefault(name, [0, 0])
        count[0] += bool(right)
        count[1] += 1
    return {
        name: {"accuracy": percent(correct, n), "correct": correct, "n": n}
        for name, (correct, n) in counts.items()
    }


def ask(judge, prompts):
    """The judge's answers. judge: a list of conversations -> a list of texts."""
    # An answer that says <|AUDIO|> does not stand for a clip.
    said = lambda turn: turn | {"content": turn["content"].replace("<|AUDIO|>", "")}
    prompts = [[said(turn) for turn in messages] for messages in prompts]
    answers = judge(prompts) if prompts else []
    if len(answers) != len(prompts):
        raise ValueError(f"the judge gave {len(answers)} answers to {len(prompts)} questions")
    return answers


def judge_name(judge):
    return getattr(judge, "name", None) or getattr(judge, "__name__", type(judge).__name__)


def yes_no(text):
    """The verdict of a "Result: YES|NO" judgement: True, False, or None if it cannot be read."""
    found = re.search(r"(?i)(?<=result:\s)(yes|no)", text or "")
    return found and found[0].lower() == "yes"


def normalize(text):
    """Whisper's basic normalizer: lower case, without brackets and what is in them, and with spaces
    for symbols and punctuation.
    """
    text = re.sub(r"[<\[][^>\]]*[>\]]", "", text.lower())
    text = re.sub(r"\([^)]+?\)", "", text)
    text = unicodedata.normalize("NFKC", text)
    text = "".join(" " if unicodedata.category(char)[0] in "MSP" else char for char in text)
    return re.sub(r"\s+", " ", text.lower())


def edits(reference, hypothesis):
    """Levenshtein distance of two sequences, one row of the table at a time."""
    numbers = {}  # of each different item
    reference, hypothesis = (
        np.array([numbers.setdefault(item, len(numbers)) for item in items], dtype=np.int64)
        for items in (reference, hypothesis)
    )
    columns = np.arange(len(hypothesis) + 1)
    row = columns
    for item in reference:
        best = np.append(row[0] + 1, np.minimum(row[1:] + 1, row[:-1] + (hypothesis != item)))
        # An insertion is a step to the right, and adds 1.
        row = np.minimum.accumulate(best - columns) + columns
    return int(row[-1])


def error_rate(pairs):
    """(reference, hypothesis) pairs of sequences -> all edits over all reference items, in percent,
    or None where the references are empty.
    """
    total = sum(len(reference) for reference, _ in pairs)
    return percent(sum(edits(*pair) for pair in pairs), total) if total else None
