"""
instructions.py: which instructions does the LLM, reading the description, answer with the clip's
attributes? What its answers do not say, an adapter cannot learn.

    python tools/join.py animals.train.metadata.jsonl:10,emodb.train.metadata.jsonl:10 \\
        --out few.metadata.jsonl
    python generate_data.py --metadata few.metadata.jsonl --instructions DIR --per_clip 1000 \\
        --block 1 --keep_truncated 1 --out few.jsonl        # each clip, each instruction
    python tools/instructions.py few.jsonl                  # Markdown: a table for each domain

docs/instructions.md is what it made of demo/instructions.qwen.

A figure is the share of an instruction's answers that name the attribute, and none of its other
values.
"""

import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))
from benchmarks.heldout import is_named, load, values_in
from engine import run
from engine.run import argument, setting


@dataclass
class Settings:
    rows: str = argument("rows of generate_data.py; the metadata lies beside them")
    metadata: str = setting("", "the labels, if not ROWS.metadata.jsonl")


def tables(rows):
    """rows: of heldout.load -> Markdown, the instructions that name most first."""
    lines = []
    for domain in sorted({row["domain"] for row in rows}):
        mine = [row for row in rows if row["domain"] == domain]
        values = values_in(mine)
        hits = {name: defaultdict(list) for name in values}  # attribute: {instruction: [bool]}
        for row in mine:
            for name, label in row["attributes"].items():
                named = is_named(row["response"], label, values[name])
                hits[name][row["prompt"]].append(named)
        shares = {
            prompt: [sum(h[prompt]) / max(1, len(h[prompt])) for h in hits.values()]
            for prompt in dict.fromkeys(row["prompt"] for row in mine)
        }
        mean = lambda prompt: sum(shares[prompt]) / len(shares[prompt])
        n_good = sum(mean(prompt) >= 0.7 for prompt in shares)
        lines += [f"## {domain}: {n_good} of {len(shares)} instructions name 0.70 or more", ""]
        lines += [f"| instruction | {' | '.join(values)} |", "| --- " * (1 + len(values)) + "|"]
        for prompt in sorted(shares, key=mean, reverse=True):
            lines.append(f"| {prompt} | {' | '.join(f'{share:.2f}' for share in shares[prompt])} |")
        lines.append("")
    return "\n".join(lines)


def main():
    s = run.parse_settings(Settings, __doc__)
    print(tables(load(s.rows, "", s.metadata)))


if __name__ == "__main__":
    run.main(main)
