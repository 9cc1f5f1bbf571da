"""
rows.py: JSONL files of any size, the order in which training reads them, and long work cut into
blocks that survive a kill.
"""

import contextlib
import functools
import json
import os
import shutil
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from engine.checkpoint import write_jsonl, write_text
from engine.run import barrier

# -- rows of files ---------------------------------------------------------------------------------

MAX_ROW = 1 << 18  # bytes of one row; more is a broken file, and would only cost memory


class JsonLines:
    """Random access to the rows of JSONL files that may be larger than memory. What is kept is
    where each row begins, in an index beside the file.

    path: one file, several with commas between them, or a folder, of which all *.jsonl are read in
    the order of their names. Rows are numbered through, from the first file to the last; an empty
    line is no row.
    """

    def __init__(self, path):
        if Path(path).is_dir():
            self.files = sorted(Path(path).glob("*.jsonl"))
        elif Path(path).exists():
            self.files = [Path(path)]
        else:
            self.files = [Path(part.strip()) for part in str(path).split(",")]
        missing = [file for file in self.files if not file.is_file()]
        if missing or not self.files:
            name = missing[0] if missing else f"{path}/*.jsonl"
            remedy = (
                "is the path right? `python demo/prepare.py` and generate_data.py make the demo's"
            )
            raise FileNotFoundError(f"{name} is missing: {remedy}")
        self.path, self.starts = path, [row_starts(file) for file in self.files]
        self.bytes = sum(int(starts[-1]) for starts in self.starts)
        # number of each file's first row
        self.first = np.cumsum([0] + [len(starts) - 1 for starts in self.starts])
        if not len(self):
            raise ValueError(f"{path} holds no rows")

    def __len__(self):
        return int(self.first[-1])

    def __reduce__(self):
        """In another process the files are opened anew: data-loading workers share the mapped index
        and copy nothing.
        """
        return JsonLines, (self.path,)

    def locate(self, i):
        """Row number -> (its file's number, its number within that file)"""
        if not 0 <= i < len(self):
            raise IndexError(f"row {i} of {len(self)}")
        file = int(np.searchsorted(self.first, i, "right")) - 1
        return file, int(i - self.first[file])

    def name(self, i):
        """How messages speak of row i: "F.jsonl, row 17"."""
        file, row = self.locate(i)
        return f"{self.files[file]}, row {row + 1}"

    def lengths(self, rows):
        """Bytes of each of `rows` (array of numbers): near enough to tokens for putting rows of
        like length together.
        """
        lengths = np.empty(len(rows), np.int64)
        files = np.searchsorted(self.first, rows, "right") - 1
        for file in np.unique(files):
            here, starts = files == file, self.starts[file]
            places = rows[here] - self.first[file]
            lengths[here] = starts[places + 1] - starts[places]
        return lengths

    def __getitem__(self, i):
        """Row i as a dict. ValueError names file and row where it is not a JSON object."""
        number, row = self.locate(i)
        start, end = self.starts[number][row : row + 2]
        if end - start > MAX_ROW:
            raise ValueError(f"{self.name(i)} is longer than {MAX_ROW:,} bytes: no row is")
        with open(self.files[number], "rb") as file:
            file.seek(start)
            line = file.read(end - start)
        try:
            row = json.loads(line)
            # Half a surrogate pair, "\\ud800", could be read, but never written again.
            json.dumps(row, ensure_ascii=False).encode()
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self.name(i)} is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{self.name(i)} is not a JSON object")
        return row


def row_starts(file):
    """Where the rows of a JSONL file begin, and at last its size: int64, memory-mapped from
    FILE.index, so that it takes no memory of a process.

    The index is made where it is missing, damaged, or was made for a file of another size or time
    of change. Where it cannot be kept, in a folder that must not be written say, it stays in
    memory. Layout: the result, mtime_ns, crc32 of all that.
    """
    stat, kept = file.stat(), file.with_name(f"{file.name}.index")
    try:
        index = np.memmap(kept, np.int64, "r")
        same_file = tuple(index[-3:-1]) == (stat.st_size, stat.st_mtime_ns)
        if same_file and zlib.crc32(index[:-1]) == index[-1]:
            # mapped anew: the pages that the check has touched are let go
            return np.memmap(kept, np.int64, "r")[:-2]
    except (OSError, ValueError):  # none there, or of an impossible size
        pass
    pieces, position, after_newline = [], 0, True
    with open(file, "rb") as stream:
        while block := stream.read(1 << 24):
            newline = np.frombuffer(block, np.uint8) == ord("\n")
            # A row begins at what is no newline and comes after one.
            pieces.append(
                position + np.flatnonzero(~newline & np.append(after_newline, newline[:-1]))
            )
            position, after_newline = position + len(block), newline[-1]
    index = np.concatenate([*pieces, [stat.st_size, stat.st_mtime_ns]]).astype(np.int64)
    index = np.append(index, zlib.crc32(index))
    temporary = kept.with_name(
        f"{kept.name}.{os.urandom(4).hex()}.tmp"
    )  # the ranks of a job may all be here at once
    try:
        index.tofile(temporary)
        os.replace(temporary, kept)
        return np.memmap(kept, np.int64, "r")[:-2]
    except OSError:
        with contextlib.suppress(OSError):  # a read-only disk refuses this too
            temporary.unlink()
        return index[:-2]


SUFFIXES = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".aiff")


def audio_file(path, root=None):
    """root/path, or where nothing is there, the one file that differs from it in its extension.

    (Data sets say .flac of what is .wav on disk.) root: the folder that the path starts from and
    must stay in (ValueError), for it comes out of a data file; None: any path will do.
    """
    file = Path(root or ".") / path
    inside = root is None or Path(os.path.abspath(file)).is_relative_to(os.path.abspath(root))
    if not inside:
        remedy = "give a root that holds it (/ holds all absolute paths)"
        raise ValueError(f"{path} lies outside the audio root {root}: {remedy}")
    if file.exists() or not file.name:
        return file
    others = [other for suffix in SUFFIXES if (other := file.with_suffix(suffix)).exists()]
    return others[0] if len(others) == 1 else file


# -- the order of training -------------------------------------------------------------------------


@functools.lru_cache(maxsize=2)
def epoch_order(n, seed, epoch):
    """The row numbers 0 … n - 1 in the order of an epoch: a function of its arguments. 40 MB for
    five million rows.
    """
    return np.random.default_rng([seed, epoch]).permutation(n)


def step_rows(step, n, lengths, global_batch, pool, seed):
    """Numbers of the rows of one step, a function of its arguments. n: all rows there are; lengths:
    row numbers -> lengths.

    Each epoch has an order of its own. Rows are sorted by length within pools of `pool` batches
    (neighbours of like length waste little padding), and a pool's batches are shuffled. Rows that
    do not fill a batch at the end sit this epoch out.
    """
    per_epoch = n // global_batch
    epoch, index = divmod(step, per_epoch)
    first = index // pool * pool
    rows = epoch_order(n, seed, epoch)[
        first * global_batch : min(first + pool, per_epoch) * global_batch
    ]
    batches = rows[np.argsort(lengths(rows), kind="stable")].reshape(-1, global_batch)
    order = np.random.default_rng([seed, epoch, first]).permutation(len(batches))
    return batches[order[index - first]].tolist()


class Batches(torch.utils.data.Sampler):
    """Yields this rank's micro-batches, from step `first` on. Micro-batch m of a step goes to rank
    m % world.
    """

    def __init__(self, rows, settings, first, last, rank, world):
        self.rows, self.s, self.first, self.last, self.rank, self.world = (
            rows,
            settings,
            first,
            last,
            rank,
            world,
        )

    def __iter__(self):
        s = self.s
        for step in range(self.first, self.last):
            n, lengths = len(self.rows), self.rows.lengths
            batch = step_rows(step, n, lengths, s.global_batch, s.length_pool, s.seed)
            first, stride = self.rank * s.micro_batch, self.world * s.micro_batch
            for start in range(first, s.global_batch, stride):
                yield batch[start : start + s.micro_batch]


def split_long(rows, max_tokens):
    """A micro-batch of prepared rows -> parts to compute one after the other.

    A part has at most so many tokens, padding included, or is one row. Sorting by length puts the
    longest rows together, and what is kept for the backward pass grows with their tokens.
    """
    parts, longest = [], 0
    for row in rows:
        length = len(row["ids"]) + len(row["target"])
        longest = max(longest, length)
        if not parts or longest * (len(parts[-1]) + 1) > max_tokens:
            parts.append([])
            longest = length
        parts[-1].append(row)
    return parts


# -- work in blocks --------------------------------------------------------------------------------


def work_in_blocks(n_items, block, folder, stamp, rank, world, make, prepare=None):
    """Make rows block by block, one file per finished block, so that a killed job continues where
    it stopped.

    make(range of item numbers) -> list of rows (dicts). Blocks are shared out over the ranks; a
    block's content must depend on its items alone. stamp: what the result depends on; files left by
    a run with another stamp are an error.
    prepare: a thread calls prepare(range of item numbers) for the next block while make works on
    this one, and make gets what it returns instead of the numbers.
    -> paths of the block files, in order; all of them are there.
    """
    folder = Path(folder)
    blocks = [range(start, min(start + block, n_items)) for start in range(0, n_items, block)]
    parts = [folder / f"{b:06d}.jsonl" for b in range(len(blocks))]
    stamp = json.dumps(stamp | {"n_items": n_items, "block": block}, sort_keys=True)
    if rank == 0:
        file = folder / "stamp.json"
        if not file.exists():
            # left of a finished run that was killed while it cleaned up
            shutil.rmtree(folder, ignore_errors=True)
        if file.exists() and file.read_text(encoding="utf-8") != stamp:
            remedy = "delete that folder, or give another --out"
            raise ValueError(f"{folder} holds blocks made with other settings or data: {remedy}")
        write_text(file, stamp)
        for claim in folder.glob("*.claim"):
            claim.unlink()  # of a killed run
    barrier()
    todo = [b for b in range(len(blocks)) if not parts[b].exists()]
    done = n_items - sum(len(blocks[b]) for b in todo)
    name = folder.name.split(".")[0]
    with tqdm(total=n_items, initial=done, desc=name, unit="row", disable=rank > 0) as bar:
        given = ((b, prepare(blocks[b]) if prepare else blocks[b]) for b in claimed(todo, parts))
        for b, items in one_ahead(given) if prepare else given:
            rows = make(items)
            write_jsonl(parts[b], rows)
            bar.update(min(len(blocks[b]) * world, bar.total - bar.n))
    barrier()
    return parts


def claimed(todo, parts):
    """Yields the blocks that are this process's. Whoever is free takes the next one: after days of
    equal shares, the first rank would wait too long for the last.
    """
    for b in todo:
        try:
            parts[b].with_suffix(".claim").touch(exist_ok=False)
        except FileExistsError:
            continue
        yield b


def one_ahead(items):
    """The same items. A thread makes the next one while the caller works on this one. (A signal
    waits until the thread is done, a second one does not.)
    """
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = thread.submit(next, items, None)
            yield item
