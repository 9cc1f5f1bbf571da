"""
tokenizer.py: text to token ids and back, chat messages to a prompt, from a Hugging Face folder.

tiktoken runs the byte-level BPE of tokenizer.json; jinja2 renders the folder's own chat template,
in a sandbox. So any backbone works, and no template is written by hand.
"""

import datetime
import json
import re
import unicodedata
from pathlib import Path

import tiktoken
from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment  # jinja2 comes with torch

from engine.weights import BYTE_OF, read_json

# GPT-2's split, and SmolLM2's: the same after every digit has been cut off on its own. tiktoken has
# one pattern and no sequence of splitters, so "digits first" becomes: \p{N} before the other rules,
# and white space that stops in front of a digit whole (the plain rule would leave its last blank to
# the next word).
GPT2_SPLIT = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
SMOLLM_SPLIT = (
    r"""\p{N}|'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"""
)

# A Unicode noncharacter, put inside "<|im_end|>" when a *user* writes it. The chat template then
# cannot turn the user's text into a real end of turn, and encode() takes the mark out again.
GUARD = "\ufdd0"
NO_TOKEN = 2**30


def split_pattern(pre_tokenizer, file):
    """The regular expression behind tokenizer.json's pre_tokenizer, e.g. Split(regex) + ByteLevel,
    or Digits + ByteLevel.
    """
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    kinds = [step["type"] for step in steps]
    if kinds[0] == "Split" and kinds[1:] == ["ByteLevel"]:
        return steps[0]["pattern"]["Regex"]
    if kinds == ["ByteLevel"]:
        return GPT2_SPLIT
    if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"]:
        return SMOLLM_SPLIT
    raise ValueError(
        f"{file}: pre_tokenizer {kinds} is not one this tokenizer knows (see split_pattern in tokenizer.py)"
    )


class Tokenizer:
    """Byte-level BPE from a Hugging Face folder, run by tiktoken, with the folder's chat template.

    eos_id ends one turn (the token that training targets end with); stop_ids are all that end
    generation.
    """

    def __init__(self, folder):
        folder = Path(folder)
        file = folder / "tokenizer.json"
        data = read_json(file)
        model, added = (
            data["model"],
            {token["content"]: token["id"] for token in data["added_tokens"]},
        )
        if model["type"] != "BPE":
            raise ValueError(f"{file}: {model['type']} tokenizer; only byte-level BPE is supported")
        ranks = {
            bytes(BYTE_OF[c] for c in token): i
            for token, i in model["vocab"].items()
            if token not in added
        }
        # tiktoken merges the pair of lowest rank, and takes the token id for the rank. That is the
        # same tokenizer only if merges were learned in id order.
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
        merged_ids = [model["vocab"][merge.replace(" ", "")] for merge in merges]
        if any(a >= b for a, b in zip(merged_ids, merged_ids[1:])):
            raise ValueError(
                f"{file}: merges are not in the order of token ids, so tiktoken would split differently"
            )
        pattern = split_pattern(data["pre_tokenizer"], file)
        # SmolLM2's vocabulary lacks a few bytes ("\x04", the first of U+40000), on which tiktoken
        # would panic. They get ids that encode() drops, as Hugging Face's tokenizer drops them.
        ranks |= {bytes([b]): NO_TOKEN + b for b in range(256) if bytes([b]) not in ranks}
        self.bpe = tiktoken.Encoding(
            folder.name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=added
        )
        self.special = re.compile(
            "|".join(re.escape(t) for t in sorted(added, key=len, reverse=True)) or "(?!)"
        )
        self.normal_form = (data.get("normalizer") or {}).get("type")  # Qwen: "NFC"
        if self.normal_form not in (None, "NFC"):
            raise ValueError(f"{file}: normalizer {self.normal_form} is not supported")

        config = read_json(folder / "tokenizer_config.json")
        eos = config["eos_token"]
        self.eos_id = added[eos if isinstance(eos, str) else eos["content"]]
        self.stop_ids = {self.eos_id}
        if (folder / "generation_config.json").exists():
            ids = read_json(folder / "generation_config.json").get("eos_token_id", [])
            self.stop_ids |= {ids} if isinstance(ids, int) else set(ids)

        template = config.get("chat_template")
        if isinstance(template, list):  # several named templates
            template = {entry["name"]: entry["template"] for entry in template}["default"]
        if (folder / "chat_template.jinja").exists():
            template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
        # A template is a program from somebody's folder: it runs in jinja's sandbox, without access
        # to Python.
        jinja = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
        )
        jinja.filters["tojson"] = lambda value, **kwargs: json.dumps(
            value, ensure_ascii=False, **kwargs
        )
        jinja.globals["raise_exception"] = self._template_error
        # Llama's templates print a date. Today's would make a prompt, and so a training target,
        # change overnight: every day is the date that Llama-3.1's own template falls back to.
        jinja.globals["strftime_now"] = datetime.date(2024, 7, 26).strftime
        try:
            self.template = jinja.from_string(template) if template else None
        except TemplateError as error:
            raise ValueError(f"{folder}: the chat template is broken ({error})") from None
        self.template_tokens = {
            key: (value if isinstance(value, str) else value["content"])
            for key, value in config.items()
            if key in ("bos_token", "eos_token", "unk_token", "pad_token") and value
        }
        self.folder = folder

    def __reduce__(self):
        """To another process goes the folder's name: a compiled template cannot be sent."""
        return Tokenizer, (self.folder,)

    @staticmethod
    def _template_error(message):
        raise ValueError(f"the chat template refuses these messages: {message}")

    def encode(self, text, special=True):
        """Text -> list of token ids, no BOS added. special=False reads "<|im_end|>" as the ten
        characters it is.
        """
        if self.normal_form:
            text = unicodedata.normalize(self.normal_form, text)
        ordinary = lambda text: [i for i in self.bpe.encode_ordinary(text) if i < NO_TOKEN]
        if not special:
            return ordinary(text)
        ids, start = [], 0
        for match in self.special.finditer(text):
            ids += ordinary(text[start : match.start()].replace(GUARD, ""))
            ids.append(self.bpe._special_tokens[match.group()])
            start = match.end()
        return ids + ordinary(text[start:].replace(GUARD, ""))

    def decode(self, ids, skip_special_tokens=True):
        """Token ids -> text; bytes that are not UTF-8 become U+FFFD."""
        if skip_special_tokens:
            special = set(self.bpe._special_tokens.values())
            ids = [i for i in ids if i not in special]
        return self.bpe.decode(ids)

    def apply_chat_template(self, messages, add_generation_prompt=True):
        """[{"role", "content"}, ...] -> the prompt as one string, rendered by the folder's own
        template.

        Special tokens written inside a message are broken with GUARD, so that encode() reads them
        as plain text.
        """
        if self.template is None:
            raise ValueError(
                f"{self.folder} has no chat_template (tokenizer_config.json or chat_template.jinja)"
            )
        guard = lambda match: match.group()[0] + GUARD + match.group()[1:]
        # Normal form first: what becomes a special token by normalization is one, too.
        normalize = lambda text: (
            unicodedata.normalize(self.normal_form, text) if self.normal_form else text
        )
        messages = [
            message | {"content": self.special.sub(guard, normalize(message["content"]))}
            for message in messages
        ]
        try:
            return self.template.render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                **self.template_tokens,
            )
        except ValueError:
            raise
        # somebody's program, stopped by the sandbox or by its own faults
        except Exception as error:
            raise ValueError(f"{self.folder}: the chat template fails ({error!r})") from None
