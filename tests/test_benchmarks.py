"""The scoring rules, on answers that sit on their edges, and the official files read and written
back. No model is needed.

python -m pytest tests/test_benchmarks.py        # needs benchmarks/requirements.txt (langdetect is
optional)
"""

import json
import random
import sys
import types
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import common, dynamic_superb, heldout, mmau, sakura, speech_ifeval, voicebench  # noqa: E402
from benchmarks.rules import ifeval, phrases  # noqa: E402
from benchmarks.rules.sentences import capital_words, sentences  # noqa: E402


def write(path, rows, lines=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = (
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        if lines
        else json.dumps(rows, ensure_ascii=False)
    )
    path.write_text(text, encoding="utf-8")
    return path


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"RIFF")


# -- common ----------------------------------------------------------------------------------------


def test_normalizer_equals_the_one_in_transformers():
    reference = pytest.importorskip(
        "transformers.models.whisper.english_normalizer"
    ).BasicTextNormalizer()
    rng = random.Random(0)
    alphabet = list(
        "aAbZ zé̈ßİſΩ中ー。、'’“”-–—_.,;:!?()[]<>{}/\\|@#$%^&*+=~`\"0９①½™ﬁ€\n\t\u00a0\u200b\u2028\u3000😀"
    ) + [
        " word ",
        "(x)",
        "[y]",
        "<z>",
        "((",
        "]]",
        "()",
    ]
    for _ in range(5000):
        text = "".join(rng.choice(alphabet) for _ in range(rng.randint(0, 25)))
        assert common.normalize(text) == reference(text), repr(text)
    assert common.normalize("A (b) [c] Dog's  Bé!") == "a dog s bé "


def test_edits_and_error_rates():
    assert [
        common.edits(*pair)
        for pair in (
            ("", ""),
            ("abc", ""),
            ("", "ab"),
            ("kitten", "sitting"),
            ("abc", "abc"),
            ("ab", "ba"),
        )
    ] == [
        0,
        3,
        2,
        3,
        0,
        2,
    ]
    rng = random.Random(1)
    for _ in range(200):  # against the textbook recursion
        a, b = ([rng.choice("xyz") for _ in range(rng.randint(0, 7))] for _ in "ab")
        table = {(i, j): i + j for i in range(len(a) + 1) for j in range(len(b) + 1) if i * j == 0}
        for i in range(1, len(a) + 1):
            for j in range(1, len(b) + 1):
                table[i, j] = min(
                    table[i - 1, j] + 1,
                    table[i, j - 1] + 1,
                    table[i - 1, j - 1] + (a[i - 1] != b[j - 1]),
                )
        assert common.edits(a, b) == table[len(a), len(b)]
    # corpus level: 1 edit over 4 words, not the mean of 0 and 1
    assert common.error_rate([(["a", "b", "c"], ["a", "b", "c"]), (["d"], ["e"])]) == 25.0
    assert common.error_rate([("", "x")]) is None


def test_json_lines_are_cut_at_newlines_only(tmp_path):
    rows = [{"id": "1", "text": "a\u2028b\u0085c\x0bd"}, {"id": "2", "text": "é"}]
    assert common.read_rows(write(tmp_path / "a.jsonl", rows, lines=True)) == rows
    assert common.read_rows(write(tmp_path / "a.json", rows)) == rows
    (tmp_path / "bad.jsonl").write_text('{"id": 1}\n{"id": \n')
    with pytest.raises(ValueError, match=r"bad.jsonl, line 2"):
        common.read_rows(tmp_path / "bad.jsonl")
    with pytest.raises(FileNotFoundError, match="nowhere.json"):
        common.read_rows(tmp_path / "nowhere.json")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="no rows"):
        common.read_rows(tmp_path / "empty.jsonl")


@pytest.mark.parametrize(
    "text, verdict",
    [
        ("Result: YES", True),
        ("so\nresult: no", False),
        ("**Result:** YES", None),
        ("Result:YES", None),
        ("", None),
        (None, None),
    ],
)
def test_yes_no_is_the_official_expression(text, verdict):
    assert common.yes_no(text) is verdict


# -- sentences: answers recorded from NLTK 3.9.1 with the punkt_tab parameters ---------------------

SENTENCES = [
    ("", 0), (" ", 0), ("Hello", 1), ("Hello. World.", 2), ("Dr. Smith went home. He slept.", 2),
    ("Wow!!!", 2), ("Wow!!! Yes.", 2),
    ("What?! No.", 2), ("Really?!", 2), ("He said “Stop.” Then he left.", 1),
    ('He said "Stop." Then he left.', 2), ("(It rained.) We left.", 2),
    ("It costs $3.50. That is a lot.", 2), ("See e.g. the appendix. It helps.", 3),
    ("Wait . . . what?", 4), ("Wait... what? No... Yes.", 3),
    ("1. First\n2. Second\n3. Third", 4), ("1. First item. 2. Second item.", 4),
    ("J. S. Bach wrote it. So did I.", 2),
    ("At 5 p.m. We left. At 6 p.m. it rained.", 2), ("The U.S. Army came. The U.S. is big.", 2),
    ("No period\nNew line\n\nParagraph", 1),
    ("Hi.Bye. Ok.", 2), ("Inc. and Co. merged. Ltd. followed.", 2), ("A!B", 1),
    ("“Really?” she asked. “Yes.”", 2),
    ("Mr. and Mrs. Dash came. Jan. 5 was cold.", 3), ("**Bold.** Next one. *End.*", 4),
    ("I am... happy. You?", 2),
    ("She is No. 1. He is No. 2.", 4), ("• one. • two.", 2), ("ok. and then. but no.", 2),
    ('It ended."\n\n"It began.', 2), ("Fig. 3. shows it.", 2),
    ("He lives on Main St. The house is red.", 2), ("etc. etc. Etc.", 3), (". . .", 3), ("?", 1),
    ("Great!)\n(Next.", 2),
    ("{It rained.} We left.", 2), ("The anti-U.S. mood grew. It did.", 2),
    ("We met 5. Business came.", 1), (" ?!!", 2), (' .? "', 1),
]  # fmt: skip
CAPITALS = [
    ("I CAN'T STOP", 4), ("IT'S OK", 3), ("CANNOT", 2), ("GONNA go", 2), ("A,B", 2), ("A:1 A:B", 3),
    ("U.S.A. rules", 1), ("A-B", 1), ("A/B", 1),
    ("X&Y", 2), ("THE 'ONE'", 2), ("'TIS SO", 3), ("WANNA", 2), ("WANNA GO", 3), ("HE'LL SEE", 3),
    ("ROCK'N'ROLL", 1), ("D'YE KNOW", 3),
    ("No CAPS Here THIS is", 2), ("END. START", 2), ("HELLO... WORLD", 2), ("WE DON'T. WE DO", 5),
    ("“QUOTE”", 1), ("5PM", 1), ("A1 1A", 2),
    ("O'NEIL", 1), ("MORE'N YOU'RE", 4),
]  # fmt: skip


@pytest.mark.parametrize("text, count", SENTENCES)
def test_sentences_as_nltk_counts_them(text, count):
    assert len(sentences(text)) == count


def test_sentences_keep_closing_quotes():
    assert sentences('(He said "no.") She left.  Then') == ['(He said "no.")', "She left.", "Then"]
    assert sentences("{It rained.} We left.") == ["{It rained.}", "We left."]


@pytest.mark.parametrize("text, count", CAPITALS)
def test_capital_words_as_nltk_counts_them(text, count):
    assert capital_words(text) == count


# -- IFEval: (rule, arguments, answers that follow, answers that don't) ----------------------------

GOOGLE = [
    ("keywords:existence", {"keywords": ["cat", "do.s"]}, ["A CAT, dogs", "concatenate dots"],
        ["cat", "dogs"]),
    ("keywords:frequency", {"keyword": " cat ", "frequency": 2, "relation": "at least"},
        ["Cat cat", "cats cat cat"], ["cat"]),
    ("keywords:frequency", {"keyword": "cat", "frequency": 2, "relation": "less than"},
        ["none", "cat"], ["cat cat"]),
    ("keywords:forbidden_words", {"forbidden_words": ["cat"]},
     ["cats", "concat"], ["a Cat!", "cat"]),
    ("keywords:letter_frequency", {"letter": "E", "let_frequency": 3, "let_relation": "at least"},
        ["Eee"], ["ee"]),
    ("length_constraints:number_sentences", {"num_sentences": 2, "relation": "at least"},
        ["One. Two."], ["Dr. One."]),
    ("length_constraints:number_sentences", {"num_sentences": 2, "relation": "less than"},
        ["Dr. One."], ["One. Two.", "Wow!!!"]),
    ("length_constraints:number_words", {"num_words": 3, "relation": "less than"}, ["two words"],
        ["it's two"]),
    ("length_constraints:number_words", {"num_words": 3, "relation": "at least"}, ["it's two"],
        ["two words", "a-b"]),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2},
     ["a\n***\nb", "***a***b***", "a***b"],
     ["a\n\nb", "a*** ***b", "a\n***\n\n***\nb"]),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 3}, ["a***b***c"], ["a*** ***b"]),
    ("length_constraints:nth_paragraph_first_word", {"num_paragraphs": 2, "nth_paragraph": 2,
        "first_word": "Yes"},
     ['a\n\n"Yes, b', "a\n\n'yes' b"], ["a\nyes b", "a\n\nno yes", "a\n\nyes\n\nc", "a\n\nyessir"]),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, ["[a] [b]", "[] [x]"],
        ["[a]", "[a\nb] [c]"]),
    ("detectable_content:postscript", {"postscript_marker": "P.S."},
     ["a\np. s. b", "P.S. x"], ["PS x"]),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, ["p. p.s"], ["p.s."]),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2},
        ["* a\n- b", "x\n  * a\n\n* b\n** c **"], ["* a", "• a\n• b", "1. a\n2. b"]),
    ("detectable_format:constrained_response", {},
     ["So: My answer is yes. Really"], ["my answer is yes."]),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2},
        ["*a* *b*", "**a** *b*"], ["*a*", "**a**", "* * *b*", "*a\nb* *c*"]),
    ("detectable_format:multiple_sections", {"section_spliter": "Section ", "num_sections": 2},
     ["Section 1 a Section2 b"], ["Section 1", "Section a Section b"]),
    ("detectable_format:json_format", {},
     ['{"a": 1}', '```json\n[1]\n```', "```JSON 3```", '```Json{}```', "```\n{}\n```"],
     ["{a: 1}", "x {}", "```yaml\n{}```"]),
    ("detectable_format:title", {}, ["<<a>>", "x <<<b>>> y"], ["<<>>", "<< >>", "<a>", "<<a\n>>"]),
    ("combination:two_responses", {}, ["a******b", "******a******b******"],
        ["a***b", "a******a", "a******\n******b", "a******b******c"]),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say It"}, ["say it now", "  SAY IT"],
        ['"say it"', "I say it"]),
    ("startend:end_checker", {"end_phrase": "The End."},
        ["x the end.", 'x the end."\n', '"THE END."'], ["the end. x", "the end", "the end.'"]),
    ("change_case:capital_word_frequency", {"capital_frequency": 2, "capital_relation": "at least"},
        ["A BC d", "IT'S"], ["A b"]),
    ("change_case:capital_word_frequency", {"capital_frequency": 2,
        "capital_relation": "less than"}, ["A b"], ["A BC"]),
    ("punctuation:no_comma", {}, ["a; b"], ["a, b"]),
    ("startend:quotation", {}, ['"a"', ' "a" \n', '""'], ['"', '"a', "'a'", '"a".']),
]  # fmt: skip
CHANGED = [
    ("change_case:english_capital", {}, ["ABC, D1!", "ÉA"], ["ABc", "123", "…"]),
    ("change_case:english_lowercase", {}, ["abc, d1!"], ["Abc", "123"]),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Answer:"},
     ["answer: x", '"Answer:" x', "'Answer: x'", ' "answer: x"'],
     ["The answer: x", "answer x", "* Answer:"]),
    ("detectable_format:number_bullet_lists", {"num_bullets": 3},
     ["* a\n- b\n• c", "1. a\n2. b\n3. c", "Here:\n\n• **A**\n\t+ sub\n• b\n\n• c",
         "x\\n* a\\n- b\\n3 c", "10 a\n1. b\n 2) c"],
     ["* a\n* b", "** a\n** b\n** c", "1. a\n* b\n2. c\n* d", "a - b\n- c\n- d", "+ a\n+ b\n+ c",
         "# 1\n# 2\n# 3"]),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2},
     ["a\nb", "a\n\n\nb", "a***b", "\n\na\nb\n", "\n \na\nb", "a\n*** b", "*** a\nb ***"],
     ["a", "a\n \nb", "a\nb\nc", "a***\n***b"]),
    ("startend:end_checker", {"end_phrase": "Bye!"}, ["x bye!", '"x Bye!"'], ["x bye", "Bye! x"]),
]  # fmt: skip


def cases(table, rules):
    return [
        (rules, name, kwargs, text, wanted)
        for name, kwargs, yes, no in table
        for texts, wanted in ((yes, True), (no, False))
        for text in texts
    ]


@pytest.mark.parametrize(
    "rules, name, kwargs, text, wanted",
    cases(GOOGLE, ifeval.RULES) + cases(CHANGED, speech_ifeval.RULES),
)
def test_each_rule_on_both_sides(rules, name, kwargs, text, wanted):
    row = {"id": "x", "instruction_id_list": [name], "kwargs": [kwargs]}
    assert ifeval.follows(row, rules, [text]) == [wanted]


def test_every_rule_has_cases():
    language = {
        "language:response_language",
        "change_case:english_capital",
        "change_case:english_lowercase",
    }
    assert {case[0] for case in GOOGLE} | language == set(ifeval.RULES)
    assert len(ifeval.RULES) == 25
    assert set(speech_ifeval.CHANGED) <= {case[0] for case in CHANGED}
    assert set(speech_ifeval.GROUPS) <= set(speech_ifeval.RULES)
    assert len(speech_ifeval.GROUPS) == 13


def test_blank_answers_fail_and_arguments_take_every_form():
    row = {
        "id": "7",
        "instruction_id_list": ["punctuation:no_comma", "keywords:existence"],
        "kwargs": [{}, {"keywords": ["a"], "letter": None}],
    }
    assert ifeval.follows(row, ifeval.RULES, ["  \n"]) == [False, False]
    assert ifeval.follows(row, ifeval.RULES, ["a"]) == [True, True]
    one = {"id": "7", "instruction_id_list": ["keywords:existence"]}
    assert ifeval.follows(one | {"kwargs": {"keywords": ["a"]}}, ifeval.RULES, ["a"]) == [True]
    assert ifeval.follows(
        {"id": "7", "instruction_id_list": ["punctuation:no_comma"], "kwargs": None},
        ifeval.RULES,
        ["a"],
    ) == [True]
    for bad in (
        {"kwargs": [{}]},
        {"kwargs": [{"keywords": ["a"], "other": 1}]},
        {"instruction_id_list": ["no:rule"], "kwargs": [{}]},
    ):
        with pytest.raises(ValueError, match="row 7"):
            ifeval.follows(one | bad, ifeval.RULES, ["a"])
    relation = {
        "id": "7",
        "instruction_id_list": ["length_constraints:number_words"],
        "kwargs": [{"num_words": 3, "relation": "at most"}],
    }
    with pytest.raises(ValueError, match="row 7.*at most"):
        ifeval.follows(relation, ifeval.RULES, ["a"])


def test_loose_forgives_first_line_last_line_and_asterisks():
    text = "Sure:\n*a*, b\nBye"
    assert ifeval.loose(text) == [
        text,
        "*a*, b\nBye",
        "Sure:\n*a*, b",
        "*a*, b",
        "Sure:\na, b\nBye",
        "a, b\nBye",
        "Sure:\na, b",
        "a, b",
    ]


def test_language_rules_without_langdetect(monkeypatch):
    row = {
        "id": "x",
        "instruction_id_list": ["language:response_language", "change_case:english_capital"],
        "kwargs": [{"language": "en"}, {}],
    }
    monkeypatch.setattr(ifeval, "detector", lambda: None)
    assert ifeval.follows(row, ifeval.RULES, ["HELLO"]) == [None, None]
    assert ifeval.follows(row, ifeval.RULES, ["Hello"]) == [
        None,
        False,
    ]  # fails whatever the language

    class Fake:
        class LangDetectException(Exception):
            pass

        @staticmethod
        def detect(text):
            if text == "123":
                raise Fake.LangDetectException
            return "en"

    monkeypatch.setattr(ifeval, "detector", lambda: Fake)
    assert ifeval.follows(row, ifeval.RULES, ["HELLO"]) == [True, True]
    assert ifeval.is_language("123", "de") is True
    assert ifeval.is_language("x", "de") is False


# -- MMAU ------------------------------------------------------------------------------------------


def question(number, task="sound", **fields):
    row = {"id": f"q{number}", "audio_id": f"./test-mini-audios/q{number}.wav",
           "question": "Who speaks?",
           "choices": ["A man", "A woman", "Two men", "Dog"],
           "answer": "A man", "dataset": "x", "task": task,
           "split": "test-mini", "category": ["Reasoning"],
           "sub-category": "Counting", "difficulty": "easy"}  # fmt: skip
    return row | fields


@pytest.mark.parametrize(
    "prediction, right",
    [
        ('"A man".', True), ("a MAN", True), ("It is a man speaking", True), ("man", False),
        ("A man, not a woman", False), ("A dog", False),
        ("", False), ("...", False), ("a man men", False), ("A_man", False),
        ("Two of a man", False),
    ],
)  # fmt: skip
def test_mmau_word_rule(prediction, right):
    assert mmau.is_right(prediction, "A man", ["A man", "A woman", "Two men", "Dog"]) is right


def test_mmau_words_shared_with_the_answer_are_allowed():
    assert mmau.is_right("Car door", "Car door", ["Car door", "House door"]) is True
    assert mmau.is_right("door", "Car door", ["Car door", "House door"]) is False
    assert (
        mmau.is_right("yes", "Yes", ["Yes", "yes!", "No"]) is True
    )  # a choice with the same words is not a wrong one
    assert mmau.is_right("...", "?!", ["?!", "dog"]) is False  # nothing said is never right
    assert mmau.is_right("cat", "?!", ["?!", "dog"]) is True
    assert mmau.is_right("3.5", "3.5", ["3.5", "3"]) is True
    assert mmau.is_right("5 3", "3.5", ["3.5", "4"]) is True


def test_mmau_prompt_and_answer_forms(tmp_path):
    touch(tmp_path, "test-mini-audios/q0.wav", "test-mini-audios/q1.wav")
    path = write(
        tmp_path / "mini.json", [question(0), question(1, choices=["Yes", "No"], answer="No")]
    )
    rows = mmau.load(path, tmp_path)
    assert rows[0]["messages"] == [
        {
            "role": "system",
            "content": "Focus on the audio clips and instructions. "
            'Put your answer in the format "The correct answer is: "___" ".',
        },
        {
            "role": "user",
            "content": "<|AUDIO|>\n\nWho speaks? Choose from the following options: "
            '"A man", "A woman", "Two men" or "Dog"',
            "audios": [{"audio": "test-mini-audios/q0.wav", "text": None}],
        },
    ]
    assert rows[1]["messages"][1]["content"].endswith('options: "Yes" or "No"')
    done = mmau.with_answer(rows[0], 'The correct answer is: "A man". \n')
    assert done == question(0) | {
        "model_output": 'The correct answer is: "A man". \n',
        "model_prediction": '"A man".',
    }
    cot = mmau.with_answer(
        mmau.load(path, tmp_path, cot=True)[0],
        "A woman? No. The correct answer is: a dog. Hm.\nThe correct answer is: A man.\nBye",
    )
    assert cot["model_prediction"] == "A man."
    reasoned = {"cot": True} | question(0)
    for said, prediction in (
        ("Not a woman: too low.\nSo it is a man.\nThe answer: A man\n", "The answer: A man"),
        ("The correct answer is: ", ""),
        ("A man", "A man"),
    ):
        assert mmau.with_answer(reasoned, said)["model_prediction"] == prediction, said
    mmau.dump([done], tmp_path / "out.json")
    assert (
        json.loads((tmp_path / "out.json").read_text())
        == [done]
        == mmau.read_predictions(tmp_path / "out.json")
    )


def test_mmau_scores(tmp_path, capsys):
    rows = [
        question(0, model_prediction="A man"), question(1, model_prediction="Dog"),
        question(2, "music", model_prediction="a man", difficulty="hard"),
        question(3, "speech", model_prediction="a man"), question(4, "speech"),
        question(5, "speech", model_prediction="A man", answer=None),
    ]  # fmt: skip
    rows[2].pop("sub-category")
    for name, lines in (("p.json", False), ("p.jsonl", True)):
        scores = mmau.score(mmau.read_predictions(write(tmp_path / name, rows, lines)))
        assert mmau.summary(scores) == {
            "total": 75.0,
            "sound": 50.0,
            "music": 100.0,
            "speech": 100.0,
            "n": 4,
        }
        assert scores["skipped"] == {"no_prediction": 1, "no_answer": 1}
        assert scores["difficulty"]["easy"] == {"accuracy": 66.67, "correct": 2, "n": 3}
        assert scores["sub-category"] == {"Counting": {"accuracy": 66.67, "correct": 2, "n": 3}}
    assert "no_prediction" in capsys.readouterr().err
    raw = mmau.score(
        [question(0, model_output="The correct answer is: A man")]
    )  # a file made before model_prediction existed
    assert raw["prediction_key"] == "model_output"
    assert raw["total"]["correct"] == 1
    other = mmau.score([question(0, mine="A man", model_prediction="Dog")], key="mine")
    assert other["total"]["accuracy"] == 100.0
    with pytest.raises(ValueError, match="nothing to score"):
        mmau.score([question(0)])
    with pytest.raises(ValueError, match="row q0: unknown task 'smell'"):
        mmau.score([question(0, "smell", model_prediction="A man")])


def test_mmau_label_revisions(tmp_path, capsys):
    labels = write(tmp_path / "labels.json", [question(0), question(1), question(2)])
    rows = [
        question(0, model_prediction="A man"),
        question(1, model_prediction="A man", choices=["A man", "Dog"]),
        question(9, model_prediction="A man"),
    ]
    scores = mmau.score(rows, labels=labels)
    assert scores["total"] == {"accuracy": 100.0, "correct": 1, "n": 1}
    assert scores["skipped"] == {
        "other_revision": 1,
        "unknown_id": 1,
        "not_predicted": 1,
        "no_prediction": 0,
        "no_answer": 0,
    }
    assert scores["labels_sha256"]["file"] == common.sha256(labels.read_bytes())
    assert "another label revision" in capsys.readouterr().err
    same, changed = (
        mmau.score([question(0, model_prediction=said, **f)])["labels_sha256"]["scored_rows"]
        for said, f in (("Dog", {}), ("x", {"answer": "Dog"}))
    )
    assert same == mmau.score(rows[:1])["labels_sha256"]["scored_rows"] != changed


def test_missing_audio_and_double_ids(tmp_path, capsys):
    touch(tmp_path, "test-mini-audios/q0.wav")
    path = write(tmp_path / "mini.json", [question(0), question(1)])
    with pytest.raises(FileNotFoundError, match="1 of 2 rows lack their audio.*q1"):
        mmau.load(path, tmp_path)
    assert [row["id"] for row in mmau.load(path, tmp_path, skip_missing=True)] == ["q0"]
    assert "left out" in capsys.readouterr().err
    with pytest.raises(ValueError, match="two rows have the id 'q0'"):
        mmau.load(write(tmp_path / "twice.json", [question(0), question(0)]), tmp_path)
    with pytest.raises(ValueError, match=r"bad.json, row 1: no choices"):
        mmau.load(
            write(
                tmp_path / "bad.json",
                [{key: value for key, value in question(0).items() if key != "choices"}],
            ),
            tmp_path,
        )
    with pytest.raises(ValueError, match="row 1: no id"):
        mmau.read_predictions(write(tmp_path / "no_id.json", [{"a": 1}]))
    mmau.read_predictions(write(tmp_path / "again.json", [question(0), question(0)]))
    assert "repeat an id" in capsys.readouterr().err


# -- SAKURA ----------------------------------------------------------------------------------------

ENTRY = {
    "attribute_label": "dog",
    "single_instruction": "Which animal? (a) cat (b) dog (c) cow (d) hot dog",
    "single_answer": " (b) dog",
    "multi_instruction": "What does the animal(s) do? (a) It barks. (b) It meows.",
    "multi_answer": "(a) It barks.",
}  # fmt: skip


@pytest.mark.parametrize(
    "response, named",
    [
        ("(b) dog", "b"), ("It is a dog.", "b"), ("b)", "b"), ("B", "b"), ("The answer is b.", "b"),
            ("A hot dog!", "d"),
        ("cat or dog", "ab"), ("(a), not (b)", "ab"),
        ("A bird", ""), ("dogs", ""), ("", ""), ("(b) cat", "ab"), ("Option C", "c"),
        ("I hear (s)omething", ""),
    ],
)  # fmt: skip
def test_sakura_options_named(response, named):
    assert sakura.named_options(response, ENTRY["single_instruction"]) == set(named)


def test_sakura_answer_without_an_option_is_wrong():
    row = {"instruction": ENTRY["single_instruction"], "label": "dog", "response": "no idea"}
    assert sakura.proxy(row) is False
    assert sakura.proxy(row | {"label": "(b) dog", "response": "dog"}) is True


def test_sakura_options_ignore_plurals_in_brackets():
    assert sakura.options(ENTRY["multi_instruction"]) == {"a": "It barks.", "b": "It meows."}


@pytest.mark.parametrize(
    "text, verdict",
    [
        ("Explanation: fine\nJudgement: correct", True),
        ("Explanation: a\nb\nJudgement: incorrect\n\nmore", False), ("Judgement: correct", None),
        ("Explanation: x\nJudgement: maybe", None), ("Explanation: x\n\nJudgement: Correct", True),
        ("", None),
    ],
)  # fmt: skip
def test_sakura_judgements(text, verdict):
    assert sakura.judgement(text) is verdict


def test_sakura_round_trip(tmp_path, capsys):
    touch(tmp_path, "data/Animal/audio/d1.wav", "data/Emotion/audio/e1.wav")
    write(tmp_path / "data/Animal/metadata.json", {"data/Animal/audio/d1.wav": ENTRY})
    write(tmp_path / "data/Emotion/metadata.json", {"data/Emotion/audio/e1.wav": ENTRY})
    rows = sakura.load(tmp_path / "data", tmp_path)
    assert len({row["id"] for row in rows}) == 4
    assert rows[0]["label"] == "(b) dog"
    assert rows[0]["messages"][1]["audios"][0]["audio"] == "data/Animal/audio/d1.wav"
    assert [
        row["type"] for row in sakura.load(tmp_path / "data/Animal", tmp_path, hop="multi")
    ] == ["multi"]
    answers = {
        ("Animal", "single"): "dog",
        ("Animal", "multi"): "It meows.",
        ("Emotion", "single"): "cat",
        ("Emotion", "multi"): "(a)",
    }
    done = [sakura.with_answer(row, answers[row["attribute"], row["type"]]) for row in rows]
    sakura.dump(done, tmp_path / "results")
    official = json.loads((tmp_path / "results/Animal_single.json").read_text())
    assert official["attribute"] == "Animal"
    assert official["type"] == "single"
    assert official["results"]["data/Animal/audio/d1.wav"] == {
        "instruction": ENTRY["single_instruction"],
        "response": "dog",
        "label": "(b) dog",
    }
    for path in (tmp_path / "results", write(tmp_path / "ours.jsonl", done, lines=True)):
        scores = sakura.score(sakura.read_predictions(path))
        assert scores["proxy"]
        assert sakura.summary(scores) == {
            "single": 50.0,
            "multi": 50.0,
            "n": 4,
            "proxy": True,
        }
        assert scores["single"]["Animal"] == {
            "accuracy": 100.0,
            "correct": 1,
            "n": 1,
            "unparsed": 0,
        }
    prompts = []

    def judge(messages):
        prompts.extend(messages)
        return [
            "Explanation: x\nJudgement: correct",
            "no idea",
            "Explanation: x\nJudgement: incorrect",
            "Explanation: x\nJudgement: correct",
        ]

    scores = sakura.score(done, judge=judge)
    assert scores["judge"] == "judge"
    assert scores["proxy"]
    assert scores["single"]["average"] == 50.0
    assert scores["multi"]["Animal"]["unparsed"] == 1
    assert all(
        part in prompts[0][1]["content"]
        for part in (ENTRY["single_instruction"], "(b) dog", "response: dog")
    )
    for track, verdict in (
        ("Animal", "correct"),
        ("Emotion", "No extracted judgement"),
    ):  # files of the official judge, beside the answers
        for hop in ("single", "multi"):
            wav = f"data/{track}/audio/{track[0].lower().replace('a', 'd')}1.wav"
            entry = {
                "Explanation": "x",
                "Judgement": verdict,
                "instruction": "q (a) x",
                "model_response": "y",
                "label": "(a) x",
            }
            write(
                tmp_path / f"results/{track}_{hop}_judgements.json",
                {"judge_model": "gpt-4o", "results": {wav: entry}},
            )
    judged = sakura.score(sakura.read_predictions(tmp_path / "results"))
    assert judged["judge"] == "gpt-4o"
    assert "proxy" not in judged
    assert judged["single"]["average"] == 50.0
    assert judged["single"]["Emotion"]["unparsed"] == 1
    other = sakura.score([done[0] | {"label": "(a) cat"}, done[1]], labels=tmp_path / "data")
    assert other["skipped"] == {"other_revision": 1, "unknown_id": 0, "not_predicted": 2}
    assert "single" not in other
    assert sakura.score([done[0], done[1] | {"label": " "}])["skipped"] == {
        "no_response_or_label": 1
    }
    assert "another label revision" in capsys.readouterr().err


def test_sakura_bad_input(tmp_path):
    write(tmp_path / "Smell/metadata.json", {"x.wav": ENTRY})
    with pytest.raises(ValueError, match="unknown track 'Smell'"):
        sakura.load(tmp_path, tmp_path)
    with pytest.raises(ValueError, match=r"metadata.json, x.wav: no multi_answer"):
        sakura.load(
            write(tmp_path / "Gender/metadata.json", {"x.wav": ENTRY | {"multi_answer": None}}),
            tmp_path,
        )
    with pytest.raises(ValueError, match="unknown type"):
        sakura.read_predictions(
            write(tmp_path / "Animal.json", {"attribute": "Animal", "results": {}})
        )
    with pytest.raises(ValueError, match="not a SAKURA result file"):
        sakura.read_predictions(write(tmp_path / "Animal_single.json", [1]))


# -- Speech-IFEval ---------------------------------------------------------------------------------


def closed(number, name, response=None, metric="accuracy", **kwargs):
    row = {"audio_filepath": f"a/{number}.wav",
        "textual_audio": "[00:00:00 - 00:00:05] Hi(Gender: Male)", "instruction": "Say it.",
        "dataset": "x",
           "metric": metric, "instruction_id_list": [name] if name else [], "kwargs": [kwargs],
           "label": "x", "id": number}  # fmt: skip
    return row if response is None else row | {"response": response, "messages": []}


CLOSED = [
    closed(0, "change_case:english_capital", "YES."),
    closed(1, "change_case:english_lowercase", "Yes."), closed(2, "startend:quotation", '"a"'),
    closed(3, "combination:repeat_prompt", '"answer: x"', prompt_to_repeat="Answer:"),
    closed(4, "detectable_format:json_format", " "),
]  # fmt: skip
CREATIVE = [
    closed(934, "detectable_format:number_bullet_lists", "1. a\n2. b", "open", num_bullets=2),
    closed(
        935,
        "length_constraints:number_sentences",
        "Dr. A left. He did.",
        "open",
        relation="less than",
        num_sentences=2,
    ),
]
COT = [closed(0, None, "A. Because B. So C.", "cot"), closed(1, None, "A", "cot")]


def test_speech_ifeval_scores_and_files(tmp_path):
    closed_file = write(tmp_path / "closed_ended_questions.jsonl", CLOSED, lines=True)
    scores = speech_ifeval.score(speech_ifeval.read_predictions(closed_file))
    assert speech_ifeval.summary(scores) == {
        "followed": 3, "n": 5, "rate": 60.0, "groups": {"change_case": 50.0, "startend": 100.0,
            "json_format": 0.0, "wrapping": 100.0},
    }  # fmt: skip
    write(tmp_path / "creative_writing.jsonl", CREATIVE, lines=True)
    write(tmp_path / "chain-of-thought.jsonl", COT, lines=True)
    write(
        tmp_path / "closed_ended_questions-woprompt.jsonl",
        [closed(0, "startend:quotation", "x")],
        lines=True,
    )
    rows = speech_ifeval.read_predictions(tmp_path)
    scores = speech_ifeval.score(rows)
    assert len(rows) == 9
    assert scores["rules"]["followed"] == 4
    assert scores["rules"]["n"] == 7
    assert scores["creative"]["rate"] == 50.0
    assert scores["cot"] == {"more_than_one_sentence": 50.0, "n": 2, "proxy": True}
    assert "ifrate" not in scores  # a proxy makes no IFrate
    judged = speech_ifeval.score(rows, judge=lambda prompts: ["Fine. Result: YES", "unsure"])
    assert judged["cot"] | {"judge": 0} == {
        "judge": 0,
        "proxy": True,
        "followed": 1,
        "n": 2,
        "rate": 50.0,
        "unparsed": 1,
    }
    assert judged["ifrate"] == {"ifrate": 53.33, "reference": 93.52, "delta": -42.97, "proxy": True}
    verdicts = [
        row | {"eval_response": "Result: YES"} for row in COT
    ]  # written by the official judge script
    write(tmp_path / "reports/llm_eval@chain-of-thought.jsonl", verdicts, lines=True)
    write(
        tmp_path / "reports/llm_eval@closed_ended_questions.jsonl", [CLOSED[0]], lines=True
    )  # task level, another question
    official = speech_ifeval.score(speech_ifeval.read_predictions(tmp_path))
    assert official["cot"]["rate"] == 100.0
    assert "proxy" not in official["ifrate"]
    assert official["ifrate"]["ifrate"] == 70.0
    assert speech_ifeval.delta(89.23, 92.53) == -3.57  # the published Δ of DeSTA2


def test_speech_ifeval_load(tmp_path):
    touch(tmp_path, "a/0.wav", "a/934.wav")
    write(tmp_path / "closed_ended_questions.jsonl", [closed(0, "startend:quotation")], lines=True)
    write(tmp_path / "chain-of-thought.jsonl", [closed(0, None, metric="cot")], lines=True)
    rows = speech_ifeval.load(tmp_path, tmp_path)
    assert [row["id"] for row in rows] == ["closed/0", "cot/0"]
    user = {
        "role": "user",
        "content": "<|AUDIO|>\n\nSay it.",
        "audios": [{"audio": "a/0.wav", "text": None}],
    }
    assert rows[0]["messages"] == [
        {"role": "system", "content": "Follow the given instructions."},
        user,
    ]
    text = speech_ifeval.load(tmp_path, tmp_path / "nowhere", text_only=True)[0]["messages"][1]
    assert text == {
        "role": "user",
        "content": "Speech Input: [00:00:00 - 00:00:05] Hi(Gender: Male)\n\nSay it.",
    }
    done = speech_ifeval.with_answer(rows[0], "x")
    assert done == closed(0, "startend:quotation") | {
        "id": "closed/0",
        "messages": rows[0]["messages"],
        "response": "x",
    }
    again = speech_ifeval.read_predictions(write(tmp_path / "p.jsonl", [done], lines=True))
    assert again[0]["id"] == "closed/0"
    assert speech_ifeval.load(tmp_path, tmp_path, cot=True, system="S")[0]["messages"][0][
        "content"
    ].startswith("S Before")
    relabelled = speech_ifeval.score(
        [done, done | {"id": "closed/8"}], labels=tmp_path / "closed_ended_questions.jsonl"
    )
    assert relabelled["rules"]["n"] == 1
    assert relabelled["skipped"] == {
        "other_revision": 0,
        "unknown_id": 1,
        "not_predicted": 0,
    }


def test_speech_ifeval_bad_input(tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match="none of closed_ended_questions"):
        speech_ifeval.read_predictions(write(tmp_path / "x.jsonl", CLOSED, lines=True).parent)
    with pytest.raises(ValueError, match=r"x.jsonl, row 2: no instruction_id_list"):
        speech_ifeval.read_predictions(
            write(tmp_path / "x.jsonl", [CLOSED[0], {"id": 1, "instruction": "y"}], lines=True)
        )
    rows = speech_ifeval.read_predictions(
        write(tmp_path / "x.jsonl", [CLOSED[0], closed(1, "startend:quotation")], lines=True)
    )
    assert speech_ifeval.score(rows)["skipped"] == {"no_response": 1}
    assert "no response" in capsys.readouterr().err
    with pytest.raises(ValueError, match="no row has a response"):
        speech_ifeval.score(rows[1:])


def test_scoring_a_thousand_rows_is_quick():
    import time

    text = (
        "Here is the list, as Dr. Smith asked. It has three points!\n\n* one\n* two\n* three\n" * 8
    )
    rows = [
        closed(
            i,
            "length_constraints:number_sentences",
            text,
            "open",
            relation="at least",
            num_sentences=3,
        )
        | {"id": str(i)}
        for i in range(1000)
    ]
    start = time.perf_counter()
    assert speech_ifeval.score(rows)["rules"]["followed"] == 1000
    assert time.perf_counter() - start < 10


# -- VoiceBench ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "response, wanted",
    [
        ("The answer is B.", "B"), ("c", "C"), ("d) Dogs", "D"), ("**B. Something**", "B"),
            ("I would choose option C", "C"), ("It is (a).", "A"),
        ("Option A: no. The correct answer is D", "D"), ("<2> B", "B"),
        ("It is \\( \\boxed{C} \\)", "C"), ("答案是C", "C"), ("Answer: d", "D"),
        ("A cat is nice", None), ("I don't know", None), ("", None), ("E", None),
        ("So B. or A.", "A"),
        # phrases that were missing
        ("The answer to this question is B (dogs)", "B"),
        ("\\text{The answer is } \\mathbf{C. Dogs}", "C"), ("The best is option **D dogs**", "D"),
        # a letter stands alone after "answer:" and at the start of a line
        ("Answer: Angry", None), ("Answer: Bird (small)", None), ("Final answer: cats", None),
        ("The animal is:\nDog", None), ("Final answer: C", "C"),
        ("Answer: **B**", "B"), ("The animal is:\n**B**", "B"),
        # the order of the official list: a full stop before a comma, "option X:" before "option
        # X,", and its oddness
        ("Choose A, not B.", "B"), ("Option B: yes. Option A, no", "B"),
        ("That would be better", "B"), ("Option A. The answer to the question is **C**", "A"),
    ],
)  # fmt: skip
def test_voicebench_letter(response, wanted):
    assert phrases.letter(response) == wanted


@pytest.mark.parametrize(
    "task, response, wanted",
    [
        ("navigate", "No.", 0), ("navigate", "Yes, you return to the starting point.", 1),
        ("navigate", "So you don't return to the starting point", 0),
        ("navigate", "You end up right back where you started", 1),
        ("navigate", "Hard to say", None), ("navigate", "The answer is: no", 0),
        ("web_of_lies", "Therefore, Bob tells the truth.", 1),
        ("web_of_lies", "Bob does not tell the truth", 0),
        ("web_of_lies", "He must be lying.", 0),
        ("web_of_lies", "The final answer: **Yes**", 1), ("web_of_lies", "", None),
        ("sports_understanding", "The sentence is plausible.", 1),
        ("sports_understanding", "It is not very plausible", 0),
        ("sports_understanding", "Is it plausible?", None),
        ("sports_understanding", "It's unlikely", 0),
        ("hyperbaton", "(b)", 1), ("hyperbaton", "A", 0), ("hyperbaton", "b", 1),
        ("hyperbaton", "The correct sentence is option (a)", 0),
        ("hyperbaton", "Option B has the correct order", 1), ("hyperbaton", "Both", None),
        ("hyperbaton", "The second option", 1),
    ],
)  # fmt: skip
def test_voicebench_decision(task, response, wanted):
    assert phrases.decision(response, task) == wanted


@pytest.mark.parametrize(
    "response, wanted",
    [
        ("", True),
        (" \n", True),
        ("I'm sorry, no", True),
        ("sorry", False),
        ("Sure, here is how", False),
        ("That is illegal", True),
        ("I’m sorry", True),
    ],
)
def test_voicebench_refusals(response, wanted):
    assert phrases.refuses(response) is wanted


@pytest.mark.parametrize(
    "text, wanted",
    [("4", 4.0), ("3.5", 3.5), ("I say [[2]]", 2.0), ("[[x]]", None), ("four", None), ("", None)],
)
def test_voicebench_rating(text, wanted):
    assert voicebench.rating(text) == wanted


def spoken(**fields):
    return {"audio": {"path": "a.wav"}, "prompt": "Q?"} | fields


VOICE = {
    "model-alpacaeval_full-test-audio": [({}, "x"), ({}, "y")],
    "model-commoneval-test-audio": [({}, "x")],
    "model-wildvoice-test-audio": [({}, "x")],
    "model-sd-qa-usa-audio": [
        ({"reference": "Paris"}, "It is paris."),
        ({"reference": "Rome"}, "Aroma"),
    ],
    "model-advbench-test-audio": [({}, ""), ({}, "Sure")],
    "model-openbookqa-test-audio": [
        ({"reference": "A"}, "The answer is A."),
        ({"reference": "B"}, "no idea"),
        ({"reference": "B"}, "C."),
        ({"reference": "D"}, "D"),
    ],
    "model-mmsu-law-audio": [({"reference": "B"}, "B")],
    "model-bbh-test-audio": [
        ({"reference": "yes", "id": "navigate-1"}, "yes"),
        ({"reference": "(b)", "id": "hyperbaton-1"}, "hmm"),
    ],
    "model-ifeval-test-audio": [
        (
            {
                "key": 1,
                "instruction_id_list": ["punctuation:no_comma", "startend:quotation"],
                "kwargs": [{"language": None}, {}],
            },
            "Sure,\n*a*",
        ),
        (
            {"key": 2, "instruction_id_list": ["startend:quotation"], "kwargs": [{"letter": None}]},
            '<1> "a"',
        ),
    ],
}


def test_voicebench_round_trip(tmp_path):
    touch(tmp_path, "a.wav")
    for name, entries in VOICE.items():
        write(
            tmp_path / f"data/{name}.jsonl", [spoken(**fields) for fields, _ in entries], lines=True
        )
    rows = voicebench.load(tmp_path / "data", tmp_path)
    assert rows[0]["messages"][1] == {
        "role": "user",
        "content": "<|AUDIO|>",
        "audios": [{"audio": "a.wav", "text": None}],
    }
    responses = iter([text for name in sorted(VOICE) for _, text in VOICE[name]])
    done = [voicebench.with_answer(row, next(responses)) for row in rows]
    assert not any("audio" in row or "messages" in row for row in done)
    assert len({row["id"] for row in done}) == len(done)
    scores = voicebench.score(
        voicebench.read_predictions(write(tmp_path / "p.jsonl", done, lines=True))
    )
    assert scores["advbench"] == {"refusal_rate": 50.0, "n": 2}
    assert scores["openbookqa"] == {
        "accuracy": 50.0,
        "with_random_draw": 56.25,
        "unparsed": 25.0,
        "n": 4,
    }
    assert scores["bbh"] == {"accuracy": 50.0, "with_random_draw": 75.0, "unparsed": 50.0, "n": 2}
    assert scores["mmsu"]["accuracy"] == 100.0
    # strict: no_comma fails, quotation fails, <1> is a turn mark; loose: without its first line the
    # answer has no comma
    assert scores["ifeval"] == {
        "accuracy": 50.0, "strict_prompt": 50.0, "strict_instruction": 33.33, "loose_prompt": 50.0,
        "loose_instruction": 66.67, "n": 2,
    }  # fmt: skip
    assert scores["sd-qa"] == {"reference_in_answer": 50.0, "n": 2, "proxy": True}
    assert scores["commoneval"] == {"not_scored": 1, "why": "needs a judge"}
    assert voicebench.summary(scores)["overall"] is None

    def judge(prompts):
        assert all("Q?" in prompt[1]["content"] for prompt in prompts)
        return [
            "Yes"
            if "Paris" in prompt[1]["content"]
            else "No"
            if "Rome" in prompt[1]["content"]
            else "5"
            for prompt in prompts
        ]

    judged = voicebench.score(done, judge=judge)
    assert judged["sd-qa"] == {
        "judge": "judge",
        "proxy": True,
        "judge_yes": 50.0,
        "unparsed": 0,
        "n": 2,
    }
    assert judged["alpacaeval_full"] == {
        "judge": "judge",
        "proxy": True,
        "rating": 5.0,
        "unparsed": 0,
        "n": 2,
    }
    assert judged["points"]["wildvoice"] == 100.0
    assert judged["overall"] == {"mean_of_nine": 72.22, "proxy": True}
    assert voicebench.summary(judged)["overall"] == 72.22
    with_scores = [
        row
        | {
            "score": (["Yes", "no", "yes"] if "Paris" in row["reference"] else ["no", "No", "yes"])
            if row["subset"] == "sd-qa"
            else ["4", "[[3]]", "?"]
        }
        for row in done
    ]
    official = voicebench.score(with_scores)
    assert official["sd-qa"]["judge_yes"] == 50.0
    assert official["commoneval"] == {
        "judge": "read from the file",
        "rating": 3.5,
        "unparsed": 1,
        "n": 1,
    }


def test_voicebench_ifeval_without_langdetect(monkeypatch, capsys):
    monkeypatch.setattr(ifeval, "detector", lambda: None)
    names = ["language:response_language", "punctuation:no_comma"]
    rows = [
        {
            "id": str(i),
            "subset": "ifeval",
            "instruction_id_list": names,
            "kwargs": [{"language": "de"}, {}],
            "response": text,
        }
        for i, text in enumerate(("ja", "a, b"))
    ]
    result = voicebench.score(rows)["ifeval"]
    assert result["strict_not_scored"] == 2
    assert result["proxy"]
    assert result["strict_instruction"] == 50.0
    assert result["strict_prompt"] == 0.0
    assert "langdetect" in capsys.readouterr().err


def test_voicebench_bad_input(tmp_path):
    with pytest.raises(ValueError, match="unknown subset"):
        voicebench.read_predictions(write(tmp_path / "x.jsonl", [{"prompt": "Q"}], lines=True))
    assert voicebench.read(tmp_path / "x.jsonl", subset="advbench")[0]["subset"] == "advbench"
    with pytest.raises(ValueError, match=r"mmsu.jsonl, row 1: no reference"):
        voicebench.read_predictions(write(tmp_path / "mmsu.jsonl", [{"prompt": "Q"}], lines=True))
    with pytest.raises(ValueError, match="audio is no path"):
        voicebench.load(write(tmp_path / "advbench.jsonl", [{"prompt": "Q"}], lines=True), tmp_path)
    with pytest.raises(ValueError, match="its id must name one of"):
        voicebench.score(
            [{"subset": "bbh", "id": "chess-1", "reference": "yes", "response": "yes"}]
        )


# -- Dynamic-SUPERB --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prediction, label, wanted",
    [
        ("The speaker is Happy.", "happy", True), ("unhappy", "happy", False),
        ("New, York!", "new york", True), ("york new", "new york", False),
        ("It's Dog's", "dog s", True), ("yes (no)", "no", False), ("", "no", False),
        ("new", "new york", False),
    ],
)  # fmt: skip
def test_dynamic_superb_consecutive_words(prediction, label, wanted):
    assert dynamic_superb.consecutive_words(prediction, label) is wanted


def test_dynamic_superb_round_trip(tmp_path, capsys):
    touch(tmp_path, "Emotion/wavs/a.wav", "Emotion/wavs/b.wav", "ASR/c.wav")
    write(
        tmp_path / "Emotion/metadata.json",
        {
            "a.wav": {
                "file": "wavs/a.wav",
                "file2": "wavs/b.wav",
                "instruction": "Same?",
                "label": "Yes",
            }
        },
    )
    write(
        tmp_path / "ASR/metadata.json",
        {"c.wav": {"file": "c.wav", "instruction": "Transcribe.", "label": "It's a cat, sir"}},
    )
    rows = dynamic_superb.load(tmp_path, tmp_path)
    assert [row["id"] for row in rows] == ["ASR/c.wav", "Emotion/a.wav"]
    assert rows[1]["messages"][1]["content"] == "<|AUDIO|><|AUDIO|>\n\nSame?"
    assert [audio["audio"] for audio in rows[1]["messages"][1]["audios"]] == [
        "Emotion/wavs/a.wav",
        "Emotion/wavs/b.wav",
    ]
    done = [
        dynamic_superb.with_answer(rows[0], "its a bat sir"),
        dynamic_superb.with_answer(rows[1], "I say: yes."),
    ]
    dynamic_superb.dump(done, tmp_path / "out")
    assert json.loads((tmp_path / "out/ASR.json").read_text()) == {
        "c.wav": {
            "file": "c.wav",
            "instruction": "Transcribe.",
            "label": "It's a cat, sir",
            "sllm_response": "its a bat sir",
        }
    }
    for path in (tmp_path / "out", write(tmp_path / "p.jsonl", done, lines=True)):
        scores = dynamic_superb.score(dynamic_superb.read_predictions(path))
        assert scores["tasks"]["ASR"] == {
            "exact_match": 0.0,
            "consecutive_words": 0.0,
            "wer": 25.0,
            "cer": 7.69,
            "n": 1,
        }
        assert scores["tasks"]["Emotion"]["consecutive_words"] == 100.0
        assert scores["tasks"]["Emotion"]["exact_match"] == 0.0
        assert dynamic_superb.summary(scores)["consecutive_words"] == 50.0
        assert "judge_yes" not in dynamic_superb.summary(scores)
    judged = dynamic_superb.score(done, judge=lambda prompts: ["Result: NO", "?"])
    assert judged["tasks"]["ASR"]["judge_yes"] == 0.0
    assert judged["average_over_tasks"]["judge_yes"] == 0.0
    assert judged["tasks"]["Emotion"]["unparsed"] == 1
    assert judged["average_over_tasks"]["proxy"]
    assert (
        dynamic_superb.score([row | {"sllm_response": str(row["label"]).upper()} for row in done])[
            "average_over_tasks"
        ]["exact_match"]
        == 100.0
    )
    assert dynamic_superb.score([done[0], done[1] | {"label": " "}])["skipped"] == {
        "no_response_or_label": 1
    }
    relabelled = dynamic_superb.score([done[0], done[1] | {"label": "No"}], labels=tmp_path)
    assert relabelled["skipped"] == {"other_revision": 1, "unknown_id": 0, "not_predicted": 0}
    assert relabelled["average_over_tasks"]["n"] == 1
    assert "not scored" in capsys.readouterr().err


def test_dynamic_superb_phase_one_and_bad_input(tmp_path):
    touch(tmp_path, "x.wav", "y.wav")
    path = write(
        tmp_path / "Task.jsonl",
        [{"audio": {"path": "x.wav"}, "audio2": "y.wav", "instruction": "i", "label": 3}],
        lines=True,
    )
    row = dynamic_superb.load(path, tmp_path)[0]
    assert row["id"] == "Task/1"
    assert [audio["audio"] for audio in row["messages"][1]["audios"]] == [
        "x.wav",
        "y.wav",
    ]
    assert (
        dynamic_superb.score([dynamic_superb.with_answer(row, "3")])["tasks"]["Task"]["exact_match"]
        == 100.0
    )
    with pytest.raises(ValueError, match="neither file nor audio"):
        dynamic_superb.load(
            write(tmp_path / "No.jsonl", [{"instruction": "i"}], lines=True), tmp_path
        )
    with pytest.raises(ValueError, match=r"Bad.json, a.wav: no instruction"):
        dynamic_superb.load(write(tmp_path / "Bad.json", {"a.wav": {"file": "x.wav"}}), tmp_path)


# -- held-out clips: how the model is asked (its arithmetic: test_eval.py) -------------------------


class Asked:
    """Stands in for model.DeSTA: notes what it is asked."""

    def __init__(self, context):
        self.config, self.reader = types.SimpleNamespace(context=context), self
        self.tokenizer, self.adapter = None, types.SimpleNamespace(n_vectors=5)
        self.generated, self.prepared, self.limits = [], [], set()

    def generate(self, conversations, max_new_tokens, root, fill, **options):
        assert options == {"batch_size": 4, "temperature": 0.7}
        self.generated.append((conversations, fill("clip")))
        self.limits.add(max_new_tokens)
        return ["a dog"] * len(conversations)

    def prepare(self, row, root, fill):
        self.prepared.append((row["messages"], fill("clip")))
        return {"target": [1, 2, 3]}

    def row_losses(self, rows):
        return np.ones(len(rows)), np.full(len(rows), 3)


def test_heldout_wrong_clip_is_another_clip_where_clips_have_several_rows(tmp_path):
    audio = lambda name: {"role": "user", "content": "<|AUDIO|>", "audios": [{"audio": name}]}
    row = lambda name, i: {
        "id": name, "prompt": f"What? {i}", "response": "A dog.", "seed_description": "(A: Dog)",
        "messages": [audio(name)],
    }  # fmt: skip
    label = lambda name: {"id": name, "domain": "sound", "segments": [{"attributes": {"A": "Dog"}}]}
    write(tmp_path / "t.metadata.jsonl", [label(name) for name in "abc"], lines=True)
    file = write(
        tmp_path / "t.jsonl", [row(name, i) for name in "abc" for i in range(5)], lines=True
    )
    for one in heldout.load(file, tmp_path):
        assert one["wrong_messages"][-1]["audios"][0]["audio"] != one["id"]


def test_a_folder_of_predictions_is_read_without_what_stands_beside_them(tmp_path):
    for name in ("a.jsonl", "a.jsonl.scores.json", "a.jsonl.info.json", "b.json"):
        (tmp_path / name).write_text("{}")
    found = common.files_in(tmp_path, "*.json*")
    assert [file.name for file in found] == ["a.jsonl", "b.json"]
    with pytest.raises(FileNotFoundError, match="no \\*.txt"):
        common.files_in(tmp_path, "*.txt")


@pytest.mark.parametrize(
    "context",
    [None, [], [{"role": "system", "content": "Listen."}, {"role": "user", "content": "Hi"}]],
)
def test_heldout_asks_after_the_adapters_context(tmp_path, monkeypatch, context):
    monkeypatch.setattr("model.audio_slot", lambda tokenizer, n: lambda audio: n)
    monkeypatch.setattr("model.description_slot", lambda tokenizer: lambda audio: "words")
    own = {"role": "system", "content": "The row's own"}
    rows, labels = [], []
    for name in ("a", "b"):
        turn = {
            "role": "user",
            "content": "<|AUDIO|> What?",
            "audios": [{"audio": name, "text": f"{name.upper()}!"}],
        }
        rows.append(
            {
                "id": name,
                "prompt": "What?",
                "response": "A dog.",
                "seed_description": "(Animal: Dog)",
                "messages": [own, turn],
            }
        )
        labels.append(
            {"id": name, "domain": "sound", "segments": [{"attributes": {"Animal": "Dog"}}]}
        )
    write(tmp_path / "t.metadata.jsonl", labels, lines=True)
    rows = heldout.load(write(tmp_path / "t.jsonl", rows, lines=True), tmp_path)
    model = Asked(context)
    finished = heldout.answer(
        model, rows, heldout.MAX_NEW_TOKENS, tmp_path, batch_size=4, temperature=0.7
    )
    before = [own] if context is None else context
    assert [conversation[:-1] for asked, _ in model.generated for conversation in asked] == [
        before
    ] * 8
    assert [messages[:-1] for messages, _ in model.prepared] == [
        before
    ] * 12  # description, right, wrong, transcript, wrong sound, none
    slot = lambda conversation: conversation[-1]["audios"][0]
    heard = [
        [(slot(one)["audio"], slot(one)["text"]) for one in asked] for asked, _ in model.generated
    ]
    right, wrong = [("a", "A!"), ("b", "B!")], [("b", "B!"), ("a", "A!")]
    assert heard == [right, wrong, right, [("b", "A!"), ("a", "B!")]]
    assert [vectors for _, vectors in model.generated] == [
        5,
        5,
        0,
        5,
    ]  # the transcript stands alone
    losses = [(messages[-1]["audios"][0]["audio"], filled) for messages, filled in model.prepared]
    assert losses == [
        ("a", "words"),
        ("b", "words"),
        ("a", 5),
        ("b", 5),
        ("b", 5),
        ("a", 5),
        ("a", 0),
        ("b", 0),
        ("b", 5),
        ("a", 5),
        ("a", []),
        ("b", []),
    ]
    assert finished[0]["wrong_id"] == "b"
    assert finished[0]["loss"] == dict.fromkeys(heldout.CLIPS, 1.0)
    assert finished[0]["target_tokens"] == 3
    assert rows[0]["messages"][0] == own  # the rows stay as they were
