"""
dynamic_superb.py: Dynamic-SUPERB (Huang et al., ICASSP 2024; phase 2: ICLR 2025), many small speech
and audio tasks, one instruction each.

Data: one folder per task with a `metadata.json`, `{"x.wav": {"file", "instruction", "label"}, …}`
(`file2` … for further audio), the form of phase 2. Phase-1 data sets (`file`, `audio`, `audio2`,
`instruction`, `label`) are read from a JSON array or JSONL. Results are the same objects with
`sllm_response`.

Rules. A task's data does not say which one is its own, so each is printed under its name:
- exact_match (phase 1): equal but for case.
- consecutive_words (the DeSTA authors, desta/utils/metrics.py): after Whisper's basic normalizer,
  the label's words stand next to each other in the answer.
- wer, cer (phase 2, transcription): lower case, no punctuation, corpus level.
- judge_yes (phase 2, classification): an LLM compares answer and label. By default it is
  Llama-3.1-8B-Instruct, our backbone, asked in one user turn, with 512 greedy tokens. Its verdicts
  (`evaluation_response` in the official files) are read with `result:\\s*(yes|no)`, case ignored.
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
    "You receive a question, its correct answer or answers, and the reply of a model. Decide "
    "whether the reply agrees with the correct answer.\n"
    "The reply may be short and need not repeat the question; its meaning counts. Where one answer "
    "is correct it must give exactly one, and\n"
    "clearly; where several are, all of them and no other. A wrong, missing, unclear or additional "
    "answer does not agree.\n"
    'Explain briefly, then end with the line "Result: YES" if it agrees and "Result: NO" if it '
    "does not."
)


def read(path):
    """Rows of a task's file or folder, or of a folder of tasks or of result files.

    The folder of a metadata.json names the task; any other file names it itself.
    """
    rows, path = [], Path(path)
    for file in sorted(path.glob("**/metadata.json")) or common.files_in(path, "*.json*"):
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
    """The row's audio files in order, below `audio_root` or below the task's folder in it."""
    for stem in ("file", "audio"):
        found = [row.get(f"{stem}{number}") for number in ("", *range(2, 10))]
        found = [audio.get("path") if isinstance(audio, dict) else audio for audio in found]
        found = [audio for audio in found if isinstance(audio, str)]
        if found:
            in_root = lambda audio: (Path(audio_root) / audio).is_file()
            return [audio if in_root(audio) else f"{row['task']}/{audio}" for audio in found]
    raise ValueError(f"row {row['id']}: neither file nor audio is a path")


def load(path, audio_root, cot=False, system=None, skip_missing=False):
    """Rows with messages. audio_root: the folder that the tasks' audio paths start from."""
    rows, system = read(path), (system or SYSTEM) + common.COT * cot
    for row in rows:
        row["messages"] = chat(system, row["instruction"], audio_paths(row, audio_root))
    return common.check(rows, audio_root, skip_missing)


def with_answer(row, text):
    return common.without(row, "messages") | {"sllm_response": text}


def dump(rows, path):
    """The official result files in the folder `path`: `{task}.json`."""
    Path(path).mkdir(parents=True, exist_ok=True)
    tasks = {}
    for row in rows:
        results = tasks.setdefault(row["task"], {})
        results[row["wav"]] = common.without(row, "id", "task", "wav", "messages")
    for task, results in tasks.items():
        text = json.dumps(results, ensure_ascii=False, indent=4)
        (Path(path) / f"{task}.json").write_text(text, encoding="utf-8")


def read_predictions(path):
    """Our JSONL, an official result file, or a folder of them."""
    return common.unique(read(path))


def consecutive_words(prediction, label):
    said, label = common.normalize(prediction).split(), common.normalize(label).split()
    n = len(label)
    return any(said[i : i + n] == label for i in range(len(said) - n + 1))


def plain(text):
    """Lower case without punctuation, single spaces."""
    return " ".join(re.sub(f"[{re.escape(string.punctuation)}]", "", text.lower()).split())


def judge_messages(row):
    parts = (
        f"Question: {row['instruction']}\nGround Truth Answer: {row['label']}\n"
        f"Model's Response: {row['sllm_response']}"
    )
    return [{"role": "user", "content": f"{JUDGE}\n\n{parts}"}]


def verdict_of(text):
    found = re.search(r"result:\s*(yes|no)", (text or "").lower())
    return found and found[1] == "yes"


def score(rows, judge=None, labels=None):
    """Every rule for every task, in percent, and the averages over the tasks."""
    skipped = {}
    if labels is not None:
        rows, skipped = common.same_labels(rows, read(labels), LABELS)
    has_label = lambda row: row.get("label") is not None and str(row["label"]).strip()
    good = [row for row in rows if isinstance(row.get("sllm_response"), str) and has_label(row)]
    if rest := len(rows) - len(good):
        skipped["no_response_or_label"] = rest
        warn(f"{rest} of {len(rows)} rows have no sllm_response or no label and are not scored")
    if not good:
        raise ValueError("nothing to score: no row has an sllm_response and a label")
    texts, how = None, {}
    if all("evaluation_response" in row for row in good):
        texts, how = [row["evaluation_response"] for row in good], {"judge": "read from the file"}
    elif judge:
        texts = common.ask(judge, [judge_messages(row) for row in good])
        how = {"judge": common.judge_name(judge), "proxy": True}
    verdicts = [verdict_of(text) for text in texts] if texts else [None] * len(good)
    tasks = {}
    for row, verdict in zip(good, verdicts):
        entry = (row["sllm_response"], str(row["label"]), verdict)
        tasks.setdefault(row["task"], []).append(entry)
    scores = {task: score_task(entries, bool(texts)) for task, entries in tasks.items()}
    average = {}
    for rule in ("exact_match", "consecutive_words", "wer", "cer", *["judge_yes"] * bool(texts)):
        values = [task[rule] for task in scores.values() if task[rule] is not None]
        average[rule] = round(mean(values), 2) if values else None
    average |= {"tasks": len(scores), "n": len(good)} | how
    result = {"average_over_tasks": average, "tasks": scores}
    return result | ({"skipped": skipped} if skipped else {})


def score_task(entries, judged):
    """(answer, label, the judge's verdict) of a task's rows -> {rule: percent}"""
    n = len(entries)
    pairs = [(plain(label), plain(said)) for said, label, _ in entries]
    equal = sum(said.lower() == label.lower() for said, label, _ in entries)
    inside = sum(consecutive_words(said, label) for said, label, _ in entries)
    scores = {
        "exact_match": percent(equal, n),
        "consecutive_words": percent(inside, n),
        "wer": common.error_rate([(label.split(), said.split()) for label, said in pairs]),
        "cer": common.error_rate(pairs),
    }
    if judged:
        verdicts = [verdict for _, _, verdict in entries]
        scores["judge_yes"] = percent(verdicts.count(True), n)
        scores["unparsed"] = verdicts.count(None)
    return scores | {"n": n}


def summary(scores):
    return scores["average_over_tasks"]
