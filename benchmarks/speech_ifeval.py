"""
speech_ifeval.py: Speech-IFEval (Lu, Kuan, Lee, Interspeech 2025). Does a speech model still follow
instructions, and how much has it forgotten?

Data: github.com/kehanlu/Speech-IFEval,
`data/eval_data/{closed_ended_questions,creative_writing,chain-of-thought}.jsonl` and `audios.tar`.
`load` takes one of the files, or their folder. With `text_only=True` the frozen backbone reads the
text of the audio instead, which is the reference.

Official rule (instruction_following_eval/ and script/llm_evaluation.py there): closed and creative
rows follow one IFEval instruction each, strictly, by rules of which five differ from Google's
(CHANGED below); an empty answer fails. Chain-of-thought rows are judged by GPT-4o (2024-11-20),
which ends with `Result: YES|NO`: does the answer show any reasoning? A local judge and a count of
sentences are marked as proxies. IFrate is the mean of the three rates,
Δ = (IFrate − reference) / reference. Sentences are counted by Punkt (rules/sentences.py).
"""

import re
from pathlib import Path

from benchmarks import common
from benchmarks.common import chat, mean, percent, require, tally
from benchmarks.rules import ifeval
from benchmarks.rules.sentences import sentences

SYSTEM = "Follow the given instructions."
MAX_NEW_TOKENS = 2048
# Rates of Llama-3.1-8B-Instruct, the backbone of DeSTA2.5, when it reads the text.
REFERENCE = {"closed": 88.32, "creative": 93.75, "cot": 98.50}
FILES = ("closed_ended_questions", "creative_writing", "chain-of-thought")
LABELS = ("instruction", "instruction_id_list", "kwargs")


def bullets(text):
    """How many lines begin with a bullet: * (not **), -, • or a digit."""
    lines, marks = text.replace("\\n", "\n"), (r"\*[^*]", "-", "•", r"\d")
    return sum(ifeval.count(rf"^\s*{mark}.*$", lines, re.M) for mark in marks)


CHANGED = {
    "change_case:english_capital": str.isupper,
    "change_case:english_lowercase": str.islower,
    "combination:repeat_prompt": lambda t, prompt_to_repeat: (
        t.strip().lower().strip("\"'").startswith(prompt_to_repeat.strip().lower())
    ),
    "detectable_format:number_bullet_lists": lambda t, num_bullets: num_bullets == bullets(t),
    "length_constraints:number_paragraphs": lambda t, num_paragraphs: (
        num_paragraphs == ifeval.paragraphs(t.strip(), r"\s*\*\*\*\s*|\n+")
    ),
}
RULES = ifeval.RULES | CHANGED
GROUPS = {
    "change_case:english_capital": "change_case",
    "change_case:english_lowercase": "change_case",
    "detectable_format:json_format": "json_format",
    "startend:quotation": "wrapping",
    "detectable_format:title": "wrapping",
    "combination:repeat_prompt": "startend",
    "startend:end_checker": "startend",
    "detectable_format:number_bullet_lists": "bullet_lists",
    "keywords:existence": "keywords",
    "keywords:forbidden_words": "keywords",
    "length_constraints:number_words": "length_constraints",
    "length_constraints:number_sentences": "length_constraints",
    "length_constraints:number_paragraphs": "length_constraints",
}
JUDGE = (
    "You receive a user's input and the reply of a model. Decide whether the reply shows "
    "reasoning: steps, an explanation, an analysis.\n"
    "Say YES if it contains anything beyond a direct answer to the input, and NO only if it is a "
    "bare, minimal answer.\n"
    'End with the line "Result: YES" or "Result: NO".'
)


def part(row):
    """closed, creative or cot"""
    return {"cot": "cot", "open": "creative"}.get(row.get("metric"), "closed")


def read(path):
    """Rows of one file, or of the three files in a folder. (`*-woprompt`, the task level, is left
    out: it has no instructions to follow.)
    """
    rows, path = [], Path(path)
    files = common.files_in(path, "*.jsonl")
    if path.is_dir():
        # The official judge writes its verdicts into a copy of the chain-of-thought rows.
        judged = path / "reports" / f"llm_eval@{FILES[2]}.jsonl"
        wanted = [path / f"{name}.jsonl" for name in FILES]
        wanted[2] = judged if judged.is_file() else wanted[2]
        files = [file for file in wanted if file.is_file()]
    if not files:
        names = ", ".join(f"{name}.jsonl" for name in FILES)
        raise FileNotFoundError(f"{path}: none of {names} in this folder")
    for file in files:
        for number, row in enumerate(common.read_rows(file), 1):
            needed = ["id", "instruction"] + ["instruction_id_list"] * (part(row) != "cot")
            require(row, needed, f"{file}, row {number}")
            # Each file numbers its rows from 0, so the name of the part makes the id unique. The
            # official scorer does not read the id.
            unique = "/" in str(row["id"])
            rows.append(row | {"id": str(row["id"]) if unique else f"{part(row)}/{row['id']}"})
    return rows


def load(path, audio_root, text_only=False, cot=False, system=None, skip_missing=False):
    """Rows with messages, of one official file or of their folder.

    audio_root: the folder `audios`. text_only: the text of the audio stands in the prompt instead.
    """
    system, rows = (system or SYSTEM) + common.COT * cot, read(path)
    for row in rows:
        # seed_transcript: its name before the release.
        text = row.get("textual_audio") or row.get("seed_transcript")
        needed = "textual_audio" if text_only else "audio_filepath"
        require(row | {"textual_audio": text}, [needed], f"{path}, row {row['id']}")
        if text_only:
            row["messages"] = chat(system, f"Speech Input: {text}\n\n{row['instruction']}")
        else:
            row["messages"] = chat(system, row["instruction"], [row["audio_filepath"]])
    return common.check(rows, audio_root, skip_missing)


def with_answer(row, text):
    return row | {"response": text}


def judge_messages(row):
    return chat(JUDGE, f"User input: {row['instruction']}\nModel's Response: {row['response']}")


def read_predictions(path):
    """Outputs or reports of the official repository, or ours: a JSONL file, or a folder of them."""
    return common.unique(read(path))


def score_rules(rows):
    verdicts = [ifeval.follows(row, RULES, [row["response"]]) for row in rows]
    followed = sum(all(verdict) for verdict in verdicts)
    named = []  # (instruction, followed)
    for row, verdict in zip(rows, verdicts):
        named += zip(row["instruction_id_list"], verdict)
    named.sort(key=lambda pair: pair[0])
    return {
        "followed": followed,
        "n": len(rows),
        "rate": percent(followed, len(rows)),
        "groups": tally((GROUPS.get(name, "other"), followed) for name, followed in named),
        "instructions": tally(named),
    }


def score_cot(rows, judge):
    """By GPT-4o's `eval_response` in the rows, or another judge, or a count of sentences."""
    n = len(rows)
    if all(row.get("eval_response") is not None for row in rows):
        texts, result = [row["eval_response"] for row in rows], {"judge": "read from the file"}
    elif judge:
        texts = common.ask(judge, [judge_messages(row) for row in rows])
        result = {"judge": common.judge_name(judge), "proxy": True}
    else:
        followed = sum(len(sentences(row["response"])) > 1 for row in rows)
        return {"more_than_one_sentence": percent(followed, n), "n": n, "proxy": True}
    verdicts = [common.yes_no(text) for text in texts]
    followed, unparsed = verdicts.count(True), verdicts.count(None)
    rate = percent(followed, n)
    return result | {"followed": followed, "n": n, "rate": rate, "unparsed": unparsed}


def delta(ifrate, reference):
    """The forgetting rate Δ in percent."""
    return round(100 * (ifrate - reference) / reference, 2)


def score(rows, judge=None, labels=None, reference=REFERENCE):
    """Rates in percent, of the parts and, where all three are there, IFrate and Δ."""
    skipped = {}
    if labels is not None:
        rows, skipped = common.same_labels(rows, read(labels), LABELS)
    rows, silent = common.answered(rows)
    skipped |= silent
    names = ("closed", "creative", "cot")
    parts = {name: [row for row in rows if part(row) == name] for name in names}
    scores = {"rules": score_rules(parts["closed"] + parts["creative"])}
    for name in ("closed", "creative"):
        if parts[name]:
            scores[name] = score_rules(parts[name])
    if parts["cot"]:
        scores["cot"] = score_cot(parts["cot"], judge)
    if all("rate" in scores.get(name, {}) for name in names):
        rate = mean([scores[name]["rate"] for name in names])
        base = mean([reference[name] for name in names])
        scores["ifrate"] = {
            "ifrate": round(rate, 2),
            "reference": round(base, 2),
            "delta": delta(rate, base),
        }
        if scores["cot"].get("proxy"):
            scores["ifrate"]["proxy"] = True
    return scores | ({"skipped": skipped} if skipped else {})


def summary(scores):
    rules = scores["rules"]
    result = {key: rules[key] for key in ("followed", "n", "rate")}
    result["groups"] = {name: group["accuracy"] for name, group in rules["groups"].items()}
    return result | {key: value for key, value in scores.items() if key in ("cot", "ifrate")}
