"""SAKURA (Yang et al., Interspeech 2025): can a model reason over what it hears? 4 tracks × 500 clips, each with a single-hop question
(name the attribute) and a multi-hop one (use it).

Data: github.com/b08202033/SAKURA `data/{Animal,Emotion,Gender,Language}/metadata.json`, keyed by the audio path in that repository.

Official rule (evaluation/llm_judge.py): GPT-4o (2024-11-20) judges each answer against the one right option; naming no option or
several is incorrect; it replies `Explanation: …` and `Judgement: correct|incorrect`. Accuracy over all rows, an unreadable
judgement counts as wrong; average over the tracks, single and multi apart. Its judgement files are read here. Without a judge
the proxy is: the answer names exactly one of the options, by letter or in full, and it is the right one.
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
    "You judge answers to multiple-choice questions. You are given the question with its options, the right option and a model's answer.\n"
    'Correct: the answer chooses exactly one of the options, in these or equivalent words (for the option happy also "happiness"), and it is '
    "the right one.\nIncorrect: it chooses another option, several options, or none of them.\n"
    "Reply in exactly this form:\nExplanation: <why>\nJudgement: <correct or incorrect>"
)


def track_of(text, where):
    for track in TRACKS:
        if track.lower() in text.lower():
            return track
    raise ValueError(f"{where}: unknown track {text!r}, expected one of {', '.join(TRACKS)}")


def read_labels(path):
    """Two rows, single and multi, per clip of a track's metadata.json, of a track's folder or of the folder of all tracks."""
    rows, path = [], Path(path)
    for file in common.files_in(path, "**/metadata.json"):
        track = track_of(file.resolve().parent.name, file)
        for wav, entry in common.read_json(file).items():
            for hop in HOPS:
                require(entry, (f"{hop}_instruction", f"{hop}_answer"), f"{file}, {wav}")
                row = {"id": f"{track}/{hop}/{wav}", "attribute": track, "type": hop, "wav": wav, "attribute_label": entry.get("attribute_label")}
                rows.append(row | {"instruction": entry[f"{hop}_instruction"], "label": entry[f"{hop}_answer"].strip()})
    return rows


def load(path, audio_root, hop=None, cot=False, system=None, skip_missing=False):
    """`audio_root` is the repository's folder, which the keys of metadata.json start from; `hop` keeps single or multi only."""
    rows = [row for row in read_labels(path) if hop in (None, row["type"])]
    for row in rows:
        row["messages"] = chat((system or SYSTEM) + common.COT * cot, row["instruction"], [row["wav"]])
    return common.check(rows, audio_root, skip_missing)


def with_answer(row, text):
    return {key: value for key, value in row.items() if key != "messages"} | {"response": text}


def dump(rows, path):
    """The official result files, one per track and hop, `{track}_{hop}.json` in the folder `path`."""
    Path(path).mkdir(parents=True, exist_ok=True)
    for track, hop in sorted({(row["attribute"], row["type"]) for row in rows}):
        part = [row for row in rows if (row["attribute"], row["type"]) == (track, hop)]
        results = {row["wav"]: {key: row[key] for key in ("instruction", "response", "label")} for row in part}
        text = json.dumps({"attribute": track, "type": hop, "results": results}, ensure_ascii=False, indent=4)
        (Path(path) / f"{track}_{hop}.json").write_text(text, encoding="utf-8")


def read_predictions(path):
    """Our JSONL, an official result or judgement file, or a folder of them; a judgement joins the answer it belongs to."""
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
        track = track_of(data.get("attribute", file.stem), file)  # judgement files say neither track nor hop: their names do
        hop = data.get("type") or next((hop for hop in HOPS if hop in file.stem.lower()), None)
        if hop not in HOPS:
            raise ValueError(f"{file}: unknown type {hop!r}, expected single or multi, in the file or in its name")
        for wav, entry in data["results"].items():
            row = rows.setdefault((track, hop, wav), {"id": f"{track}/{hop}/{wav}", "attribute": track, "type": hop, "wav": wav})
            entry = {"response" if key == "model_response" else key: value for key, value in entry.items()}
            row |= entry | ({"judge": data["judge_model"]} if data.get("judge_model") else {})
    return list(rows.values())


def judge_messages(row):
    return chat(JUDGE, f"Question: {row['instruction']}\nGround truth answer: {row['label']}\nModel generated response: {row['response']}")


def judgement(text):
    """True, False, or None when the official expression finds no judgement."""
    found = re.search(r"Explanation: (.*?)\nJudgement: (.*?)(?:\n\n|$)", text or "", re.DOTALL)
    return verdict(found[2]) if found else None


def verdict(word):
    return {"correct": True, "incorrect": False}.get(word.strip(' \n"*.').lower())


def options(instruction):
    """{letter: text} of the options written into the question as (a) … (b) …"""
    return {letter: text.strip() for letter, text in re.findall(r"(?<!\w)\(([a-z])\)\s*(.*?)(?=\s*(?<!\w)\([a-z]\)|$)", instruction, re.DOTALL)}


def named_options(response, instruction):
    """The letters of the options that an answer names: as (a), as a bare letter where an answer stands, or by their text."""
    choices = options(instruction)
    letter = r"(?<!\w)\(([a-z])\)|^\W*([a-z])(?:[).:,]|\W*$)|\b(?:answer is|option|choice):? ([a-z])(?=[).,:;]|\W*$)"
    named = {found for groups in re.findall(letter, response.strip().lower()) for found in groups if found in choices}
    text = f" {common.normalize(response).strip()} "
    for letter, choice in sorted(choices.items(), key=lambda item: -len(item[1])):  # longest first: "very sad" is not "sad"
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
        wanted = read_labels(labels)
        rows, skipped = common.same_labels([row | {"label": str(row.get("label")).strip()} for row in rows], wanted, LABELS)
    good = [row for row in rows if all(isinstance(row.get(key), str) for key in ("instruction", "response", "label")) and row["label"].strip()]
    if len(good) < len(rows):
        skipped["no_response_or_label"] = len(rows) - len(good)
        warn(f"{len(rows) - len(good)} of {len(rows)} rows have no response or no label and are not scored")
    if not good:
        raise ValueError("nothing to score: no row has a response and a label")
    if all("Judgement" in row for row in good):
        verdicts = [verdict(row["Judgement"]) for row in good]
        how = {"judge": ", ".join(sorted({row.get("judge", "unnamed") for row in good}))}
    elif judge:
        verdicts = [judgement(text) for text in common.ask(judge, [judge_messages(row) for row in good])]
        how = {"judge": common.judge_name(judge), "proxy": True}
    else:
        verdicts, how = [proxy(row) for row in good], {"rule": "exactly one option named, by letter or text", "proxy": True}
    scores = dict(how)
    for hop in HOPS:
        tracks = {}
        for track in TRACKS:
            found = [verdict for row, verdict in zip(good, verdicts) if (row["attribute"], row["type"]) == (track, hop)]
            if found:
                correct, unparsed = found.count(True), found.count(None)
                tracks[track] = {"accuracy": percent(correct, len(found)), "correct": correct, "n": len(found), "unparsed": unparsed}
        if tracks:
            average = round(mean([100 * track["correct"] / track["n"] for track in tracks.values()]), 2)
            scores[hop] = tracks | {"average": average, "tracks": len(tracks)}
    return scores | ({"skipped": skipped} if skipped else {})


def summary(scores):
    result = {hop: scores[hop]["average"] for hop in HOPS if hop in scores}
    count = sum(track["n"] for hop in HOPS for track in scores.get(hop, {}).values() if isinstance(track, dict))
    return result | {"n": count} | ({"judge": scores["judge"]} if "judge" in scores else {}) | {"proxy": scores.get("proxy", False)}
