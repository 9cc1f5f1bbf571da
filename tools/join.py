"""
join.py: metadata of several corpora into one file, at most so many clips of each.

    python tools/join.py animals.train.metadata.jsonl:300,emodb.train.metadata.jsonl:200 \\
        --out all.metadata.jsonl

Labels take turns, so that a small part of a corpus still holds all of them. Which clips of a label
are taken is decided by a hash of their ids: the same command gives the same file. All ids have to
start from the same folder: see --audio_root of corpora.py. `--without Note,Articulation,text`
leaves out what sound cannot teach: attributes that held-out clips do not share with trained ones,
and spoken words in a language that the ears do not know.
"""

import collections
import itertools
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))
from benchmarks.common import read_rows
from engine import run
from engine.checkpoint import write_jsonl
from engine.run import argument, setting


@dataclass
class Settings:
    files: str = argument("metadata files, with commas; FILE:300 takes at most 300 clips")
    out: str = setting("all.metadata.jsonl", "the file to write")
    without: str = setting("", "attributes to leave out, and `text`: names, with commas")


def take(rows, n):
    """At most n of the rows, labels (a clip's attributes) taking turns. -> rows in their old order"""
    order, by_label = {id(row): i for i, row in enumerate(rows)}, collections.defaultdict(list)
    for row in sorted(rows, key=lambda row: zlib.crc32(row["id"].encode())):
        first = next(iter(row["segments"][0]["attributes"].items()), ("", ""))
        by_label[first].append(row)
    turns = itertools.zip_longest(*(by_label[label] for label in sorted(by_label)))
    taken = [row for turn in turns for row in turn if row][:n]
    return sorted(taken, key=lambda row: order[id(row)])


def leave_out(rows, names):
    """The rows without the attributes of these names, and without the words if "text" is one."""
    kept = lambda fields: {name: value for name, value in fields.items() if name not in names}
    part = lambda segment: kept(segment) | {"attributes": kept(segment["attributes"])}
    return [row | {"segments": [part(segment) for segment in row["segments"]]} for row in rows]


def main():
    s = run.parse_settings(Settings, __doc__)
    joined = {}
    for part in s.files.split(","):
        file, colon, n = part.strip().rpartition(":")
        if not colon or not n.isdigit():
            file, n = part.strip(), sys.maxsize
        if not Path(file).is_file():
            raise FileNotFoundError(
                f"{file} is missing: corpora.py and demo/prepare.py make such files"
            )
        rows = take(read_rows(file), int(n))
        if twice := [row["id"] for row in rows if row["id"] in joined]:
            raise ValueError(f"{file}: {twice[0]} is in an earlier file too")
        joined |= {row["id"]: row for row in rows}
        print(f"{file}: {len(rows)} clips")
    without = {name.strip() for name in s.without.split(",") if name.strip()}
    write_jsonl(s.out, leave_out(joined.values(), without))
    print(f"{s.out}: {len(joined)} clips")


if __name__ == "__main__":
    run.main(main)
