"""Dynamic-SUPERB (Huang et al., ICASSP 2024; phase 2: ICLR 2025): many small speech and audio tasks, one instruction each.

Data: one folder per task with a `metadata.json`, `{"x.wav": {"file", "instruction", "label"}, …}` (`file2` … for further audio), the form
phase 2 uses; phase-1 datasets (`file`, `audio`, `audio2`, `instruction`, `label`) are read from a JSON array or JSONL. Results are
the same objects with `sllm_response`.

Rules, each printed under its own name, for a task's type is not in its data:
- exact_match (phase 1): equal but for case.
- consecutive_words (the DeSTA authors, desta/utils/metrics.py): Whisper's basic normalizer on both, then the label's words stand in a
  row in the answer.
- wer, cer (phase 2, transcription): lower case, no punctuation, corpus level.
- judge_yes (phase 2, classification): an LLM compares answer and label, Llama-3.1-8B-Instruct by default, which is our backbone. One user
  turn, 512 greedy tokens; its verdicts (`evaluation_response` in the official files) are read with `result:\\s*(yes|no)`, case ignored.
"""

import json
import re
import string
from pathlib import Path

from benchmarks import common
from benchmarks.common import chat, mean, percent, require, warn

SYSTEM = "Focus on the audio clips and instructions."
MAX_NEW_TOKENS = 512
LABELS = ("instruction", "label")
JUDGE = (
    "You receive a question, its correct answer or answers, and the reply of a model. Decide whether the reply agrees with the correct answer.\n"
    "The reply may be short and need not repeat the question; its meaning counts. Where one answer is correct it must give exactly one, and\n"
    "clearly; where several are, all of them and no other. A wrong, missing, unclear or additional answer does not agree.\n"
    'Explain briefly, then end with the line "Result: YES" if it agrees and "Result: NO" if it does not.'
)


def read(path):
    """Rows of a task's file, of its folder, or of a folder of tasks or result files; the task is named by the folder or the file."""
    rows, path = [], Path(path)
    files = [path] if path.is_file() else sorted(path.glob("**/metadata.json")) or common.files_in(path, "*.json*")
    for file in files:
        task = file.resolve().parent.name if file.stem == "metadata" else file.stem
        data = common.read_json(file)
        entries = data.items() if isinstance(data, dict) else [(None, entry) for entry in data]
        for number, (wav, entry) in enumerate(entries, 1):
            where = f"{file}, {wav or f'row {number}'}"
            if not isinstance(entry, dict):
                raise ValueError(f"{where}: expected an object with file, instruction and label")
            wav = wav or entry.get("wav") or entry.get("file") or f"{number}"
            entry = {"task": task, "wav": wav} | entry
            require(entry, ("instruction",), where)
            rows.append({"id": f"{entry['task']}/{entry['wav']}"} | entry)
    return rows


def audio_paths(row, audio_root):
    """The row's audio files in order, below the task's folder or below `audio_root` itself."""
    for stem in ("file", "audio"):  # `audio` is a path or {"path": …}
        found = [row.get(f"{stem}{number}") for number in ("", *range(2, 10))]
        found = [audio.get("path") if isinstance(audio, dict) else audio for audio in found]
        found = [audio for audio in found if isinstance(audio, str)]
        if found:
            return [audio if (Path(audio_root) / audio).is_file() else f"{row['task']}/{audio}" for audio in found]
    raise ValueError(f"row {row['id']}: neither file nor audio is a path")


def load(path, audio_root, cot=False, system=None, skip_missing=False):
    rows = read(path)
    for row in rows:
        row["messages"] = chat((system or SYSTEM) + common.COT * cot, row["instruction"], audio_paths(row, audio_root))
    return common.check(rows, audio_root, skip_missing)


def with_answer(row, text):
    return {key: value for key, value in row.items() if key != "messages"} | {"sllm_response": text}


def dump(rows, path):
    """The official result files, one per task, `{task}.json` in the folder `path`."""
    Path(path).mkdir(parents=True, exist_ok=True)
    for task in sorted({row["task"] for row in rows}):
        ours = ("id", "task", "wav", "messages")
        results = {row["wav"]: {key: value for key, value in row.items() if key not in ours} for row in rows if row["task"] == task}
        (Path(path) / f"{task}.json").write_text(json.dumps(results, ensure_ascii=False, indent=4), encoding="utf-8")


def read_predictions(path):
    """Our JSONL, an official result file, or a folder of them."""
    return common.unique(read(path))


def consecutive_words(prediction, label):
    prediction, label = common.normalize(prediction).split(), common.normalize(label).split()
    return any(prediction[i : i + len(label)] == label for i in range(len(prediction) - len(label) + 1))


def plain(text):
    """Lower case without punctuation, single spaces."""
    return " ".join(re.sub(f"[{re.escape(string.punctuation)}]", "", text.lower()).split())


def judge_messages(row):
    parts = f"Question: {row['instruction']}\nGround Truth Answer: {row['label']}\nModel's Response: {row['sllm_response']}"
    return [{"role": "user", "content": f"{JUDGE}\n\n{parts}"}]


def verdict_of(text):
    found = re.search(r"result:\s*(yes|no)", (text or "").lower())
    return found and found[1] == "yes"


def score(rows, judge=None, labels=None):
    skipped = {}
    if labels is not None:
        rows, skipped = common.same_labels(rows, read(labels), LABELS)
    good = [row for row in rows if isinstance(row.get("sllm_response"), str) and row.get("label") is not None and str(row["label"]).strip()]
    if len(good) < len(rows):
        skipped["no_response_or_label"] = len(rows) - len(good)
        warn(f"{len(rows) - len(good)} of {len(rows)} rows have no sllm_response or no label and are not scored")
    if not good:
        raise ValueError("nothing to score: no row has an sllm_response and a label")
    texts = [row["evaluation_response"] for row in good] if all("evaluation_response" in row for row in good) else None
    how = {"judge": "read from the file"} if texts else {"judge": common.judge_name(judge), "proxy": True} if judge else {}
    if judge and not texts:
        texts = common.ask(judge, [judge_messages(row) for row in good])
    verdicts = [verdict_of(text) for text in texts] if texts else [None] * len(good)
    tasks = {}
    for row, verdict in zip(good, verdicts):
        tasks.setdefault(row["task"], []).append((row["sllm_response"], str(row["label"]), verdict))
    scores = {}
    for task, entries in tasks.items():
        pairs = [(plain(label), plain(said)) for said, label, _ in entries]
        scores[task] = {
            "exact_match": percent(sum(said.lower() == label.lower() for said, label, _ in entries), len(entries)),
            "consecutive_words": percent(sum(consecutive_words(said, label) for said, label, _ in entries), len(entries)),
            "wer": common.error_rate([(label.split(), said.split()) for label, said in pairs]),
            "cer": common.error_rate(pairs),
        }
        if texts:
            found = [verdict for _, _, verdict in entries]
            scores[task] |= {"judge_yes": percent(found.count(True), len(found)), "unparsed": found.count(None)}
        scores[task]["n"] = len(entries)
    rules = [rule for rule in ("exact_match", "consecutive_words", "wer", "cer", "judge_yes") if rule != "judge_yes" or texts]
    average = {rule: [task[rule] for task in scores.values() if task[rule] is not None] for rule in rules}
    average = {rule: round(mean(values), 2) if values else None for rule, values in average.items()}
    return {"average_over_tasks": average | {"tasks": len(scores), "n": len(good)} | how, "tasks": scores} | ({"skipped": skipped} if skipped else {})


def summary(scores):
    return scores["average_over_tasks"]
