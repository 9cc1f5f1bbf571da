"""eval.py --task obey: the instructions and their rules, the choice of pairs, the score by hand,
and a run on tiny models.
"""

import json
from collections import Counter

import pytest
import torch
from conftest import ROOT, flags, read_jsonl, script, write_jsonl

from benchmarks import heldout, obey
from benchmarks.common import normalize
from benchmarks.rules import ifeval
from model import DeSTA, description_slot, with_context

UNSEEN = {asked: read_jsonl(file) for asked, file in obey.FILES.items()}
LONG = (
    "I hear a dog that barks twice, then a door, then steps on a wooden floor "
    "and at the end a woman who laughs"
)
# kind -> for each of its instructions (an answer that obeys, one that does not); {} is the question
# to repeat.
SAID = {
    "one word": [("Siren", "A siren."), ("Birdsong.", "bird song"), ('"Violin"', "Sound: violin"),
        ("speech", "")],
    "JSON with keys": [
        ('{"what": "dog", "detail": "loud"}', '{"what": "dog"}'),
        ('```json\n{"heard": "a dog", "sure": "yes"}\n```', "heard: a dog, sure: yes"),
        ('{"content" : ["dog"]}', '{"contents": "dog"}'),
        ('{"answer": "A dog barks."}', '{"answer": "A dog barks."'),
    ],
    "bullets": [
        ("* a dog\n* loud\n* twice", "* a dog\n* loud"), ("- a dog\n- loud\n- twice", "a dog, loud, twice"),
        ("Here:\n* a dog\n* loud", "* a dog\n* loud\n* twice"),
        ("• a dog\n• loud\n• twice", "- a dog\n- loud\n- twice\n- far away"),
    ],
    "capital letters": [("A DOG!", "A dog!"), ("SOUND: DOG, 2 TIMES", "SOUND: dog"),
        ("I HEARD RAIN.", "i heard rain."), ("IT IS LOUD.", "")],
    "another language": [
        ("In der Aufnahme ist ein Hund zu hören, der laut bellt.", "In the recording a dog barks loudly."),
        ("On entend un chien qui aboie dans la rue.", "You hear a dog that barks in the street."),
        ("En la grabación se oye un perro que ladra muy fuerte.",
            "In der Aufnahme ist ein Hund zu hören, der laut bellt."),
        ("Man hört hier einen Hund und danach eine Frau, die lacht.",
            "On entend ici un chien et ensuite une femme qui rit."),
    ],
    "end phrase": [
        ("A dog. That is all.", "That is all. A dog."), ('"A dog. over and out."', "A dog. Over and out"),
        ("A dog barks.\nEnd of report.\n", "End of the report."),
        ("A dog. Thank you for listening.", "A dog. Thank you for listening. Bye."),
    ],
    "first words": [
        ("Clearly, a dog.", "A dog, clearly."), ('"Listen": a dog.', "I listen."),
        ("as far as I can tell it is a dog.", "As far as I see, a dog."),
        ("  Perhaps a dog.", "It is perhaps a dog."),
    ],
    "number of words": [(LONG + ", and then it is all over.", LONG),
        ("A dog that barks at night", "A dog that barks all night long"), (LONG * 2, LONG + "."),
        ("A dog barks.", LONG)],
    "no commas": [("A dog; a door.", "A dog, a door."), ("A dog and a door.", "First, a dog."),
        ("Loud.", ","), ("A dog. A door.", "")],
    "quotation marks": [('"A Dog at Night"', "A Dog at Night"),
        (' "A dog." ', '"A dog." That is it.'), ('"a dog"', '"a dog'), ('"Dogs" and "doors"', "'a dog'")],
    "question first": [("{}\nA dog.", "A dog."), ('"{}" A dog.', "A dog. {}"),
        ("{} A dog.", "My question: {}"), ("{}", "")],
    "postscript": [("A dog.\nP.S. It is loud.", "A dog.\nPS: it is loud."),
        ("A dog.\n\np.s. Bye", "A dog. Post scriptum"), ("A dog. P. S. Loud.", "A dog."),
        ("P.S. A dog.", "")],
    "yes or no": [("Yes.", "Yes, a dog."), ("no", "I do not hear one."), ('"No!"', "Not"),
        ("YES", "yes and no")],
    "numbered list": [
        ("1. a dog\n2. loud\n3. twice", "* a dog\n* loud\n* twice"),
        ("So:\n1) a dog\n2) loud\n3) twice", "1. a dog 2. loud 3. twice"),
        ("1. a dog\n2. loud", "1. a dog\n2. loud\n3. twice"),
        ("1. dog\n 2. door\n 3. step", "dog, door, step"),
    ],
    "number of sentences": [
        ("A dog barks. It is loud.", "A dog barks."),
        ("A dog barks. A door falls. That is all.", "A dog barks! Loudly."),
        ("A dog barks at Mr. Smith", "A dog barks. Then it stops."),
        ("It barks! I like it.", "A dog barks. It is loud. I like it."),
    ],
}  # fmt: skip


# -- the instructions ------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", UNSEEN)
def test_every_rule_knows_an_answer_that_obeys_and_one_that_does_not(asked):
    seen = Counter()
    for row in UNSEEN[asked]:
        obeying, failing = SAID[row["kind"]][seen[row["kind"]]]
        seen[row["kind"]] += 1
        question = row["kwargs"][0].get("prompt_to_repeat", "")
        for said, expected in ((obeying, True), (failing, False)):
            said = said.replace("{}", question)
            assert obey.obeys({"id": "x"} | row, said) is expected, (
                f"{row['instruction']} -> {said}"
            )
        assert obey.obeys({"id": "x"} | row, " \n") is False, "an empty answer obeys nothing"
    assert seen == {kind: len(pairs) for kind, pairs in SAID.items()}
    assert seen.total() == 60
    assert len(seen) == 15


def test_both_files_ask_the_same_rules_in_the_same_order():
    for clip, text in zip(UNSEEN["clip"], UNSEEN["text"], strict=True):
        assert clip["instruction"] != text["instruction"]
        repeats = clip["kind"] == "question first"
        assert all(clip[key] == text[key] for key in ("kind", "instruction_id_list"))
        assert repeats or clip["kwargs"] == text["kwargs"]
        for row in (clip, text) if repeats else ():
            assert row["kwargs"][0]["prompt_to_repeat"] in row["instruction"], (
                "what is to be repeated stands in the instruction"
            )


@pytest.mark.parametrize(
    "pool",
    [
        "demo/instructions",
        "demo/instructions.qwen",
        "demo/instructions.prose",
        "demo/context.json",
        "demo/context.qwen.json",
        "demo/context.prose.json",
        "demo/real/context.json",
    ],
)
def test_none_of_them_was_trained(pool):
    path = ROOT / pool
    if path.is_dir():
        trained = [
            line
            for file in path.glob("*.txt")
            for line in file.read_text(encoding="utf-8").splitlines()
        ]
    else:
        trained = [
            message["content"].split("\n\n")[-1]
            for message in json.loads(path.read_text(encoding="utf-8"))
        ]
    assert trained
    words = lambda text: frozenset(
        normalize(text).split()
    )  # neither the same nor the same words in another order
    unseen = {
        words(row["instruction"]): row["instruction"] for rows in UNSEEN.values() for row in rows
    }
    assert len(unseen) == 120, "two instructions say the same"
    assert not [unseen[words(line)] for line in trained if words(line) in unseen]


# -- the pairs -------------------------------------------------------------------------------------


def clips(**counts):
    return [
        {"id": f"{domain}{i}", "domain": domain} for domain, n in counts.items() for i in range(n)
    ]


@pytest.mark.parametrize("counts, number", [
    (dict(speech=47, sound=50, music=50), 180), (dict(speech=60, sound=20, music=3), 360),
    (dict(speech=30, music=15), 180),
    (dict(speech=60), 180), (dict(a=5, b=6, c=7, d=8), 240),
])  # fmt: skip
def test_pairs_are_different_and_balanced(counts, number):
    instructions, rows = obey.read_instructions(obey.FILES["clip"]), clips(**counts)
    pairs = obey.pair(rows, instructions, number)
    assert pairs == obey.pair(rows, instructions, number), "the same ones each time"
    assert pairs[:45] == obey.pair(rows, instructions, 45), "fewer are the first of more"
    assert len({(row["id"], one["instruction"]) for row, one in pairs}) == len(pairs) == number
    even = lambda values, n: (
        len(count := Counter(values)) == n and max(count.values()) - min(count.values()) <= 1
    )
    domains = [row["domain"] for row, _ in pairs]
    assert even(domains, len(counts))
    assert even([one["instruction"] for _, one in pairs], 60)
    by_kind = [(one["kind"], row["domain"]) for row, one in pairs]
    assert even(by_kind, 15 * len(counts)), "each kind meets each domain equally often"
    for domain, n in counts.items():  # a domain's clips take turns
        used = Counter(row["id"] for row, _ in pairs if row["domain"] == domain)
        assert len(used) == min(n, number // len(counts))
        assert max(used.values()) - min(used.values()) <= 2
    if len(counts) == 3 and number == 180:
        assert len({(one["instruction"], row["domain"]) for row, one in pairs}) == 180


def test_more_pairs_than_there_are():
    instructions = obey.read_instructions(obey.FILES["clip"])
    assert len(obey.pair(clips(a=2), instructions, 120)) == 120
    with pytest.raises(ValueError, match="pairs: these 2 clips give only 120 of 121"):
        obey.pair(clips(a=2), instructions, 121)


# -- the score -------------------------------------------------------------------------------------


def prediction(kind, name, kwargs, domain="sound", **answers):
    return {
        "id": "x",
        "domain": domain,
        "kind": kind,
        "instruction_id_list": [name],
        "kwargs": [kwargs],
        "answers": answers,
    }


def predictions():
    """Four pairs, of two kinds in turns."""
    word = (
        "one word",
        "length_constraints:number_words",
        {"num_words": 2, "relation": "less than"},
    )
    capitals = ("capital letters", "change_case:english_capital", {})
    return [
        prediction(*word, description="Dog.", sound="Dog.", wrong_clip="A cat."),
        prediction(*capitals, description="A DOG.", sound="A dog.", wrong_clip="A CAT."),
        prediction(*word, "music", description="Harp", sound="HARP", wrong_clip="Dog"),
        prediction(*capitals, "music", description="a harp", sound="", wrong_clip="harp"),
    ]


def test_score_by_hand():
    scores = obey.score(predictions())
    value = lambda rates: {way: rate[0] for way, rate in rates.items()}
    # unasked: the sound's answer to the next row. "A dog." is no word, "HARP" is in capitals, ""
    # obeys nothing, "Dog." is not in capitals.
    assert value(scores["obeyed"]) == {
        "description": 0.75,
        "sound": 0.5,
        "wrong_clip": 0.5,
        "unasked": 0.25,
    }
    assert value(scores["ratio"]) == {"sound/description": 0.6667, "wrong_clip/description": 0.6667}
    assert value(scores["kinds"]["one word"]) == {
        "description": 1.0,
        "sound": 1.0,
        "wrong_clip": 0.5,
        "unasked": 0.0,
    }
    assert value(scores["kinds"]["capital letters"]) == {
        "description": 0.5,
        "sound": 0.0,
        "wrong_clip": 0.5,
        "unasked": 0.5,
    }
    assert value(scores["domains"]["music"]) == {
        "description": 0.5,
        "sound": 0.5,
        "wrong_clip": 0.5,
        "unasked": 0.0,
    }
    assert scores["n"] == 4
    assert "not_scored" not in scores
    summary = obey.summary(scores)
    assert summary == {"obeyed": value(scores["obeyed"]), "ratio": scores["ratio"], "n": 4}


def test_interval_of_the_ratio_draws_pairs():
    """Where sound obeys exactly when the description does, the ratio is certain; where it does not,
    it is not.
    """
    rows = predictions() * 10
    for row in rows:
        row["answers"]["sound"] = row["answers"]["description"]
    assert obey.score(rows)["ratio"]["sound/description"] == [1.0, 1.0, 1.0]
    value, low, high = obey.score(predictions() * 10)["ratio"]["sound/description"]
    assert value == 0.6667
    assert 0.35 < low < 0.55
    assert 0.8 < high < 0.95
    by_hand = heldout.interval([1, 0, 1, 0] * 10, [1, 1, 1, 0] * 10)
    assert [value, low, high] == by_hand


def test_languages_are_not_scored_without_langdetect(monkeypatch, capsys):
    rows = predictions() + [
        prediction(
            "another language",
            "language:response_language",
            {"language": "de"},
            description="Hund",
            sound="Hund",
            wrong_clip="",
        )
    ]
    monkeypatch.setattr(ifeval, "detector", lambda: None)
    scores = obey.score(rows)
    assert scores["n"] == 4
    assert scores["not_scored"] == 1 == obey.summary(scores)["not_scored"]
    assert "1 of 5 rows need langdetect" in capsys.readouterr().err
    assert "another language" not in scores["kinds"]


# -- a run on tiny models --------------------------------------------------------------------------

CONTEXT = [
    {"role": "system", "content": "Guess."},
    {"role": "user", "content": "A bark."},
    {"role": "assistant", "content": "A dog."},
]


@pytest.fixture(scope="module")
def model(tiny_world):
    torch.manual_seed(0)
    return DeSTA.from_pretrained(
        tiny_world.llm,
        tiny_world.whisper,
        dtype=torch.float32,
        device="cpu",
        context=CONTEXT,
        **tiny_world.adapter,
    )


@pytest.fixture(scope="module")
def command(tiny_world, model, tmp_path_factory):
    """-> function(out, further flags): what eval.py is called with"""
    model.save_adapter(folder := tmp_path_factory.mktemp("adapter"))
    settings = dict(
        task="obey", data=tiny_world.data / "test.jsonl", adapter=folder, max_new_tokens=6
    )
    return lambda out, **changes: [
        "eval.py",
        *tiny_world.models,
        *flags(**settings | dict(out=out) | changes),
    ]


def asked(world, row, context=None):
    """The conversations that the row stands for. -> {way: messages}"""
    rows = {one["id"]: one for one in read_jsonl(world.data / "test.jsonl")}
    mine, wrong = (rows[row[key]]["messages"] for key in ("clip", "wrong_clip"))

    def turn(messages, **more):
        audio = messages[-1]["audios"][0] | more
        question = {
            "role": "user",
            "content": f"<|AUDIO|>\n\n{row['instruction']}",
            "audios": [audio],
        }
        return with_context([*messages[:-1], question], context)

    return {
        "description": turn(mine, description=row["description"]),
        "sound": turn(mine),
        "wrong_clip": turn(wrong),
    }


def test_from_held_out_rows_to_score(tiny_world, model, command, tmp_path, float32):
    done = script(*command(out := tmp_path / "p.jsonl", options='{"pairs": 18}', block=8))
    assert done.status == 0, done.err
    first = UNSEEN["clip"][0]["instruction"]
    assert (
        "18 rows, at most 6 new tokens, greedy; first prompt:\n  system: Guess.\n"
        f"  user: A bark.\n  assistant: A dog.\n  user: <|AUDIO|>\n\n{first}\n" in done.out
    )
    rows = read_jsonl(out)
    assert Counter(row["domain"] for row in rows) == dict(speech=6, sound=6, music=6)
    assert len({row["id"] for row in rows}) == 18
    fill = {"description": description_slot(model.tokenizer)}
    conversations = [asked(tiny_world, row, CONTEXT) for row in rows]
    for way in ("description", "sound", "wrong_clip"):
        answers = model.generate(
            [c[way] for c in conversations], 6, root=tiny_world.data, fill=fill.get(way)
        )
        assert [row["answers"][way] for row in rows] == answers and len(set(answers)) > 3, way
    assert all(row["clip"] != row["wrong_clip"] for row in rows)
    assert rows[0].keys() >= {
        "kind",
        "instruction",
        "instruction_id_list",
        "kwargs",
    }
    summary = json.loads(done.out.splitlines()[-1])
    assert summary["n"] == 18
    assert set(summary["obeyed"]) == {
        "description",
        "sound",
        "wrong_clip",
        "unasked",
    }
    scores = json.loads(out.with_name("p.jsonl.scores.json").read_text())
    assert scores == json.loads(json.dumps(obey.score(rows)))
    assert len(scores["kinds"]) == 15
    again = script("eval.py", *flags(task="obey", score=out, adapter=tmp_path / "nowhere"))
    assert again.status == 0
    assert again.out.splitlines()[-1] == done.out.splitlines()[-1]
    fewer = json.dumps(dict(pairs=18, ways="sound,description"))
    done = script(*command(tmp_path / "q.jsonl", options=fewer))
    assert done.status == 0 and [row["answers"] for row in read_jsonl(tmp_path / "q.jsonl")] == [
        {way: row["answers"][way] for way in ("sound", "description")} for row in rows
    ], done.err


def test_another_context_and_the_llm_alone(tiny_world, model, command, tmp_path, float32):
    other = tmp_path / "context.json"
    other.write_text(json.dumps([{"role": "system", "content": "Obey."}]))
    few = '{"pairs": 4}'
    done = script(*command(tmp_path / "p.jsonl", options=few, system=other))
    assert done.status == 0 and "first prompt:\n  system: Obey.\n  user: <|AUDIO|>" in done.out, (
        done.err
    )
    for row in read_jsonl(tmp_path / "p.jsonl"):
        messages = asked(tiny_world, row, [{"role": "system", "content": "Obey."}])
        assert [row["answers"][way] for way in ("sound", "wrong_clip")] == [
            model.generate(messages[way], 6, root=tiny_world.data)[0]
            for way in ("sound", "wrong_clip")
        ]
    done = script(*command(tmp_path / "q.jsonl", options=few, system="Obey.", text_only=1))
    heard, read = read_jsonl(tmp_path / "p.jsonl"), read_jsonl(tmp_path / "q.jsonl")
    assert done.status == 0 and [row["answers"] for row in read] == [
        {"description": row["answers"]["description"]} for row in heard
    ], done.err


def test_text_alone(model, command, tmp_path, float32):
    for name, changes in (
        ("adapter", {}),
        ("llm", dict(text_only=1)),
        ("system", dict(system="Obey.")),
    ):
        done = script(
            *command(
                tmp_path / f"{name}.jsonl",
                options='{"asked": "text"}',
                limit=16,
                data="nowhere",
                **changes,
            )
        )
        assert done.status == 0, done.err
        rows = read_jsonl(tmp_path / f"{name}.jsonl")
        before = [{"role": "system", "content": "Obey."}] if changes.get("system") else []
        assert [row["kind"] for row in rows[:15]] == list(SAID)
        assert rows[15]["instruction"] == UNSEEN["text"][1]["instruction"]
        messages = [[*before, {"role": "user", "content": row["instruction"]}] for row in rows]
        assert [row["answers"] for row in rows] == [
            {"text": said} for said in model.generate(messages, 6)
        ], name
        assert json.loads(done.out.splitlines()[-1]).keys() == {"obeyed", "n"}
    both = script(
        "eval.py", *flags(task="obey", score=f"{tmp_path}/adapter.jsonl,{tmp_path}/llm.jsonl")
    )
    assert both.status == 0
    assert len(json.loads(both.out.splitlines()[-1])) == 2


@pytest.mark.parametrize("changes, message", [
    (dict(options='{"asked": "song"}'), "asked: 'song' is none of clip, text"),
    (dict(options='{"ways": "hum"}'), "ways: hum is none of description, sound, wrong_clip"),
    (dict(options='{"pairs": 1000}'), "pairs: these 6 clips give only 360 of 1000"),
    (dict(options='{"pair": 3}'), "--task obey takes no pair"),
    (dict(data="nowhere.jsonl"), "nowhere.jsonl is missing"),
])  # fmt: skip
def test_what_a_user_can_get_wrong(command, tmp_path, changes, message):
    done = script(*command(tmp_path / "p.jsonl", **changes))
    assert done.status != 0
    assert message in done.err.splitlines()[-1]


def test_two_rows_of_one_clip(tiny_world, tmp_path):
    """Each clip counts once, and is never its own wrong clip."""
    rows = read_jsonl(tiny_world.data / "test.jsonl")
    data = write_jsonl(tmp_path / "t.jsonl", [row for row in rows for _ in range(3)])
    (tmp_path / "t.metadata.jsonl").write_bytes(
        (tiny_world.data / "test.metadata.jsonl").read_bytes()
    )
    loaded = obey.load(data, tiny_world.data, pairs=60)
    assert all(row["clip"] != row["wrong_clip"] for row in loaded)
    assert max(Counter(row["clip"] for row in loaded).values()) <= 20
