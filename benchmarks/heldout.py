"""
heldout: does the trained model hear? The demo's own benchmark, on clips whose sentences, voices and parameters were never trained on.

(a) Loss of the target (what the LLM wrote about the description) when the slot holds the right clip, a wrong clip (audio
    and transcript of another held-out clip, drawn from all domains), nothing, or the description itself.
(b) How often the model's answer names an attribute of the clip, for the right and the wrong clip, beside the text answer
    (the upper bound: nothing can be learned that the targets do not say). An attribute is named when its value's words stand in the
    answer and no other value of that attribute does. `same_domain` is a stricter chance than the wrong clip: the answers
    given to the right audio, held against the labels of every other clip of the same domain.

Reads the rows that generate_data.py made from the held-out metadata, and that metadata for the labels.
"""

import json
import random
import re
from pathlib import Path

import numpy as np

from benchmarks import common

MAX_NEW_TOKENS = 36  # as long as a target can be
SLOTS = ("description", "right", "wrong", "none")
ANSWERS = ("text", "right", "wrong", "same_domain")


def load(path, audio_root, metadata=""):
    """Training-form rows + labels -> rows with "messages" (right clip), "wrong_messages", "domain", "attributes"."""
    metadata = metadata or str(path).removesuffix(".jsonl") + ".metadata.jsonl"
    for file in (path, metadata):
        if not Path(file).is_file():
            raise FileNotFoundError(f"{file} is missing: `python demo/prepare.py` and `python generate_data.py` make the demo's")
    labels, rows = {clip.get("id"): clip for clip in common.read_rows(metadata)}, common.read_rows(path)
    for number, row in enumerate(rows, 1):
        common.require(row, ("id", "messages", "prompt", "response", "seed_description"), f"{path}, row {number}")
        if "segments" not in labels.get(row["id"], {}) or not row["messages"][-1].get("audios"):
            raise ValueError(f"{path}, row {number}: {row['id']} has no label in {metadata}, or no audio")
    # A random cyclic order: everybody's wrong clip is the next one's, and nobody is their own neighbour.
    order = random.Random(0).sample(range(len(rows)), len(rows))
    for here, there in zip(order, order[1:] + order[:1]):
        row, other = rows[here], rows[there]
        clip = labels[row["id"]]
        audio = row["messages"][-1]["audios"][0] | {"description": row["seed_description"]}
        row["messages"][-1]["audios"] = [audio]
        row["wrong_messages"] = [*row["messages"][:-1], row["messages"][-1] | {"audios": other["messages"][-1]["audios"]}]
        row["domain"] = clip["domain"]
        row["attributes"] = {name: str(value) for segment in clip["segments"] for name, value in segment["attributes"].items()}
    return rows


def answer(model, rows, max_new_tokens, root, batch_size, **_):
    """Everything that needs the model: two answers and four losses per row."""
    from model import audio_slot, description_slot  # here, so that scoring works without torch

    fills = {
        "description": description_slot(model.tokenizer),
        "right": audio_slot(model.tokenizer, model.adapter.n_vectors),
        "none": lambda audio: [],
    }
    fills["wrong"] = fills["right"]
    answers = {}
    for slot, messages in (("right", "messages"), ("wrong", "wrong_messages")):
        answers[slot] = model.generate([row[messages] for row in rows], max_new_tokens, root=root, batch_size=batch_size)
    losses = {}
    for slot in SLOTS:
        source = "wrong_messages" if slot == "wrong" else "messages"
        prepared = [model.reader.prepare(row | {"messages": row[source]}, root, fills[slot]) for row in rows]
        losses[slot] = []
        for start in range(0, len(prepared), 16):
            sums, counts = model.row_losses(prepared[start : start + 16])
            losses[slot] += sums.tolist()
    finished = []
    for i, row in enumerate(rows):
        finished.append({
            "id": row["id"],
            "domain": row["domain"],
            "prompt": row["prompt"],
            "description": row["seed_description"],
            "attributes": row["attributes"],
            "wrong_id": row["wrong_messages"][-1]["audios"][0]["audio"],
            "answers": {"text": row["response"]} | {slot: answers[slot][i] for slot in ("right", "wrong")},
            "loss": {slot: losses[slot][i] for slot in SLOTS},
            "target_tokens": len(prepared[i]["target"]),
        })  # fmt: skip
    return finished


def read_predictions(path):
    return [json.loads(line) for line in open(path, encoding="utf-8")]


def names(answer, value):
    """Whether every word of the value stands in the answer, as a whole word (a plural s allowed)."""
    return all(re.search(rf"\b{re.escape(word)}s?\b", answer.lower()) for word in re.findall(r"\w+", value.lower()))


def is_named(answer, value, values):
    """Names the value, and none of the other values of the attribute (unless they are part of this one)."""
    others = (v for v in values if v != value and v.lower() not in value.lower())
    return names(answer, value) and not any(names(answer, v) for v in others)


def interval(numerators, denominators, draws=1000):
    """Ratio of sums with its 95 % bootstrap interval over rows -> [ratio, low, high]"""
    a, b = np.asarray(numerators, float), np.asarray(denominators, float)
    if b.sum() == 0:
        return [float("nan")] * 3
    pick = np.random.default_rng(0).integers(0, len(a), (draws, len(a)))
    ratios = a[pick].sum(1) / np.maximum(b[pick].sum(1), 1e-9)
    return [round(float(x), 4) for x in (a.sum() / b.sum(), *np.percentile(ratios, [2.5, 97.5]))]


def naming(rows, attributes, values):
    """Naming rate of text, right, wrong and same_domain answers over the given attributes of the rows."""
    pairs = [[(name, row["attributes"][name]) for name in attributes if name in row["attributes"]] for row in rows]
    asked = [len(p) for p in pairs]
    rates = {"rows": sum(n > 0 for n in asked)}
    for slot in ("text", "right", "wrong"):
        hits = [sum(is_named(row["answers"][slot], value, values[name]) for name, value in p) for row, p in zip(rows, pairs)]
        rates[slot] = interval(hits, asked)
    # For each attribute and value: how often do the *other* rows' right answers name it?
    answers = [row["answers"]["right"] for row in rows]
    table = {(n, v): np.array([is_named(a, v, values[n]) for a in answers]) for n, v in {pair for p in pairs for pair in p}}
    chance = [sum((table[pair].sum() - table[pair][i]) / max(1, len(rows) - 1) for pair in p) for i, p in enumerate(pairs)]
    rates["same_domain"] = interval(chance, asked)
    return rates


def score(rows, judge=None, labels=None):
    """-> {"loss": {slot: rate}, "naming": {domain: rates}, "attributes": {domain: {attribute: rates}}}; a rate is [value, low, high].

    judge and labels are what every task's score takes; here the rows carry their labels, and nothing is judged.
    """
    tokens = [row["target_tokens"] for row in rows]
    scores = {"loss": {slot: interval([row["loss"][slot] for row in rows], tokens) for slot in SLOTS}, "naming": {}, "attributes": {}}
    for domain in sorted({row["domain"] for row in rows}):
        group = [row for row in rows if row["domain"] == domain]
        values = {}
        for row in group:
            for name, value in row["attributes"].items():
                values.setdefault(name, set()).add(value)
        scores["naming"][domain] = naming(group, list(values), values)
        scores["attributes"][domain] = {name: naming(group, [name], values) for name in values}
    return scores


def summary(scores):
    """The last line: losses, naming per domain, and what share of the text upper bound is reached, averaged over domains."""
    domains = scores["naming"].values()
    share = lambda slot: round(float(np.mean([rates[slot][0] / max(rates["text"][0], 1e-9) for rates in domains])), 4)
    return {
        "loss": {slot: values[0] for slot, values in scores["loss"].items()},
        "naming": {domain: {slot: rates[slot][0] for slot in ANSWERS} for domain, rates in scores["naming"].items()},
        "share_of_text": {slot: share(slot) for slot in ("right", "wrong", "same_domain")},
        "n": sum(rates["rows"] for rates in domains),
    }
