"""
common.py: the plumbing that the scripts share: command line, processes, JSONL files, safe writing. Nothing of the method is here.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

# -- settings and command line -----------------------------------------------------------------------------------------


def setting(default, help):
    """A field of a script's settings dataclass, with the reason or meaning that --help prints."""
    return dataclasses.field(default=default, metadata={"help": help})


def parse_settings(cls, description, argv=None):
    """Fill the dataclass from the command line: --name value, typed like the default. Unknown names are errors."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    for field in dataclasses.fields(cls):
        kind, text = type(field.default), f"{field.metadata['help']} (default: {field.default!r})".replace("%", "%%")
        parser.add_argument(f"--{field.name}", type=kind, default=field.default, help=text, metavar=kind.__name__)
    settings = cls(**vars(parser.parse_args(argv)))
    changed = {f.name: getattr(settings, f.name) for f in dataclasses.fields(cls) if getattr(settings, f.name) != f.default}
    if changed and int(os.environ.get("RANK", 0)) == 0:
        print("settings:", ", ".join(f"{name}={value!r}" for name, value in changed.items()), file=sys.stderr)
    return settings


def fail(error):
    """One clear line on stderr and exit status 1: for what a user can get wrong."""
    sys.exit(f"error: {error}")


def run_description(settings):
    """What a run was: arguments, commit, versions, device. Kept beside everything a script writes."""
    here = Path(__file__).parent
    git = subprocess.run(["git", "-C", here, "describe", "--always", "--dirty"], capture_output=True, text=True)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores"
    return {
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "settings": dataclasses.asdict(settings),
        "git": git.stdout.strip() or "unknown",
        "torch": torch.__version__,
        "device": device,
        "world_size": int(os.environ.get("WORLD_SIZE", 1)),
    }


# -- processes -----------------------------------------------------------------------------------------------------------


def start_processes():
    """Join the process group under torchrun, or be a world of one under plain python. -> (rank, world size, device)"""
    rank, world, local = (int(os.environ.get(name, 0)) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    world = max(1, world)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        if local >= torch.cuda.device_count():
            n = torch.cuda.device_count()
            fail(f"more processes than GPUs on this machine: torchrun --nproc_per_node={n}")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    elif "OMP_NUM_THREADS" not in os.environ or "TORCHELASTIC_RUN_ID" in os.environ:
        # torchrun sets one thread per process; share the cores among the processes of this node instead.
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return rank, world, device


def barrier():
    if dist.is_initialized():
        dist.barrier()


def sum_over_ranks(tensor, op=dist.ReduceOp.SUM):
    if dist.is_initialized():
        dist.all_reduce(tensor, op)
    return tensor


# -- files -----------------------------------------------------------------------------------------------------------------


class JsonLines:
    """Random access to the rows of JSONL files that may be larger than memory. What is kept is where each row begins, in an index beside the file.

    path: one file, several with commas between them, or a folder, of which all *.jsonl are read in the order of their names.
    Rows are numbered through, from the first file to the last; an empty line is no row.
    """

    def __init__(self, path):
        several = Path(path).is_dir() or "," in str(path) and not Path(path).exists()
        self.files = [Path(path)]
        if several:
            self.files = sorted(Path(path).glob("*.jsonl")) if Path(path).is_dir() else [Path(part.strip()) for part in str(path).split(",")]
        if missing := [str(file) for file in self.files if not file.is_file()] or ([] if self.files else [f"{path}/*.jsonl"]):
            raise FileNotFoundError(f"{missing[0]} is missing: `python demo/prepare.py` and `python generate_data.py` make the demo's")
        self.path, self.starts = path, [row_starts(file) for file in self.files]
        self.first = np.cumsum([0] + [len(starts) - 1 for starts in self.starts])  # number of each file's first row

    def __len__(self):
        return int(self.first[-1])

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
        """Bytes of each of `rows` (array of numbers): near enough to tokens for putting rows of like length together."""
        lengths, files = np.empty(len(rows), np.int64), np.searchsorted(self.first, rows, "right") - 1
        for file in np.unique(files):
            here, starts = files == file, self.starts[file]
            lengths[here] = starts[rows[here] - self.first[file] + 1] - starts[rows[here] - self.first[file]]
        return lengths

    def __getitem__(self, i):
        """Row i as a dict. ValueError names file and row where it is not a JSON object."""
        number, row = self.locate(i)
        with open(self.files[number], "rb") as file:
            file.seek(self.starts[number][row])
            line = file.read(self.starts[number][row + 1] - self.starts[number][row])
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{self.name(i)} is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{self.name(i)} is not a JSON object")
        return row


def row_starts(file):
    """Where the rows of a JSONL file begin, and at last its size: int64, memory-mapped from FILE.index, so that it takes no memory of a process.

    The index is made where it is missing, damaged, or was made for a file of another size or time of change. Where it cannot be
    kept, in a folder that must not be written say, it stays in memory. Layout: the result, mtime_ns, crc32 of all that.
    """
    stat, kept = file.stat(), file.with_name(f"{file.name}.index")
    try:
        index = np.memmap(kept, np.int64, "r")
        if tuple(index[-3:-1]) == (stat.st_size, stat.st_mtime_ns) and zlib.crc32(index[:-1]) == index[-1]:
            return np.memmap(kept, np.int64, "r")[:-2]  # mapped anew: the pages that the check has touched are let go
    except (OSError, ValueError):  # none there, or of an impossible size
        pass
    pieces, position, after_newline = [], 0, True
    with open(file, "rb") as stream:
        while block := stream.read(1 << 24):
            newline = np.frombuffer(block, np.uint8) == ord("\n")
            # A row begins at what is no newline and comes after one.
            pieces.append(position + np.flatnonzero(~newline & np.append(after_newline, newline[:-1])))
            position, after_newline = position + len(block), newline[-1]
    index = np.concatenate([*pieces, [stat.st_size, stat.st_mtime_ns]]).astype(np.int64)
    index = np.append(index, zlib.crc32(index))
    temporary = kept.with_name(f"{kept.name}.{os.urandom(4).hex()}.tmp")  # the ranks of a job may all be here at once
    try:
        index.tofile(temporary)
        os.replace(temporary, kept)
        return np.memmap(kept, np.int64, "r")[:-2]
    except OSError:
        temporary.unlink(missing_ok=True)
        return index[:-2]


def write_atomically(path, write):
    """Call write(temporary name), flush to the disk, rename: whoever reads sees the old file or the whole new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_text(path, text):
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def file_hash(folder):
    """sha256 over the safetensors files of a model folder, in the order of their names."""
    digest = hashlib.sha256()
    for file in sorted(Path(folder).glob("*.safetensors")):
        with open(file, "rb") as stream:
            while block := stream.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()


def work_in_blocks(n_items, block, folder, stamp, rank, world, make):
    """Make rows block by block, one file per finished block, so that a killed job continues where it stopped.

    make(range of item numbers) -> list of rows (dicts). Blocks are shared out over the ranks; a block's content must depend
    on its items alone. stamp: what the result depends on; files left by a run with another stamp are an error.
    -> paths of the block files, in order; all of them are there.
    """
    folder = Path(folder)
    blocks = [range(start, min(start + block, n_items)) for start in range(0, n_items, block)]
    parts = [folder / f"{b:06d}.jsonl" for b in range(len(blocks))]
    stamp = json.dumps(stamp | {"n_items": n_items, "block": block}, sort_keys=True)
    if rank == 0:
        file = folder / "stamp.json"
        if file.exists() and file.read_text(encoding="utf-8") != stamp:
            raise ValueError(f"{folder} holds blocks made with other settings or data: delete that folder, or give another --out")
        write_text(file, stamp)
    barrier()
    todo = [b for b in range(len(blocks)) if not parts[b].exists()]
    done = n_items - sum(len(blocks[b]) for b in todo)
    with tqdm(total=n_items, initial=done, desc=folder.name.split(".")[0], unit="row", disable=rank > 0) as bar:
        for b in todo[rank::world]:
            rows = make(blocks[b])
            write_text(parts[b], "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
            bar.update(min(len(blocks[b]) * world, bar.total - bar.n))
    barrier()
    return parts
