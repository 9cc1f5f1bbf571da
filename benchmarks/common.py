"""What the five benchmarks share: reading files, checks at the border, Whisper's text normalizer, WER and CER, judge calls.

`normalize` is written here after openai/whisper `whisper/normalizers/basic.py` (BasicTextNormalizer, diacritics kept), the rule
the DeSTA authors score with; tests compare it with the one in transformers.
"""

import hashlib
import json
import re
import sys
import unicodedata
from pathlib import Path

import numpy as np

# Appended to a system prompt by `cot=True`: the paper leaves open what chain-of-thought prompting brings.
COT = " Before answering, reason step by step about what you hear, then state the final answer on the last line."


def warn(text):
    print(f"warning: {text}", file=sys.stderr)


def read_json(path):
    """The parsed JSON of a file, or the list of its lines for JSONL. Errors name the file and the line."""
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
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines(): it also cuts at U+2028 inside an answer
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: not JSON ({error})") from None
    return rows


def read_rows(path):
    """A list of rows from a JSON array or JSONL file."""
    rows = read_json(path)
    rows = [rows] if isinstance(rows, dict) else rows
    if not rows:
        raise ValueError(f"{path}: no rows")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise ValueError(f"{path}, row {number}: expected an object, found {type(row).__name__}")
    return rows


def files_in(path, pattern):
    """[path] for a file, the files that match `pattern` below a folder."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    found = [path] if path.is_file() else sorted(path.glob(pattern))
    if not found:
        raise FileNotFoundError(f"{path}: no {pattern} in this folder")
    return found


def require(row, keys, where):
    missing = [key for key in keys if row.get(key) is None]
    if missing:
        raise ValueError(f"{where}: no {', '.join(missing)} (the row has: {', '.join(row)})")


def chat(system, user, audios=()):
    """Messages in the official form: one `<|AUDIO|>` per path, then the text."""
    if audios:
        user = "\n\n".join(part for part in ("<|AUDIO|>" * len(audios), user) if part)
    turn = {"role": "user", "content": user}
    if audios:
        turn["audios"] = [{"audio": str(audio), "text": None} for audio in audios]
    return [{"role": "system", "content": system}, turn]


def check(rows, audio_root, skip_missing):
    """Rows whose ids are unique and whose audio files exist. Missing audio is an error, or left out and counted."""
    seen, good, missing = set(), [], []
    for row in rows:
        if row["id"] in seen:
            raise ValueError(f"two rows have the id {row['id']!r}")
        seen.add(row["id"])
        audios = [a["audio"] for turn in row["messages"] for a in turn.get("audios", []) if "description" not in a]
        absent = [audio for audio in audios if not (Path(audio_root) / audio).is_file()]
        missing += [(row["id"], audio) for audio in absent]
        if not absent:
            good.append(row)
    if missing:
        text = f"{len(rows) - len(good)} of {len(rows)} rows lack their audio under {audio_root}; first: row {missing[0][0]}, {missing[0][1]}"
        if not skip_missing:
            raise FileNotFoundError(text + """ (--options '{"skip_missing": true}' leaves such rows out and counts them)""")
        warn(text + "; these rows are left out")
    return good


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def same_labels(rows, labels, fields):
    """(rows that agree with the label rows, counts of the others). A prediction made on another revision of the labels
    answers another question: it is counted and named, never scored."""
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
            warn(f"{len(ids)} of {len(rows)} predictions belong to {what} and are not scored; first: {ids[0]}")
    return good, {"other_revision": len(other), "unknown_id": len(unknown), "not_predicted": absent}


def unique(rows):
    """The rows; a warning when an id occurs twice, because then a row counts twice."""
    twice = len(rows) - len({row["id"] for row in rows})
    if twice:
        warn(f"{twice} of {len(rows)} rows repeat an id and count again")
    return rows


def percent(part, whole):
    return round(100 * part / whole, 2) if whole else 0.0


def mean(values):
    return sum(values) / len(values) if values else None


def tally(pairs):
    """{name: {accuracy, correct, n}} from (name, right) pairs, names in order of appearance."""
    counts = {}
    for name, right in pairs:
        count = counts.setdefault(name, [0, 0])
        count[0] += bool(right)
        count[1] += 1
    return {name: {"accuracy": percent(*count), "correct": count[0], "n": count[1]} for name, count in counts.items()}


def ask(judge, prompts):
    """The judge's answers; `judge` maps a list of messages lists to a list of texts. An answer that says <|AUDIO|> makes no slot."""
    prompts = [[turn | {"content": turn["content"].replace("<|AUDIO|>", "")} for turn in messages] for messages in prompts]
    answers = judge(prompts) if prompts else []
    if len(answers) != len(prompts):
        raise ValueError(f"the judge gave {len(answers)} answers to {len(prompts)} questions")
    return answers


def judge_name(judge):
    return getattr(judge, "name", None) or getattr(judge, "__name__", type(judge).__name__)


def yes_no(text):
    """The verdict of a `Result: YES|NO` judgement: True, False, or None when it cannot be read."""
    found = re.search(r"(?i)(?<=result:\s)(yes|no)", text or "")
    return found and found[0].lower() == "yes"


def normalize(text):
    """Whisper's basic normalizer: brackets and their contents go, symbols and punctuation become spaces, lower case."""
    text = re.sub(r"[<\[][^>\]]*[>\]]", "", text.lower())
    text = re.sub(r"\([^)]+?\)", "", text)
    text = unicodedata.normalize("NFKC", text)
    text = "".join(" " if unicodedata.category(char)[0] in "MSP" else char for char in text)
    return re.sub(r"\s+", " ", text.lower())


def edits(reference, hypothesis):
    """Levenshtein distance of two sequences, a row of the table at a time."""
    numbers = {}
    reference = np.array([numbers.setdefault(item, len(numbers)) for item in reference], dtype=np.int64)
    hypothesis = np.array([numbers.setdefault(item, len(numbers)) for item in hypothesis], dtype=np.int64)
    columns = np.arange(len(hypothesis) + 1)
    row = columns
    for item in reference:
        best = np.append(row[0] + 1, np.minimum(row[1:] + 1, row[:-1] + (hypothesis != item)))
        row = np.minimum.accumulate(best - columns) + columns  # an insertion adds 1 per column to the right
    return int(row[-1])


def error_rate(pairs):
    """Corpus-level rate in percent over (reference, hypothesis) sequences: all edits over all reference items."""
    total = sum(len(reference) for reference, _ in pairs)
    return percent(sum(edits(*pair) for pair in pairs), total) if total else None
