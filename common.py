"""
common.py: the plumbing that the scripts share: command line, processes, JSONL files, safe writing. Nothing of the method is here.
"""

import argparse
import contextlib
import dataclasses
import datetime
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from tqdm import tqdm

# -- settings and command line -----------------------------------------------------------------------------------------


def setting(default, help, low=0, high=10**9):
    """A field of a script's settings dataclass, with the reason or meaning that --help prints, and a number's range.

    A default of -1 ("off", "all") is allowed whatever the range.
    """
    return dataclasses.field(default=default, metadata={"help": help, "range": (low, high)})


def parse_settings(cls, description, argv=None):
    """Fill the dataclass from the command line: --name value, typed like the default. Unknown names, wrong types and ranges are errors."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=formatter, allow_abbrev=False, usage=argparse.SUPPRESS)
    for field in dataclasses.fields(cls):
        kind, text = type(field.default), f"{field.metadata['help']} (default: {field.default!r})".replace("%", "%%")
        parser.add_argument(f"--{field.name}", type=kind, default=field.default, help=text, metavar=kind.__name__)
    settings = cls(**vars(parser.parse_args(argv)))
    for field in dataclasses.fields(cls):
        value, (low, high) = getattr(settings, field.name), field.metadata["range"]
        if not isinstance(value, str) and value != field.default and not low <= value <= high:  # NaN is in no range
            parser.error(f"argument --{field.name}: {value} is not between {low} and {high}")
    changed = {f.name: getattr(settings, f.name) for f in dataclasses.fields(cls) if getattr(settings, f.name) != f.default}
    if changed and int(os.environ.get("RANK", 0)) == 0:
        print("settings:", ", ".join(f"{name}={value!r}" for name, value in changed.items()), file=sys.stderr)
    return settings


def fail(error):
    """One clear line on stderr and exit status 1: for what a user can get wrong."""
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()  # its last state goes before the error, not after it
    sys.exit(f"error: {error}")


def run(main):
    """Call a script's main(). Wrong input, a full disk, a signal, a lost process: each ends in one clear line, and in a status that is not 0."""

    def stop(number, frame):
        signal.signal(number, signal.SIG_DFL)  # a second one does not wait
        os.write(2, f"\nstopped by {signal.Signals(number).name}: what is finished is kept, the same command continues\n".encode())
        sys.exit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    try:
        main()
    except (OSError, ValueError, ImportError) as error:
        fail(error)
    except (MemoryError, RuntimeError) as error:
        text = str(error)
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in text:
            fail("out of memory: lower --micro_batch, --batch_size or the lengths (" + (text or "MemoryError").splitlines()[0] + ")")
        if dist.is_initialized() and ("peer" in text or "imed out" in text):  # closed by, reset by; Timed out
            line = text.strip().splitlines()[0]
            os.write(2, f"error: rank {os.environ['RANK']} lost another rank ({line}); torchrun names it. The same command continues\n".encode())
            os._exit(1)  # an orderly exit would wait for the lost rank
        raise


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


TIMEOUT = datetime.timedelta(minutes=30)  # for a rank that hangs; a killed one is noticed at once, and torchrun ends the others


def start_processes():
    """Join the process group under torchrun, or be a world of one under plain python. -> (rank, world size, device)"""
    rank, world, local = (int(os.environ.get(name, 0)) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    world = max(1, world)
    device = torch.device("cpu")
    if (asked := os.environ.get("CUDA_VISIBLE_DEVICES", "")) not in ("", "-1") and not torch.cuda.is_available():
        fail(f"CUDA_VISIBLE_DEVICES={asked} asks for a GPU, and torch finds none: check the driver, or unset it to compute on the CPU")
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
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    return rank, world, device


def barrier():
    if dist.is_initialized():
        dist.barrier()


def sum_over_ranks(tensor, op=dist.ReduceOp.SUM):
    if dist.is_initialized():
        dist.all_reduce(tensor, op)
    return tensor


def gather(items):
    """The lists of all ranks, joined in the order of the ranks."""
    if not dist.is_initialized():
        return items
    lists = [None] * dist.get_world_size()
    dist.all_gather_object(lists, items)
    return sum(lists, [])


# -- files -----------------------------------------------------------------------------------------------------------------


MAX_ROW = 1 << 18  # bytes of one row; more is a broken file, and would only cost memory


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
        self.bytes = sum(int(starts[-1]) for starts in self.starts)
        self.first = np.cumsum([0] + [len(starts) - 1 for starts in self.starts])  # number of each file's first row
        if not len(self):
            raise ValueError(f"{path} holds no rows")

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
        start, end = self.starts[number][row : row + 2]
        if end - start > MAX_ROW:
            raise ValueError(f"{self.name(i)} is longer than {MAX_ROW:,} bytes: no row is")
        with open(self.files[number], "rb") as file:
            file.seek(start)
            line = file.read(end - start)
        try:
            row = json.loads(line)
            json.dumps(row, ensure_ascii=False).encode()  # half a surrogate pair, "\\ud800", could be read, but never written again
        except (ValueError, RecursionError) as error:
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
        with contextlib.suppress(OSError):  # a read-only disk refuses this too
            temporary.unlink()
        return index[:-2]


@contextlib.contextmanager
def writing(path):
    """Whatever keeps the body from writing: the error names the file and the remedy."""
    try:
        yield
    except OSError as error:
        reason = f"{path} cannot be written ({error.strerror or error}): free space or mend that folder"
        raise OSError(f"{reason}, then the same command continues; what stood there before is whole") from None


def write_atomically(path, write):
    """Call write(temporary name), flush to the disk, rename: whoever reads sees the old file or the whole new one."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)


def write_text(path, text):
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def tensors_hash(tensors):
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def save_tensors(path, tensors):
    """Write a safetensors file, atomically, that holds the sha256 of its own tensors."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # As bytes: safetensors' own save_file leaves a file of another name behind when it is killed.
    data = save(tensors, {"sha256": tensors_hash(tensors)})  # one entry: of several, safetensors writes the order at random
    write_atomically(path, lambda temporary: temporary.write_bytes(data))


def load_tensors(path):
    """What save_tensors wrote, on the CPU; also safetensors files of others, without a sha256. ValueError names a damaged file."""
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            sha256 = (file.metadata() or {}).get("sha256")
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error})") from None
    if sha256 and sha256 != tensors_hash(tensors):
        raise ValueError(f"{path} is damaged (its tensors are not those whose sha256 it holds)")
    return tensors


def write_record(path, value):
    """A dict as JSON, atomically, with the sha256 of itself."""
    write_text(path, json.dumps(value | {"sha256": hashlib.sha256(json.dumps(value).encode()).hexdigest()}, indent=2))


def read_record(path):
    """What write_record wrote, or JSON of others without a sha256. ValueError names a damaged file."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
        sha256 = value.pop("sha256", None)
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error})") from None
    if sha256 and sha256 != hashlib.sha256(json.dumps(value).encode()).hexdigest():
        raise ValueError(f"{path} is damaged (its text is not the one whose sha256 it holds; if you changed it on purpose, take that entry out)")
    return value


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
        if not file.exists():
            shutil.rmtree(folder, ignore_errors=True)  # left of a finished run that was killed while it cleaned up
        if file.exists() and file.read_text(encoding="utf-8") != stamp:
            raise ValueError(f"{folder} holds blocks made with other settings or data: delete that folder, or give another --out")
        write_text(file, stamp)
        for claim in folder.glob("*.claim"):
            claim.unlink()  # of a killed run
    barrier()
    todo = [b for b in range(len(blocks)) if not parts[b].exists()]
    done = n_items - sum(len(blocks[b]) for b in todo)
    with tqdm(total=n_items, initial=done, desc=folder.name.split(".")[0], unit="row", disable=rank > 0) as bar:
        for b in todo:
            # Whoever is free takes the next block: after days of equal shares, the first rank would wait too long for the last.
            try:
                parts[b].with_suffix(".claim").touch(exist_ok=False)
            except FileExistsError:
                continue
            rows = make(blocks[b])
            write_text(parts[b], "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
            bar.update(min(len(blocks[b]) * world, bar.total - bar.n))
    barrier()
    return parts
