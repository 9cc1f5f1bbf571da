"""
obey.py: are instructions that were never trained still obeyed when the clip is heard instead of
described? Our own benchmark, on the held-out clips of heldout.py.

Data: the held-out rows, of which each clip's question gives way to an instruction of
demo/unseen.jsonl: 60 in 15 kinds (one word, JSON with given keys, in German, …), none of which
stands in demo/instructions/ or demo/instructions.qwen/ (a test compares them). A pair of clip and
instruction is asked three times: with the description, with the clip's sound, and with the sound of
another clip (heldout's wrong clip).

Rule: speech_ifeval's rules, which are IFEval's, and three more (OWN). An answer has to follow all
rules of its instruction; an empty one follows none. What is obeyed says nothing about what was
heard: heldout.py measures that. `unasked` is chance: how often the answers to other kinds of
instructions happen to obey this one.

With '{"asked": "text"}' the same rules are asked about general subjects (demo/unseen.text.jsonl),
without a clip. `--text_only 1` asks the LLM without its adapter; beside it, an LLM that was trained
(LoRA) shows what it has forgotten.
"""

import re
from collections import Counter, deque
from pathlib import Path
from random import Random

import numpy as np

from benchmarks import common, heldout, speech_ifeval
from benchmarks.rules import ifeval

FOLDER = Path(__file__).parent.parent / "demo"
FILES = {"clip": FOLDER / "unseen.jsonl", "text": FOLDER / "unseen.text.jsonl"}
MAX_NEW_TOKENS = 128  # not the adapter's limit: the longest instruction asks for 40 words
FIELDS = ("kind", "instruction", "instruction_id_list", "kwargs")
WAYS = ("description", "sound", "wrong_clip")  # what stands in the clip's place
OWN = {
    "detectable_format:json_keys": lambda t, keys: (
        ifeval.is_json(t) and all(re.search(rf'"{key}"\s*:', t) for key in keys)
    ),
    "detectable_format:numbered_list": lambda t, num_items: (
        num_items == ifeval.count(r"^\s*\d+[.)]\s", t, re.M)
    ),
    "detectable_format:yes_or_no": lambda t: bool(re.fullmatch(r"\W*(yes|no)\W*", t, re.I)),
}
RULES = speech_ifeval.RULES | OWN
read_predictions = heldout.read_predictions


def read_instructions(file):
    """The instructions of a file, kinds taking turns: the first of each kind, the second, …"""
    rows, seen = common.read_rows(file), Counter()
    for number, row in enumerate(rows, 1):
        common.require(row, FIELDS, f"{file}, row {number}")

    def turn(row):
        seen[row["kind"]] += 1
        return seen[row["kind"]]

    return sorted(rows, key=turn)


def pair(rows, instructions, number):
    """`number` different pairs of (row, instruction), the same ones each time.

    instructions: in turns. Domains take turns, too, and each round of all instructions begins with
    another one: in three rounds an instruction meets each of three domains once. A domain's clips
    take turns in random order. ValueError where there are not so many pairs.
    """
    n_kinds = len({instruction["kind"] for instruction in instructions})
    clips = {}
    for row in Random(0).sample(rows, len(rows)):
        clips.setdefault(row["domain"], deque()).append(row)
    domains = [clips[name] for name in sorted(clips)]
    chosen, used = [], set()
    for i in range(number):
        round_, position = divmod(i, len(instructions))
        turn, kind = divmod(position, n_kinds)
        queue = domains[(kind + turn + round_) % len(domains)]
        row = next((row for row in queue if (row["id"], position) not in used), None)
        if row is None:
            raise ValueError(f"pairs: these {len(rows)} clips give only {i} of {number}")
        queue.remove(row)
        queue.append(row)
        used.add((row["id"], position))
        chosen.append((row, instructions[position]))
    return chosen


def load(path, audio_root, pairs=180, asked="clip", ways="", system=None, text_only=False):
    """Rows with "messages", those about a clip with "wrong_messages", too.

    path: the held-out rows (see heldout.load); not read with asked="text", which asks each
    instruction once. system: a system prompt, or a .json of messages, to stand before the question.
    Without it that is what the adapter was trained with; before a text, nothing.
    ways: some of WAYS, with commas, by default all: fewer take less time.
    text_only: answer() then has no model that hears: the only way is the description.
    """
    from model import AUDIO, read_context, with_context  # here, so that scoring needs no torch

    if asked not in FILES:
        raise ValueError(f"asked: {asked!r} is none of {', '.join(FILES)}")
    ways = [way.strip() for way in ways.split(",")] if ways else list(WAYS)
    if unknown := set(ways) - set(WAYS):
        raise ValueError(f"ways: {', '.join(sorted(unknown))} is none of {', '.join(WAYS)}")
    ways = ["description"] if text_only else ways
    instructions = read_instructions(FILES[asked])
    context = read_context(system) if system else None
    if asked == "text":
        for i, one in enumerate(instructions):
            question = {"role": "user", "content": one["instruction"]}
            one |= {"id": f"text/{i}", "domain": "text", "messages": [*(context or []), question]}
        return instructions
    audio = lambda messages: messages[-1]["audios"][0]["audio"]
    differs = lambda row: audio(row["messages"]) != audio(row["wrong_messages"])
    # The first row of each clip, if the next row in heldout's circle is not of the same clip.
    held_out = [row for row in heldout.load(path, audio_root) if differs(row)]
    clips = {row["id"]: row for row in reversed(held_out)}
    rows = []
    for row, one in pair(list(clips.values()), instructions, pairs):
        result = {"id": f"{row['id']}/{len(rows)}", "clip": row["id"], "domain": row["domain"]}
        result |= one | {"description": row["seed_description"], "ways": ways}
        for key in ("messages", "wrong_messages"):
            *before, question = row[key]
            question = question | {"content": f"{AUDIO}\n\n{one['instruction']}"}
            result[key] = with_context([*before, question], context)
        rows.append(result | {"wrong_clip": audio(row["wrong_messages"])})
    return rows


def answer(model, rows, max_new_tokens, root, **options):
    """The rows with "answers", {way: text}. Without a clip the only way is text."""
    from model import description_slot

    ways = {
        "description": ("messages", description_slot(model.tokenizer)),
        "sound": ("messages", None),
        "wrong_clip": ("wrong_messages", None),
    }
    ways = {way: ways[way] for way in rows[0].get("ways", ())} or {"text": ("messages", None)}
    answers = {
        way: model.generate(
            [row[key] for row in rows], max_new_tokens, root=root, fill=fill, **options
        )
        for way, (key, fill) in ways.items()
    }
    return [
        common.without(row, "messages", "wrong_messages", "ways")
        | {"answers": {way: answers[way][i] for way in ways}}
        for i, row in enumerate(rows)
    ]


def obeys(row, text):
    """Whether the text follows all rules of the row's instruction; None if that cannot be decided
    here (languages, without the package langdetect).
    """
    verdicts = ifeval.follows(row, RULES, [text])
    return False if False in verdicts else None if None in verdicts else True


def unasked(rows, way):
    """For each row, the share of answers that obey it among those to the other kinds.

    Kinds take turns, so these are about the next rows.
    """
    n_kinds = len({row["kind"] for row in rows})
    shares = []
    for i, row in enumerate(rows):
        following = (rows + rows)[i + 1 : i + n_kinds]
        others = [other for other in following if other["kind"] != row["kind"]]
        hits = [bool(obeys(row, other["answers"][way])) for other in others]
        shares.append(float(np.mean(hits)) if hits else 0.0)
    return shares


def score(rows, judge=None, labels=None):
    """-> {"obeyed": {way: rate}, "ratio": {"sound/description": rate, …}, "kinds": {kind: {way:
    rate}}, "domains": the same, "n"}; a rate is [value, low, high], the interval by heldout.

    judge and labels, which every task's score takes, are not used.
    """
    ways = [way for way in rows[0]["answers"] if all(way in row["answers"] for row in rows)]
    obeyed = [{way: obeys(row, row["answers"][way]) for way in ways} for row in rows]
    decided = [i for i, verdicts in enumerate(obeyed) if None not in verdicts.values()]
    skipped = len(rows) - len(decided)
    if skipped:
        common.warn(f"{skipped} of {len(rows)} rows need langdetect and are not scored")
    rows, obeyed = [rows[i] for i in decided], [obeyed[i] for i in decided]
    hits = {way: np.array([verdicts[way] for verdicts in obeyed], float) for way in ways}
    hits["unasked"] = np.array(unasked(rows, "sound" if "sound" in ways else ways[0]))

    def rates(field=None, value=None):
        mine = [field is None or row[field] == value for row in rows]
        return {way: heldout.interval(hit[mine], np.ones(sum(mine))) for way, hit in hits.items()}

    scores = {"obeyed": rates()}
    if hits.get("description", np.zeros(1)).any():
        # A ratio of sums over the same pairs: the bootstrap draws pairs, with all their answers.
        others = [way for way in ("sound", "wrong_clip") if way in ways]
        ratio = lambda way: heldout.interval(hits[way], hits["description"])
        scores["ratio"] = {f"{way}/description": ratio(way) for way in others}
    for name, field in (("kinds", "kind"), ("domains", "domain")):
        scores[name] = {
            value: rates(field, value) for value in dict.fromkeys(row[field] for row in rows)
        }
    return scores | {"n": len(rows)} | ({"not_scored": skipped} if skipped else {})


def summary(scores):
    """The last line: the shares that are obeyed, and the ratios with their intervals."""
    obeyed = {way: rate[0] for way, rate in scores["obeyed"].items()}
    rest = {key: scores[key] for key in ("ratio", "n", "not_scored") if scores.get(key)}
    return {"obeyed": obeyed} | rest
