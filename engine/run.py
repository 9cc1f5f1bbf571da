"""
run.py: what every script needs around its work: settings, processes, signals, errors in one line.
"""

import argparse
import contextlib
import dataclasses
import datetime
import functools
import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

# Imported after there is a process group, as torch.optim would, it holds the group in its default
# arguments: the group's threads then outlive Python, and abort now and then.
import torch.distributed.nn  # noqa: F401
from tqdm import tqdm

from engine.checkpoint import write_text, writing

# -- settings and command line ---------------------------------------------------------------------


def setting(default, help, low=0, high=10**9, choices=None):
    """A field of a script's settings dataclass: what --help prints, and a number's range or
    choices.

    default: a value, or of a setting that recipes.py knows one for each recipe, {"demo": …,
    "paper": …}. A default of -1 ("off", "all") is allowed whatever the range.
    """
    values = default if isinstance(default, dict) else {"": default}
    metadata = {"help": help, "range": (low, high), "values": values, "choices": choices}
    return dataclasses.field(default=next(iter(values.values())), metadata=metadata)


def argument(help):
    """A field that is given without a --name, like the file of `python model.py clip.wav`."""
    return dataclasses.field(
        metadata={"help": help, "range": (0, 0), "values": {}, "choices": None}
    )


def parse_settings(cls, description, argv=None):
    """Fill the dataclass from the command line: --name value, typed like the default.

    Unknown names, wrong types and ranges are errors. A setting of 0 or 1 can also be given as
    --name alone. What is not given comes from the recipe, where the dataclass has a field `recipe`.
    -> settings; settings.given holds the names that stood on the command line.
    """
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        usage=argparse.SUPPRESS,
        argument_default=argparse.SUPPRESS,
    )
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for name, field in fields.items():
        values, help = field.metadata["values"], field.metadata["help"]
        if not values:
            parser.add_argument(name, help=help.replace("%", "%%"))
            continue
        shown = ", ".join(
            f"{recipe}: {value!r}" if recipe else repr(value) for recipe, value in values.items()
        )
        kind = type(field.default)
        is_switch = kind is int and field.metadata["range"] == (0, 1)
        options = {"nargs": "?", "const": 1} if is_switch else {}
        shown = f"{help} (default: {shown})".replace("%", "%%")
        parser.add_argument(f"--{name}", type=kind, help=shown, metavar=kind.__name__, **options)
    given = vars(parser.parse_args(argv))
    defaults = {name: field.default for name, field in fields.items() if field.metadata["values"]}
    if "recipe" in fields:
        recipe = given.get("recipe", defaults["recipe"])
        known = max((field.metadata["values"] for field in fields.values()), key=len)
        if recipe not in known:
            parser.error(f"argument --recipe: {recipe!r} is none of {', '.join(known)}")
        for name, field in fields.items():
            defaults[name] = field.metadata["values"].get(recipe, defaults[name])
    for name, value in given.items():
        (low, high), choices = fields[name].metadata["range"], fields[name].metadata["choices"]
        is_number = not isinstance(value, str) and value != defaults[name]
        if is_number and not low <= value <= high:  # NaN is in no range
            parser.error(f"argument --{name}: {value} is not between {low} and {high}")
        if choices and value not in choices:
            names = ", ".join(filter(None, choices))
            parser.error(f"argument --{name}: {value!r} is none of {names}")
    settings = cls(**defaults | given)
    settings.given = frozenset(given)
    answers_a_question = any(not field.metadata["values"] for field in fields.values())
    told = [f"{n}={v!r}" for n, v in given.items() if v != fields[n].default]
    if told and not answers_a_question and int(os.environ.get("RANK", 0)) == 0:
        print("settings:", ", ".join(told), file=sys.stderr)
    return settings


def description(settings):
    """What a run was: arguments, commit, versions, device. Kept beside everything a script
    writes.
    """
    here = Path(__file__).parent
    commit = ""  # stays so without git, or outside a repository
    with contextlib.suppress(OSError):
        command = ["git", "-C", here, "describe", "--always", "--dirty"]
        commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    device = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"CPU, {os.cpu_count()} cores"
    )
    return {
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "settings": dataclasses.asdict(settings),
        "git": commit or "unknown",
        "torch": torch.__version__,
        "device": device,
        "world_size": int(os.environ.get("WORLD_SIZE", 1)),
    }


# -- errors, warnings, signals ---------------------------------------------------------------------


def fail(error):
    """One clear line on stderr and exit status 1: for what a user can get wrong."""
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()  # its last state goes before the error, not after it
    sys.exit(f"error: {error}")


def main(script):
    """Call a script's main(). Wrong input, a full disk, a signal, a lost process: each ends in one
    clear line and a status that is not 0. (train.py answers signals itself: saved is status 0.)
    """

    def stop(number, frame):
        signal.signal(number, signal.SIG_DFL)  # a second one does not wait
        name = signal.Signals(number).name
        os.write(
            2,
            f"\nstopped by {name}: what is finished is kept, the same command continues\n".encode(),
        )
        sys.exit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    try:
        script()
        # A rank that leaves the group's threads to the interpreter's end can abort there.
        if dist.is_initialized():
            dist.destroy_process_group()
    except (OSError, ValueError, ImportError) as error:
        fail(error)
    except (MemoryError, RuntimeError) as error:
        text = str(error) or "MemoryError"
        first_line = text.strip().splitlines()[0]
        out_of_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if out_of_memory or "can't allocate memory" in text:
            remedy = "lower --micro_batch, --batch_size or the lengths"
            fail(f"out of memory: {remedy} ({first_line})")
        # "closed by peer", "reset by peer"; "Timed out"
        if dist.is_initialized() and ("peer" in text or "imed out" in text):
            lost = f"error: rank {os.environ['RANK']} lost another rank ({first_line}); torchrun names it"
            os.write(2, f"{lost}. The same command continues\n".encode())
            os._exit(1)  # an orderly exit would wait for the lost rank
        raise


class Stop(list):
    """From now on SIGTERM (a cluster taking its machine back) and Ctrl-C are only noted, so that a
    step can be finished and saved.

    Holds the names of the signals that came. asked(device): whether one came to any rank.
    """

    def __init__(self):
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, frame: self.append(signal.Signals(number).name))

    def asked(self, device):
        return bool(sum_over_ranks(torch.tensor(len(self), device=device)))


def ignore_signals(worker=None):
    """In a data-loading process. A signal reaches the whole job, and the main process needs its
    workers to finish the step.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def children_ignore_signals():
    """Processes that are started in the body never see SIGTERM and Ctrl-C: they inherit the mask."""
    stopping = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, stopping)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, stopping)


@functools.cache
def warn(text):
    """Once for each text."""
    tqdm.write(f"warning: {text}", file=sys.stderr)


class Tally:
    """Counts what happens to many rows. Names the first three, and `close` tells the total over all
    ranks: no flood of lines.
    """

    def __init__(self, what):
        self.what, self.seen, self.n = what, [], 0  # what: "clips cut at the window"

    def add(self, text):
        self.n += 1
        first_rank = int(os.environ.get("RANK", 0)) == 0
        if first_rank and len(self.seen) < 3 and text not in self.seen:
            self.seen.append(text)
            tqdm.write(f"warning: {text}", file=sys.stderr)

    def close(self):
        """All ranks call it."""
        total = sum(gather([self.n]))
        if total and int(os.environ.get("RANK", 0)) == 0:
            print(f"{total} {self.what}", file=sys.stderr)


class Log:
    """log.jsonl, one line a record, the same line on the screen, and a progress bar. Rank 0 writes;
    all may call.

    When a run goes on, what a killed one logged after its last checkpoint goes.
    """

    def __init__(self, file, first_step, last_step, rank):
        self.file, self.rank = file, rank
        if rank == 0:
            lines = file.read_text().splitlines() if first_step and file.exists() else []
            # a full disk may have torn a line
            whole = [line for line in lines if line.endswith("}")]
            write_text(
                file,
                "".join(line + "\n" for line in whole if json.loads(line)["step"] <= first_step),
            )
        self.bar = tqdm(
            total=last_step,
            initial=first_step,
            desc="train",
            unit="step",
            disable=rank > 0,
            mininterval=5,
        )

    def __call__(self, record):
        if self.rank:
            return
        # JSON has no NaN
        record = {k: None if v != v or v in (math.inf, -math.inf) else v for k, v in record.items()}
        with writing(self.file), open(self.file, "a") as file:
            file.write(json.dumps(record) + "\n")
        self.bar.update(record["step"] - self.bar.n)
        is_table = lambda v: isinstance(v, list) and v and isinstance(v[0], list)
        shown = {k: v for k, v in record.items() if not is_table(v)}  # tables: in the file alone
        self.bar.write(
            "  ".join(
                f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in shown.items()
            )
        )

    def close(self):
        self.bar.close()


class Skipped:
    """Steps whose loss or gradient was not finite: logged with their rows; ValueError when too many
    come in a row.
    """

    def __init__(self, most, log, out):
        self.most, self.log, self.out = most, log, out
        self.n = self.in_a_row = 0

    def check(self, step, loss, norm, batch):
        """All ranks call it after each step. -> whether the step was skipped"""
        if batch.n_rows and math.isfinite(loss + norm):
            self.in_a_row = 0
            return False
        reason = f"loss {loss}, gradient norm {norm}"
        if not batch.n_rows:
            reason = "no row of the batch can be used"
        names = gather([row["name"] for rows in batch.micro_batches for row in rows])
        self.log({"step": step, "skipped": reason, "rows": names})
        self.n, self.in_a_row = self.n + 1, self.in_a_row + 1
        if self.in_a_row == self.most:
            what = f"{self.most} steps in a row were skipped, at last step {step} ({reason})"
            where = f"The checkpoints in {self.out} are from before; log.jsonl names the rows"
            raise ValueError(f"{what}. {where}. Is --lr too high?")
        return True


def peak_memory(device):
    """Bytes that this process held at most."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peak_flops(device, dtype):
    """What the hardware can do in a second: data sheet for known GPUs, a measured matrix product
    elsewhere.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = {  # the first that is part of the name
            "H100 PCIe": 756e12,
            "H100": 989e12,
            "H200": 989e12,
            "A100": 312e12,
            "4090": 165e12,
            "L40S": 362e12,
            "L40": 181e12,
        }
        if match := [value for key, value in known.items() if key in name]:
            return match[0]
    n = 1024
    a = torch.randn(n, n, dtype=dtype, device=device)
    times = []
    for _ in range(50):
        start = time.perf_counter()
        (a @ a)[0, 0].item()
        times.append(time.perf_counter() - start)
    return 2 * n**3 / min(times)


# -- processes -------------------------------------------------------------------------------------

TIMEOUT = datetime.timedelta(
    minutes=30
)  # for a rank that hangs; a killed one is noticed at once, and torchrun ends the others


def start_processes():
    """Join the process group under torchrun, or be a world of one under plain python. -> (rank,
    world size, device)
    """
    rank, world, local = (
        int(os.environ.get(name, 0)) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    )
    world = max(1, world)
    device = torch.device("cpu")
    asked = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if asked not in ("", "-1") and not torch.cuda.is_available():
        remedy = "check the driver, or unset it to compute on the CPU"
        fail(f"CUDA_VISIBLE_DEVICES={asked} asks for a GPU, and torch finds none: {remedy}")
    if torch.cuda.is_available():
        if local >= (n := torch.cuda.device_count()):
            fail(f"more processes than GPUs on this machine: torchrun --nproc_per_node={n}")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    elif "OMP_NUM_THREADS" not in os.environ or "TORCHELASTIC_RUN_ID" in os.environ:
        # torchrun sets one thread per process; share the cores among the processes of this node
        # instead.
        torch.set_num_threads(max(1, n_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    return rank, world, device


def n_cores():
    """Cores that this process may use."""
    has_affinity = hasattr(os, "sched_getaffinity")  # not so on macOS
    return len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count()


def default_device():
    return "cuda" if torch.cuda.is_available() else "cpu"


def beside_the_main_thread(device):
    """A context for work in a thread. On a GPU its kernels run at the same time as the main
    thread's, and on this device (a thread begins on the first one).
    """
    if torch.device(device).type != "cuda":
        return contextlib.nullcontext()
    return torch.cuda.stream(second_stream(device))


@functools.cache  # memory that one stream has freed is not given to another
def second_stream(device):
    return torch.cuda.Stream(device)


def compute_dtype(device):
    """bf16 where the hardware multiplies it (every recent GPU; CPUs with AVX512-BF16 or AMX: 4x
    float32), else float32.
    """
    if torch.device(device).type == "cpu":
        has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return torch.bfloat16 if has_bf16 else torch.float32
    return torch.bfloat16


def barrier():
    if dist.is_initialized():
        dist.barrier()


def sum_over_ranks(tensor, op=dist.ReduceOp.SUM):
    """In place. -> tensor"""
    if dist.is_initialized():
        dist.all_reduce(tensor, op)
    return tensor


def copy_from_rank_0(tensors):
    """In place."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.broadcast(tensor.detach(), 0)


def gather(items):
    """The lists of all ranks, joined in the order of the ranks."""
    if not dist.is_initialized():
        return items
    lists = [None] * dist.get_world_size()
    dist.all_gather_object(lists, items)
    return sum(lists, [])
