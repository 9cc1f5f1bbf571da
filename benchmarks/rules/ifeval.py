"""
ifeval.py: the 25 rules of Google's IFEval (Zhou et al. 2023), strict and loose. voicebench.py uses
them as they are, speech_ifeval.py with changes.

Checked against google-research/instruction_following_eval `instructions.py` and
`evaluation_main.py`. A rule is a function of the answer (`t` below) and its keyword arguments. It
returns True, False, or None if it cannot be decided here: the three language rules need the package
langdetect, and without it such an instruction is counted as not scored. (langdetect draws random
numbers; a fixed seed makes our result repeatable, the official one is not.)
"""

import json
import re
from functools import cache

from benchmarks.rules.sentences import capital_words, sentences

OPTIONS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")


@cache
def detector():
    try:
        import langdetect
    except ImportError:
        return None
    langdetect.DetectorFactory.seed = 0
    return langdetect


def is_language(text, language):
    package = detector()
    if package is None:
        return None
    try:
        return package.detect(text) == language
    except package.LangDetectException:  # no letters: the official rule counts it as followed
        return True


def compare(count, relation, number):
    if relation not in ("less than", "at least"):
        raise ValueError(f"relation must be 'less than' or 'at least', not {relation!r}")
    return count < number if relation == "less than" else count >= number


def count(pattern, text, flags=0):
    return len(re.findall(pattern, text, flags))


def paragraphs(text, pattern):
    """The number of pieces that `pattern` cuts, without a blank first and last one; None where a
    blank one stands between others.
    """
    filled = [bool(piece.strip()) for piece in re.split(pattern, text)]
    if not all(filled[1:-1]):
        return None
    return len(filled) - (not filled[0]) - (len(filled) > 1 and not filled[-1])


def is_json(text):
    text = text.strip()
    for fence in ("```json", "```Json", "```JSON", "```"):  # in turn: ```json``` loses both
        text = text.removeprefix(fence)
    try:
        json.loads(text.removesuffix("```").strip())
    except ValueError:
        return False
    return True


def has_title(text):
    return any(title.lstrip("<").rstrip(">").strip() for title in re.findall(r"<<[^\n]+>>", text))


def highlights(text):
    single = [part.strip("*").strip() for part in re.findall(r"\*[^\n*]*\*", text)]
    double = [part[2:-2].strip() for part in re.findall(r"\*\*[^\n*]*\*\*", text)]
    return sum(map(bool, single + double))


def has_postscript(text, marker):
    known = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
    return bool(re.search(known.get(marker, marker.lower()), text.lower()))


def nth_paragraph_starts(text, num_paragraphs, nth_paragraph, first_word):
    pieces = text.split("\n\n")
    filled = sum(bool(piece.strip()) for piece in pieces)
    if nth_paragraph > filled or not (paragraph := pieces[nth_paragraph - 1].strip()):
        return False
    word = re.split(r"[.,?!'\"]", paragraph.split()[0].lstrip("'").lstrip('"'))[0]
    return filled == num_paragraphs and word.lower() == first_word.lower()


def two_responses(text):
    pieces = [piece.strip() for piece in text.split("******")]
    filled = [piece for piece in pieces if piece]
    return all(pieces[1:-1]) and len(filled) == 2 and filled[0] != filled[1]


def is_quoted(text):
    text = text.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


RULES = {
    "keywords:existence": lambda t, keywords: all(re.search(word, t, re.I) for word in keywords),
    "keywords:frequency": lambda t, keyword, frequency, relation: compare(
        count(keyword.strip(), t, re.I), relation, frequency
    ),
    "keywords:forbidden_words": lambda t, forbidden_words: (
        not any(re.search(rf"\b{word}\b", t, re.I) for word in forbidden_words)
    ),
    "keywords:letter_frequency": lambda t, letter, let_frequency, let_relation: compare(
        t.lower().count(letter.strip().lower()), let_relation, let_frequency
    ),
    "language:response_language": lambda t, language: is_language(t, language),
    "length_constraints:number_sentences": lambda t, num_sentences, relation: compare(
        len(sentences(t)), relation, num_sentences
    ),
    "length_constraints:number_paragraphs": lambda t, num_paragraphs: (
        num_paragraphs == paragraphs(t, r"\s?\*\*\*\s?")
    ),
    "length_constraints:number_words": lambda t, num_words, relation: compare(
        count(r"\w+", t), relation, num_words
    ),
    "length_constraints:nth_paragraph_first_word": nth_paragraph_starts,
    "detectable_content:number_placeholders": lambda t, num_placeholders: (
        num_placeholders <= count(r"\[.*?\]", t)
    ),
    "detectable_content:postscript": lambda t, postscript_marker: has_postscript(
        t, postscript_marker.strip()
    ),
    "detectable_format:number_bullet_lists": lambda t, num_bullets: (
        num_bullets == count(r"^\s*\*[^*].*$", t, re.M) + count(r"^\s*-.*$", t, re.M)
    ),
    "detectable_format:constrained_response": lambda t: any(option in t for option in OPTIONS),
    "detectable_format:number_highlighted_sections": lambda t, num_highlights: (
        num_highlights <= highlights(t)
    ),
    "detectable_format:multiple_sections": lambda t, section_spliter, num_sections: (
        num_sections <= count(rf"\s?{section_spliter.strip()}\s?\d+\s?", t)
    ),
    "detectable_format:json_format": is_json,
    "detectable_format:title": has_title,
    "combination:two_responses": two_responses,
    "combination:repeat_prompt": lambda t, prompt_to_repeat: (
        t.strip().lower().startswith(prompt_to_repeat.strip().lower())
    ),
    "startend:end_checker": lambda t, end_phrase: (
        t.strip().strip('"').lower().endswith(end_phrase.strip().lower())
    ),
    "change_case:capital_word_frequency": lambda t, capital_frequency, capital_relation: compare(
        capital_words(t), capital_relation, capital_frequency
    ),
    "change_case:english_capital": lambda t: t.isupper() and is_language(t, "en"),
    "change_case:english_lowercase": lambda t: t.islower() and is_language(t, "en"),
    "punctuation:no_comma": lambda t: "," not in t,
    "startend:quotation": is_quoted,
}


def arguments(kwargs, index):
    """The arguments of instruction number `index`. kwargs: a list of dicts, or one dict; released
    files set to null what an instruction does not take.
    """
    if isinstance(kwargs, list) and index < len(kwargs):
        kwargs = kwargs[index]
    if not isinstance(kwargs, dict):
        return {}
    return {key: value for key, value in kwargs.items() if value is not None}


def follows(row, rules, variants):
    """Does one of the variants of the answer follow it? A blank one never does.

    -> [True, False or None for each instruction of the row]
    """
    results = []
    for index, name in enumerate(row["instruction_id_list"]):
        if name not in rules:
            raise ValueError(f"row {row['id']}: unknown instruction {name!r}")
        given = arguments(row.get("kwargs"), index)
        try:
            verdicts = [rules[name](text, **given) for text in variants if text.strip()]
        except (TypeError, ValueError, re.error) as error:
            raise ValueError(f"row {row['id']}: {name} with {given}: {error}") from error
        results.append(True if True in verdicts else None if None in verdicts else False)
    return results


def loose(text):
    """The answer and seven easier ones: without its first line, its last, and both, and these four
    without asterisks.
    """
    lines = text.split("\n")
    cut = [text] + ["\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1])]
    return cut + [part.replace("*", "") for part in cut]
