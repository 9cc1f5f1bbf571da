"""
heldout.py: does the trained model hear? Our own benchmark, on clips whose sentences, voices,
recordings or notes were never trained on.

(a) Loss of the target (what the LLM wrote about the description) when the prompt holds the right
    clip, a wrong clip (audio and transcript of another held-out clip, of any domain), no clip, or
    the description in its place. Two more tell hearing from reading: the clip's transcript without
    any sound (`transcript`), and with the wrong clip's sound (`wrong_sound`).
(b) How often the answer names an attribute of the clip: the model's for each of these, and the
    target, which is the upper bound, because nothing can be learned that the targets do not say. An
    attribute is named if the words of its value stand in the answer, and no other value of that
    attribute does.
    `same_domain` is chance: the same answers, scored against the labels of other clips of the same
    domain. It is stricter than the wrong clip, which is mostly of another domain.
    Per corpus, chance is taken within the corpus, and an attribute that has one value there is left
    out: naming it takes no hearing.

Questions are asked as the adapter was trained to be asked (its config.json): after its own context,
and with its own limit of tokens.

Reads the rows that generate_data.py made from the held-out metadata, and that metadata for the
labels.
"""

import json
import random
import re
from pathlib import Path

import numpy as np

from benchmarks import common

MAX_NEW_TOKENS = 36  # for an adapter that does not say; eval.py prefers its own limit
ASKED = ("right", "wrong", "transcript", "wrong_sound")  # what stands in the clip's place
CLIPS = ("description", *ASKED, "none")  # the same for the losses
WAYS = (*CLIPS, "vectors")  # the last without the transcript; only where `ways` asks for it
ANSWERS = ("text", *ASKED, "vectors", "same_domain")


def load(path, audio_root, metadata="", ways=""):
    """Rows that generate_data.py wrote, with "messages" (right clip), "wrong_messages",
    "wrong_sound_messages", "domain" and "attributes".

    metadata: the file with the labels, by default the one that the rows were made from.
    ways: some of WAYS, with commas, by default CLIPS: fewer take less time.
    """
    ways = [way.strip() for way in ways.split(",")] if ways else list(CLIPS)
    if unknown := set(ways) - set(WAYS):
        raise ValueError(f"ways: {', '.join(sorted(unknown))} is none of {', '.join(WAYS)}")
    metadata = metadata or str(path).removesuffix(".jsonl") + ".metadata.jsonl"
    for file in (path, metadata):
        if not Path(file).is_file():
            makers = "`python demo/prepare.py` and `python generate_data.py` make the demo's"
            raise FileNotFoundError(f"{file} is missing: {makers}")
    labels = {clip.get("id"): clip for clip in common.read_rows(metadata)}
    rows = common.read_rows(path)
    needed = ("id", "messages", "prompt", "response", "seed_description")
    for number, row in enumerate(rows, 1):
        where = f"{path}, row {number}"
        common.require(row, needed, where)
        if "segments" not in labels.get(row["id"], {}) or not row["messages"][-1].get("audios"):
            raise ValueError(f"{where}: {row['id']} has no label in {metadata}, or no audio")
    # The wrong clip of a row is the next one in a random circle of rows; a clip can have several.
    order = random.Random(0).sample(rows, len(rows))
    for i, row in enumerate(order):
        others = (other for other in order[i + 1 :] + order[:i] if other["id"] != row["id"])
        other = next(others, row)
        clip = labels[row["id"]]
        *before, question = row["messages"]
        audio = question["audios"][0] | {"description": row["seed_description"]}
        question["audios"] = [audio]
        [wrong] = other["messages"][-1]["audios"][:1]
        wrong_sound = wrong | {"text": audio.get("text")}
        row["wrong_messages"] = [*before, question | {"audios": [wrong]}]
        row["wrong_sound_messages"] = [*before, question | {"audios": [wrong_sound]}]
        row["ways"], row["domain"] = ways, clip["domain"]
        row["attributes"] = {}
        for segment in clip["segments"]:
            named = {name: str(value) for name, value in segment["attributes"].items()}
            row["attributes"] |= named
    return rows


def answer(model, rows, max_new_tokens, root, **options):
    """Everything that needs the model: answers (of ASKED and vectors) and losses for each row.
    options: of model.generate.

    The questions stand after the context that the adapter was trained with.
    """
    # Here, so that scoring works without torch.
    from model import audio_slot, description_slot, with_context

    asked = lambda key: [with_context(row[key], model.config.context) for row in rows]
    right, wrong = asked("messages"), asked("wrong_messages")
    sound = audio_slot(model.tokenizer, model.adapter.n_vectors)
    prompts = {  # what stands in the clip's place: (messages, how it is filled)
        "description": (right, description_slot(model.tokenizer)),
        "right": (right, sound),
        "wrong": (wrong, sound),
        "transcript": (right, audio_slot(model.tokenizer, 0)),
        "wrong_sound": (asked("wrong_sound_messages"), sound),
        "none": (right, lambda audio: []),
        "vectors": (right, lambda audio: sound(audio | {"text": ""})),
    }
    prompts = {name: prompts[name] for name in rows[0]["ways"]}
    answers = {}
    for name in [name for name in prompts if name in (*ASKED, "vectors")]:
        conversations, fill = prompts[name]
        answers[name] = model.generate(
            conversations, max_new_tokens, root=root, fill=fill, **options
        )
    losses = {}
    for name, (conversations, fill) in prompts.items():
        prepared = [
            model.reader.prepare(row | {"messages": messages}, root, fill)
            for row, messages in zip(rows, conversations)
        ]
        losses[name] = []
        for start in range(0, len(prepared), 16):
            sums, counts = model.row_losses(prepared[start : start + 16])
            losses[name] += sums.tolist()
    finished = []
    for i, row in enumerate(rows):
        said = {"text": row["response"]} | {name: answers[name][i] for name in answers}
        result = {
            "id": row["id"],
            "dataset": row.get("dataset", ""),
            "domain": row["domain"],
            "prompt": row["prompt"],
            "description": row["seed_description"],
            "attributes": row["attributes"],
            "wrong_id": row["wrong_messages"][-1]["audios"][0]["audio"],
            "answers": said,
            "loss": {name: losses[name][i] for name in losses},
            "target_tokens": len(prepared[i]["target"]),
        }
        finished.append(result)
    return finished


def read_predictions(path):
    return [json.loads(line) for line in open(path, encoding="utf-8")]


def names(answer, value):
    """Whether each word of the value stands in the answer (a plural s may follow)."""
    words = re.findall(r"\w+", value.lower())
    return all(re.search(rf"\b{re.escape(word)}s?\b", answer.lower()) for word in words)


def is_named(answer, value, values):
    """Whether the answer names the value, and none of the attribute's other values, except those
    that are part of this one.
    """
    others = (v for v in values if v != value and v.lower() not in value.lower())
    return names(answer, value) and not any(names(answer, v) for v in others)


def interval(numerators, denominators, draws=1000):
    """Ratio of sums with its 95 % bootstrap interval over rows. -> [ratio, low, high]"""
    a, b = np.asarray(numerators, float), np.asarray(denominators, float)
    if b.sum() == 0:
        return [float("nan")] * 3
    pick = np.random.default_rng(0).integers(0, len(a), (draws, len(a)))
    ratios = a[pick].sum(1) / np.maximum(b[pick].sum(1), 1e-9)
    low, high = np.percentile(ratios, [2.5, 97.5])
    return [round(float(x), 4) for x in (a.sum() / b.sum(), low, high)]


def naming(rows, attributes, values):
    """How often the answers name these attributes of the rows.

    values: {attribute: set of its values}. -> {"rows", *ANSWERS}, of which same_domain is chance:
    the same answers, scored against the labels of the other rows. What the rows were not asked
    with, predictions of an older version say, is left out.
    """
    labels = [
        [(name, row["attributes"][name]) for name in attributes if name in row["attributes"]]
        for row in rows
    ]
    asked = [len(pairs) for pairs in labels]
    rates = {"rows": sum(n > 0 for n in asked)}
    for source in answers_in(rows):
        hits = []
        for row, pairs in zip(rows, labels):
            said = row["answers"][source]
            hits.append(sum(is_named(said, value, values[name]) for name, value in pairs))
        rates[source] = interval(hits, asked)
    if "right" not in rates:
        return rates
    # For each label: which of the right clips' answers name it? A row's chance is the share of the
    # other rows' answers that do.
    answers = [row["answers"]["right"] for row in rows]
    named = {
        (name, value): np.array([is_named(said, value, values[name]) for said in answers])
        for name, value in {pair for pairs in labels for pair in pairs}
    }
    n_others = max(1, len(rows) - 1)
    chance = [
        sum((named[pair].sum() - named[pair][i]) / n_others for pair in pairs)
        for i, pairs in enumerate(labels)
    ]
    rates["same_domain"] = interval(chance, asked)
    return rates


def answers_in(rows):
    """The names in ANSWERS that all rows hold an answer for."""
    return [name for name in ANSWERS if all(name in row["answers"] for row in rows)]


def values_in(rows):
    """-> {attribute: set of the values it has in these rows}"""
    values = {}
    for row in rows:
        for name, value in row["attributes"].items():
            values.setdefault(name, set()).add(value)
    return values


def score(rows, judge=None, labels=None):
    """-> {"loss": {clip: rate}, "naming": {domain: rates}, "attributes": {domain: {attribute:
    rates}}, "datasets": {dataset: {attribute: rates}}}; a rate is [value, low, high].

    judge and labels, which every task's score takes, are not used: the rows carry their labels.
    """
    tokens = [row["target_tokens"] for row in rows]
    given = [clip for clip in CLIPS if all(clip in row["loss"] for row in rows)]
    loss = {clip: interval([row["loss"][clip] for row in rows], tokens) for clip in given}
    scores = {"loss": loss, "naming": {}, "attributes": {}, "datasets": {}}
    for domain in sorted({row["domain"] for row in rows}):
        group = [row for row in rows if row["domain"] == domain]
        values = values_in(group)
        scores["naming"][domain] = naming(group, list(values), values)
        scores["attributes"][domain] = {name: naming(group, [name], values) for name in values}
    for dataset in sorted({row.get("dataset", "") for row in rows} - {""}):
        group = [row for row in rows if row["dataset"] == dataset]
        values = {name: found for name, found in values_in(group).items() if len(found) > 1}
        scores["datasets"][dataset] = {name: naming(group, [name], values) for name in values}
    return scores


def summary(scores):
    """The last line: losses, naming in each domain, and the share of the text's naming that is
    reached, averaged over the domains.
    """
    domains = scores["naming"]
    sources = [name for name in ANSWERS if all(name in rates for rates in domains.values())]
    share = {}
    for source in sources[1:]:
        shares = [rates[source][0] / max(rates["text"][0], 1e-9) for rates in domains.values()]
        share[source] = round(float(np.mean(shares)), 4)
    return {
        "loss": {clip: values[0] for clip, values in scores["loss"].items()},
        "naming": {
            domain: {source: rates[source][0] for source in sources}
            for domain, rates in domains.items()
        },
        "share_of_text": share,
        "n": sum(rates["rows"] for rates in domains.values()),
    }
