"""
sakura.py: SAKURA (Yang et al., Interspeech 2025). Can a model reason over what it hears? Four
tracks of 500 clips, each with a single-hop question (name the attribute) and a multi-hop one (use
it).

Data: github.com/b08202033/SAKURA `data/{Animal,Emotion,Gender,Language}/metadata.json`, keyed by
the audio path in that repository.

Official rule (evaluation/llm_judge.py): GPT-4o (2024-11-20) compares each answer with the one right
option; an answer that names no option, or several, is incorrect. It replies `Explanation: …` and
`Judgement: correct|incorrect`. Accuracy is over all rows, a judgement that cannot be read counts as
wrong, and the tracks are averaged, single and multi apart. Its judgement files are read here.
Without a judge we score by a proxy: the answer names exactly one of the options, by letter or in
full, and it is the right one.
"""

import json
import re
from pathlib import Path

from benchmarks import common
from benchmarks.common import chat, mean, percent, require, warn

SYSTEM = "Focus on the audio clips and instructions."
MAX_NEW_TOKENS = 512
TRACKS = ("Animal", "Emotion", "Gender", "Language")
HOPS = ("single", "multi")
LABELS = ("instruction", "label")
JUDGE = (
    "You judge answers to multiple-choice questions. You are given the question with its options, "
    "the right option and a model's answer.\n"
    "Correct: the answer chooses exactly one of the options, in these or equivalent words (for the "
    'option happy also "happiness"), and it is the right one.\n'
    "Incorrect: it chooses another option, several options, or none of them.\n"
    "Reply in exactly this form:\nExplanation: <why>\nJudgement: <correct or incorrect>"
)


def track_of(text, where):
    for track in TRACKS:
        if track.lower() in text.lower():
            return track
    raise ValueError(f"{where}: unknown track {text!r}, expected one of {', '.join(TRACKS)}")


def read_labels(path):
    """Two rows per clip, single and multi. path: a track's metadata.json, its folder, or the folder
    of all tracks.
    """
    rows, path = [], Path(path)
    for file in common.files_in(path, "**/metadata.json"):
        track = track_of(file.resolve().parent.name, file)
        for wav, entry in common.read_json(file).items():
            for hop in HOPS:
                question, answer = f"{hop}_instruction", f"{hop}_answer"
                require(entry, (question, answer), f"{file}, {wav}")
                row = row_of(track, hop, wav) | {"attribute_label": entry.get("attribute_label")}
                rows.append(row | {"instruction": entry[question], "label": entry[answer].strip()})
    return rows


def row_of(track, hop, wav):
    return {"id": f"{track}/{hop}/{wav}", "attribute": track, "type": hop, "wav": wav}


def load(path, audio_root, hop=None, cot=False, system=None, skip_missing=False):
    """Rows with messages. audio_root: the repository's folder. hop: only "single" or "multi"."""
    rows = [row for row in read_labels(path) if hop in (None, row["type"])]
    system = (system or SYSTEM) + common.COT * cot
    for row in rows:
        row["messages"] = chat(system, row["instruction"], [row["wav"]])
    return common.check(rows, audio_root, skip_missing)


def with_answer(row, text):
    return common.without(row, "messages") | {"response": text}


def dump(rows, path):
    """The official result files in the folder `path`: `{track}_{hop}.json`."""
    Path(path).mkdir(parents=True, exist_ok=True)
    for track, hop in sorted({(row["attribute"], row["type"]) for row in rows}):
        part = [row for row in rows if (row["attribute"], row["type"]) == (track, hop)]
        keys = ("instruction", "response", "label")
        results = {row["wav"]: {key: row[key] for key in keys} for row in part}
        data = {"attribute": track, "type": hop, "results": results}
        text = json.dumps(data, ensure_ascii=False, indent=4)
        (Path(path) / f"{track}_{hop}.json").write_text(text, encoding="utf-8")


def read_predictions(path):
    """Our JSONL, an official result or judgement file, or a folder of them.

    A judgement is joined with the answer that it belongs to.
    """
    rows = {}
    files = common.files_in(path, "*.json")
    if files[0].suffix == ".jsonl":
        rows = common.read_rows(files[0])
        for number, row in enumerate(rows, 1):
            require(row, ("id", "attribute", "type", "wav"), f"{files[0]}, row {number}")
            track_of(row["attribute"], f"{files[0]}, row {number}")
        return common.unique(rows)
    for file in files:
        data = common.read_json(file)
        if not isinstance(data, dict) or not isinstance(data.get("results"), dict):
            raise ValueError(f'{file}: not a SAKURA result file (no object "results")')
        # Judgement files hold neither track nor hop; their names do.
        track = track_of(data.get("attribute", file.stem), file)
        hop = data.get("type") or next((hop for hop in HOPS if hop in file.stem.lower()), None)
        if hop not in HOPS:
            expected = "expected single or multi, in the file or in its name"
            raise ValueError(f"{file}: unknown type {hop!r}, {expected}")
        for wav, entry in data["results"].items():
            row = rows.setdefault((track, hop, wav), row_of(track, hop, wav))
            row |= common.without(entry, "model_response")
            if "model_response" in entry:
                row["response"] = entry["model_response"]
            if data.get("judge_model"):
                row["judge"] = data["judge_model"]
    return list(rows.values())


def judge_messages(row):
    return chat(
        JUDGE,
        f"Question: {row['instruction']}\nGround truth answer: {row['label']}\n"
        f"Model generated response: {row['response']}",
    )


def judgement(text):
    """True, False, or None if the official expression finds no judgement."""
    found = re.search(r"Explanation: .*?\nJudgement: (.*?)(?:\n\n|$)", text or "", re.DOTALL)
    return verdict(found[1]) if found else None


def verdict(word):
    return {"correct": True, "incorrect": False}.get(word.strip(' \n"*.').lower())


def options(instruction):
    """{letter: text} of the options that a question lists as (a) … (b) …"""
    option = r"(?<!\w)\(([a-z])\)\s*(.*?)(?=\s*(?<!\w)\([a-z]\)|$)"
    found = re.findall(option, instruction, re.DOTALL)
    return {letter: text.strip() for letter, text in found}


def named_options(response, instruction):
    """The letters of the options that an answer names: as (a), as a letter where an answer is
    expected, or by the option's text.
    """
    choices = options(instruction)
    lettered = (
        r"(?<!\w)\(([a-z])\)|^\W*([a-z])(?:[).:,]|\W*$)|"
        r"\b(?:answer is|option|choice):? ([a-z])(?=[).,:;]|\W*$)"
    )
    matches = re.findall(lettered, response.strip().lower())
    named = {letter for groups in matches for letter in groups if letter in choices}
    text = f" {common.normalize(response).strip()} "
    # The longest option first: "very sad" does not name "sad".
    for letter, choice in sorted(choices.items(), key=lambda item: -len(item[1])):
        choice = f" {common.normalize(choice).strip()} "
        if choice.strip() and choice in text:
            named.add(letter)
            text = text.replace(choice, " ")
    return named


def proxy(row):
    right = options(row["label"])
    return named_options(row["response"], row["instruction"]) == set(right) and len(right) == 1


def score(rows, judge=None, labels=None):
    skipped = {}
    if labels is not None:
        rows = [row | {"label": str(row.get("label")).strip()} for row in rows]
        rows, skipped = common.same_labels(rows, read_labels(labels), LABELS)
    has_all = lambda row: all(isinstance(row.get(key), str) for key in (*LABELS, "response"))
    good = [row for row in rows if has_all(row) and row["label"].strip()]
    if rest := len(rows) - len(good):
        skipped["no_response_or_label"] = rest
        warn(f"{rest} of {len(rows)} rows have no response or no label and are not scored")
    if not good:
        raise ValueError("nothing to score: no row has a response and a label")
    if all("Judgement" in row for row in good):
        verdicts = [verdict(row["Judgement"]) for row in good]
        how = {"judge": ", ".join(sorted({row.get("judge", "unnamed") for row in good}))}
    elif judge:
        texts = common.ask(judge, [judge_messages(row) for row in good])
        verdicts = [judgement(text) for text in texts]
        how = {"judge": common.judge_name(judge), "proxy": True}
    else:
        verdicts = [proxy(row) for row in good]
        how = {"rule": "exactly one option named, by letter or text", "proxy": True}
    scores = dict(how)
    for hop in HOPS:
        tracks = {}
        for track in TRACKS:
            which = [(row["attribute"], row["type"]) == (track, hop) for row in good]
            found = [verdict for verdict, chosen in zip(verdicts, which) if chosen]
            if found:
                correct, n = found.count(True), len(found)
                tracks[track] = {"accuracy": percent(correct, n), "correct": correct, "n": n}
                tracks[track]["unparsed"] = found.count(None)
        if tracks:
            average = mean([100 * track["correct"] / track["n"] for track in tracks.values()])
            scores[hop] = tracks | {"average": round(average, 2), "tracks": len(tracks)}
    return scores | ({"skipped": skipped} if skipped else {})


def summary(scores):
    result = {hop: scores[hop]["average"] for hop in HOPS if hop in scores}
    tracks = [scores[hop][track] for hop in result for track in TRACKS if track in scores[hop]]
    result["n"] = sum(track["n"] for track in tracks)
    if "judge" in scores:
        result["judge"] = scores["judge"]
    return result | {"proxy": scores.get("proxy", False)}
