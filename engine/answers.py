"""
answers.py: the LLM's answers, made by another engine (vLLM, TensorRT-LLM, an API) and joined to
their rows again. See generate_data.py.
"""

import hashlib
import json

import numpy as np

from engine.rows import JsonLines


def prompt_id(clip, prompt):
    """What joins a row and its answer: 64 bits of the clip's name and the prompt's token ids. So
    the answer to another prompt (another seed, another LLM) is never taken.
    """
    return hashlib.sha256(json.dumps([clip, prompt]).encode()).hexdigest()[:16]


class Answers:
    """Lines {"id", "text" or "token_ids", "finish_reason"} in any order. Only ids are kept in
    memory: 80 MB for five million.
    """

    def __init__(self, path, tokenizer):
        self.lines, self.tokenizer = JsonLines(path), tokenizer
        ids = np.empty(len(self.lines), np.uint64)
        for i in range(len(ids)):
            try:
                ids[i] = int(self.lines[i]["id"], 16)
            except (KeyError, TypeError, ValueError, OverflowError):
                remedy = "each line needs the id of the exported prompt"
                raise ValueError(f"{self.lines.name(i)}: {remedy}") from None
        self.order = np.argsort(ids, kind="stable")
        self.ids = ids[self.order]

    def find(self, ids):
        """-> the lines that answer these ids. ValueError names the first that none answers."""
        wanted = np.array([int(id, 16) for id in ids], np.uint64)
        places = np.searchsorted(self.ids, wanted).clip(max=len(self.ids) - 1)
        missing = np.flatnonzero(self.ids[places] != wanted)
        if len(missing):
            what = f"no answer to {len(missing)} of {len(ids)} prompts"
            remedy = "--export with the same settings lists the prompts; finished blocks are kept"
            raise ValueError(f"{self.lines.path}: {what}, first to {ids[missing[0]]} ({remedy})")
        return self.order[places].tolist()

    def read(self, line, max_new_tokens):
        """-> {"response"}, with "truncated" where it was cut; {"skipped": reason} where the engine
        broke off.
        """
        answer, tokenizer = self.lines[line], self.tokenizer
        ids, text, reason = (answer.get(key) for key in ("token_ids", "text", "finish_reason"))
        if reason not in ("stop", "length") or not (isinstance(ids, list) or isinstance(text, str)):
            wanted = 'needs "text" or "token_ids", and "stop" or "length" as "finish_reason"'
            return {"skipped": f"{self.lines.name(line)} {wanted}, not {reason!r}"}
        whole = reason == "stop"
        if ids is not None:
            if ids and ids[-1] in tokenizer.stop_ids:  # some engines give it, some do not
                ids = ids[:-1]
            # The engine's limit may have been a larger one. The stop id counts too.
            whole = whole and len(ids) < max_new_tokens
            text = tokenizer.decode(ids[:max_new_tokens])
        return {"response": text.strip()} | ({} if whole else {"truncated": True})
