"""
train.py: train the Q-Former, and nothing else, to make the frozen LLM answer from sound as it answered from text (paper section 4).

    python train.py                                                     # the demo, on a laptop
    torchrun --nproc_per_node=8 train.py --llm DIR --whisper DIR --data F.jsonl --audio_root DIR --out DIR
    runs/desta25.sh                                                     # the paper's recipe

The defaults are the demo's; the paper's values stand beside them. Run the same command again to continue a stopped run.
"""

import contextlib
import dataclasses
import json
import math
import random
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import common
from common import setting
from model import AUDIO_ID, DeSTA


@dataclasses.dataclass
class Settings:
    llm: str = setting("weights/smollm2-135m-instruct", "Hugging Face folder of the frozen LLM")
    whisper: str = setting("weights/whisper-tiny.en", "Hugging Face folder of the frozen Whisper")
    data: str = setting("data/demo/train.jsonl", "training rows (generate_data.py, or DeSTA-AQA5M): a file, several with commas between, or a folder")
    eval_data: str = setting("data/demo/test.jsonl", "held-out rows for the loss curve; '' for none")
    audio_root: str = setting("data/demo", "folder that audio paths start from")
    out: str = setting("out/demo", "adapter/, checkpoints/, log.jsonl, run.json")
    # the adapter
    n_layers: int = setting(2, "layers of the Q-Former; paper: 6", low=1, high=100)
    n_queries: int = setting(16, "audio vectors per clip; paper: 64", low=1, high=1500)
    audio_seconds: int = setting(6, "clips are padded or cut to this; paper: 30", low=1, high=30)
    long_audio: str = setting("cut", "what becomes of longer clips: cut, as in the paper, or split into windows that are all heard")
    dropout: float = setting(0.0, "in the Q-Former, and in LoRA; paper: 0.1", high=0.99)
    lora_rank: int = setting(0, "train LoRA on the LLM's q, k, v too; 16 in the paper's comparison, 0 for the method itself", high=4096)
    standardize: int = setting(256, "clips to fit the initial weights to: taps to unit variance; output spread like the LLM's embeddings; paper: 0")
    # optimisation
    lr: float = setting(1e-3, "peak learning rate; paper: 1e-4")
    warmup: int = setting(20, "steps of linear warm-up; paper: 2000")
    epochs: int = setting(2, "passes over the data; paper: 5", low=1)
    max_steps: int = setting(-1, "stop here instead; the cosine ends here too; -1 means after the epochs", low=1)
    global_batch: int = setting(8, "rows per step over all processes; paper: 96", low=1)
    micro_batch: int = setting(4, "rows per forward pass of one process; paper: 12. Gradient accumulation follows from it", low=1)
    length_pool: int = setting(1, "batches among which rows are sorted by length: 1 keeps every step a fair mix, more waste less padding", low=1)
    weight_decay: float = setting(0.01, "AdamW; paper: 0.01")
    beta2: float = setting(0.98, "AdamW; paper: 0.98", high=0.9999)
    clip: float = setting(1.0, "gradient norm; paper: 1.0", low=1e-9)
    max_tokens: int = setting(300, "longer answers are left out and counted (the official code cuts them)", low=1)
    max_prompt: int = setting(1000, "tokens, audio vectors included; longer prompts are left out and counted: one would take all memory", low=1)
    seed: int = setting(0, "of initialisation, order and dropout")
    # the run
    max_skipped: int = setting(10, "steps in a row without a finite loss and gradient before training gives up", low=1)
    eval_every: int = setting(60, "steps between evaluations", low=1)
    eval_rows: int = setting(48, "held-out rows per evaluation; -1 means all", low=-1)
    save_every: int = setting(60, "steps between checkpoints", low=1)
    keep: int = setting(2, "checkpoints kept", low=1)
    shard_llm: int = setting(0, "1: each process keeps its part of the frozen LLM (FSDP2), for GPUs that cannot hold it", high=1)
    checkpoint_activations: int = setting(0, "1: compute the LLM's blocks twice instead of keeping what is in them", high=1)
    workers: int = setting(-1, "data-loading processes; -1 means 0 on CPU, 4 per GPU", high=100)


# -- data ----------------------------------------------------------------------------------------------------------------


class Rows(torch.utils.data.Dataset):
    """Prepared training rows: see DeSTA.prepare. A row that cannot be used becomes {"left_out": reason}, with a warning."""

    def __init__(self, path, model, settings):
        self.rows, self.model, self.settings = common.JsonLines(path), model, settings

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        try:  # one bad row among millions must not stop a run of days
            row = self.rows[i]
            prepared = self.model.prepare(row, self.settings.audio_root)
            if len(prepared["target"]) > self.settings.max_tokens:
                reason = f"answer longer than {self.settings.max_tokens} tokens"
            elif len(prepared["ids"]) > self.settings.max_prompt:
                reason = f"prompt longer than {self.settings.max_prompt} tokens"
            else:
                return prepared | {"name": f"{self.rows.name(i)} ({row.get('id')})"}
        except (ValueError, OSError) as error:
            reason = " ".join(str(error).split())  # a file's name can hold a line break
        except Exception as error:  # a row can be wrong in more ways than can be listed
            reason = f"not in the form of a training row, see generate_data.py ({error!r})"
        print(f"row left out: {self.rows.name(i)}: {reason}", file=sys.stderr)
        return {"left_out": f"{self.rows.name(i)}: {reason}"}


def shuffled(places, n, seed):
    """Which of n rows stand at these places (array) of a random order, without making that order: five million rows take no memory.

    A Feistel network maps the numbers of 2k bits onto themselves, one to one, whatever it mixes with. Where it leads to n or
    beyond, it is applied again until it leads below n: that is one to one too.
    """
    bits = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    keys = [np.uint64(random.Random(f"{seed} {i}").getrandbits(64)) for i in range(6)]
    rows, todo = np.array(places, np.uint64), np.arange(len(places))
    while len(todo):
        left, right = rows[todo] >> bits, rows[todo] & (np.uint64(1) << bits) - np.uint64(1)
        for key in keys:
            mixed = (right ^ key) * np.uint64(0x9E3779B97F4A7C15)  # modulo 2^64; the high bits of a product depend on all of its factors' bits
            mixed = (mixed ^ mixed >> np.uint64(32)) * np.uint64(0xD6E8FEB86659FD93) >> np.uint64(64) - bits
            left, right = right, left ^ mixed
        rows[todo] = left << bits | right
        todo = todo[rows[todo] >= n]
    return rows.astype(np.int64)


def step_rows(step, n, lengths, global_batch, pool, seed):
    """Numbers of the rows of one step, a pure function of its arguments. n: all rows there are; lengths: row numbers -> lengths.

    Each epoch has an order of its own. Rows are sorted by length within pools of `pool` batches (neighbours of like length waste
    little padding), and a pool's batches are shuffled. Rows that do not fill a batch at the end sit this epoch out.
    """
    per_epoch = n // global_batch
    epoch, index = divmod(step, per_epoch)
    first = index // pool * pool
    places = np.arange(first * global_batch, min(first + pool, per_epoch) * global_batch)
    rows = shuffled(places, n, f"{seed} {epoch}")
    batches = rows[np.argsort(lengths(rows), kind="stable")].reshape(-1, global_batch)
    order = shuffled(np.arange(len(batches)), len(batches), f"{seed} {epoch} {first}")
    return batches[order[index - first]].tolist()


class Batches(torch.utils.data.Sampler):
    """Yields this rank's micro-batches, from step `first` on. Micro-batch m of a step goes to rank m % world."""

    def __init__(self, rows, settings, first, last, rank, world):
        self.rows, self.s, self.first, self.last, self.rank, self.world = rows, settings, first, last, rank, world

    def __iter__(self):
        for step in range(self.first, self.last):
            batch = step_rows(step, len(self.rows), self.rows.lengths, self.s.global_batch, self.s.length_pool, self.s.seed)
            for start in range(self.rank * self.s.micro_batch, self.s.global_batch, self.world * self.s.micro_batch):
                yield batch[start : start + self.s.micro_batch]


def measure_taps(model, dataset, n_clips):
    """Mean and standard deviation of each channel of the encoder taps over n_clips clips. shapes = (d_model,)"""
    count, total, squares = 0, 0.0, 0.0
    for i in range(0, len(dataset), max(1, len(dataset) // n_clips)):
        row = dataset[i]
        if row.get("mels"):
            taps = model.whisper.encode(torch.stack(row["mels"]), model.taps).double().flatten(0, 2)  # (clips * taps * frames, d_model)
            count, total, squares = count + len(taps), total + taps.sum(0), squares + taps.square().sum(0)
    if count == 0:
        raise ValueError(f"none of {n_clips} rows of {dataset.rows.path} has audio that can be used: is --audio_root right?")
    mean = total / count
    return mean.float(), (squares / count - mean.square()).clamp(min=1e-6).sqrt().float()


# -- the schedule, the cost model, evaluation ----------------------------------------------------------------------------


def learning_rate(step, peak, warmup, total):
    """Linear warm-up, then half a cosine down to 0 at step `total`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def flops(model, n_clips, n_tokens, n_targets):
    """FLOPs that one training step has to do, to three percent.

    A frozen LLM weight costs 4 per token (2 forward, 2 for the gradient of its input; none for its own), a frozen
    encoder weight 2 (no gradient at all), a trained weight 6. Attention products are left out of the LLM's count.
    """
    llm, q, w = model.llm.config, model.qformer.config, model.whisper.config
    per_block = sum(p.numel() for p in model.llm.model.layers[0].parameters())
    frames = 50 * model.audio_seconds
    encoder = 2 * frames * w.encoder_layers * (12 * w.d_model**2 + 2 * frames * w.d_model)
    # cross-attention: every query of every head with every channel of every frame, for scores and sums, forward and backward
    frames_read = q.n_layers * 4 * 2 * q.n_heads * q.n_queries * q.d_model * q.n_taps * frames
    queries = q.n_layers * 6 * (6 * q.d_model**2 + 2 * q.d_model * q.d_ff) * q.n_taps * q.n_queries
    head = 4 * llm.d_model * llm.vocab_size * n_targets
    return n_clips * (encoder + frames_read + queries) + 4 * per_block * llm.n_layers * n_tokens + head


def peak_flops(device, dtype):
    """What the hardware can do in a second: data sheet for known GPUs, a measured matrix product elsewhere."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "4090": 165e12, "L40": 181e12}
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


@torch.no_grad()
def evaluate(model, rows, batch_size):
    """Loss per target token on this rank's held-out rows, summed over the ranks: with the right clip, and with a wrong one.

    Only the audio vectors are exchanged, the transcripts stay. The difference of the two losses is what is *heard*: the
    first falls quickly by learning the form of the answers alone.
    """
    model.eval()
    totals = torch.zeros(3, dtype=torch.float64, device=model.device)  # right, wrong, tokens
    swapped = [row | {"mels": other["mels"]} for row, other in zip(rows, rows[1:] + rows[:1])]
    most = common.sum_over_ranks(torch.tensor(len(rows), device=model.device), dist.ReduceOp.MAX)
    for start in range(0, most, batch_size):
        if start < len(rows):
            right, counts = model.row_losses(rows[start : start + batch_size])
            wrong, _ = model.row_losses(swapped[start : start + batch_size])
            totals += torch.stack([right.sum(), wrong.sum(), counts.sum()]).double()
        elif model.llm.sharded:
            model.take_part(), model.take_part()
    right, wrong, tokens = common.sum_over_ranks(totals).tolist()
    model.train()
    return {"eval_loss": right / tokens, "eval_loss_wrong_clip": wrong / tokens}


# -- checkpoints -----------------------------------------------------------------------------------------------------------


def save_checkpoint(model, optimizer, step, settings, made_from=None):
    """OUT/checkpoints/step_N/ with the adapter and all that resuming needs; OUT/adapter is the newest adapter.

    made_from: hashes and sizes of what resuming must find unchanged (see main).
    """
    out = Path(settings.out)
    folder = out / "checkpoints" / f"step_{step:08d}"
    temporary = folder.with_name("writing.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_adapter(temporary / "adapter")
    state = {"tap_mean": model.qformer.tap_mean, "tap_std": model.qformer.tap_std}
    for name, parameter in model.trained().items():
        state[f"weight.{name}"] = parameter.detach()
        state |= {f"{key}.{name}": value for key, value in optimizer.state[parameter].items()}
    common.save_tensors(temporary / "trainer.safetensors", state)
    description = {"step": step, "settings": dataclasses.asdict(settings), "made_from": made_from}
    common.write_record(temporary / "trainer.json", description)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    model.save_adapter(out / "adapter")
    drop_old_checkpoints(settings)


def drop_old_checkpoints(settings):
    """All but the newest ones; when a run goes on, also what a kill left half deleted."""
    for old in sorted((Path(settings.out) / "checkpoints").glob("step_*"))[: -settings.keep]:
        shutil.rmtree(old)


def load_checkpoint(model, optimizer, settings, made_from=None):
    """Continue from the newest checkpoint under OUT that is whole, if there is one. -> the step to go on with"""
    folders = sorted((Path(settings.out) / "checkpoints").glob("step_*"))
    if not folders:
        return 0
    while folders:
        try:
            state = common.load_tensors(folders[-1] / "trainer.safetensors")
            saved = common.read_record(folders[-1] / "trainer.json")
            break
        except (OSError, ValueError) as error:
            damaged = folders.pop()
            print(f"{damaged} is damaged and set aside ({error})", file=sys.stderr)
            with contextlib.suppress(OSError):  # another rank was first
                damaged.rename(damaged.with_name(f"damaged_{damaged.name}"))
    else:
        raise ValueError(f"no checkpoint in {damaged.parent} is whole: delete {settings.out} to begin anew")
    if made_from and saved.get("made_from") and (other := [k for k, v in saved["made_from"].items() if made_from.get(k) != v]):
        raise ValueError(f"{folders[-1]} was made with another {', '.join(other)}: put back what was there, or give another --out")
    free = {"max_steps", "epochs", "eval_every", "eval_rows", "save_every", "keep", "workers", "micro_batch", "out", "max_skipped"}
    free |= {"shard_llm", "checkpoint_activations"}
    before = dataclasses.asdict(Settings()) | saved["settings"]  # a setting that is newer than the checkpoint had its default
    changed = [k for k, v in dataclasses.asdict(settings).items() if k not in free and before[k] != v]
    if changed:
        raise ValueError(f"{folders[-1]} was made with another {', '.join(changed)}: give the same settings, or another --out")
    model.qformer.standardize(state["tap_mean"], state["tap_std"])
    for name, parameter in model.trained().items():
        parameter.data.copy_(state[f"weight.{name}"])
        if f"step.{name}" in state:  # not so before the first step that was not skipped
            moments = {key: state[f"{key}.{name}"].to(parameter.device) for key in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = {"step": state[f"step.{name}"]} | moments
    return saved["step"]


# ----------------------------------------------------------------------------------------------------------------------


def main():
    s = common.parse_settings(Settings, __doc__)

    # processes, seed
    rank, world, device = common.start_processes()
    talk = print if rank == 0 else lambda *args, **kwargs: None
    if s.global_batch % (s.micro_batch * world):
        raise ValueError(f"global_batch {s.global_batch} is not a multiple of micro_batch {s.micro_batch} x {world} processes")
    if s.shard_llm and not dist.is_initialized():
        raise ValueError("--shard_llm shares the LLM out among processes: start them with torchrun --nproc_per_node=N")
    n_micro = s.global_batch // (s.micro_batch * world)
    talk(f"{s.global_batch} rows a step = {s.micro_batch} rows x {world} processes x {n_micro} accumulation steps")
    torch.manual_seed(s.seed)  # every rank starts from the same Q-Former

    # model and data
    model = DeSTA.from_pretrained(
        s.llm, s.whisper, device=device, audio_seconds=s.audio_seconds, long_audio=s.long_audio, lora_rank=s.lora_rank, shard_llm=bool(s.shard_llm),
        n_layers=s.n_layers, n_queries=s.n_queries, dropout=s.dropout,
    )  # fmt: skip
    model.llm.checkpoint_activations = bool(s.checkpoint_activations)
    if s.audio_seconds * 50 > (positions := model.whisper.config.max_source_positions):
        raise ValueError(f"--audio_seconds {s.audio_seconds}: {s.whisper} hears {positions // 50} s at most")
    data = Rows(s.data, model, s)
    steps_per_epoch = len(data) // s.global_batch
    if steps_per_epoch == 0:
        raise ValueError(f"{s.data} has {len(data)} rows, fewer than one global batch of {s.global_batch}: make more, or lower --global_batch")
    last_step = s.max_steps if s.max_steps >= 0 else s.epochs * steps_per_epoch
    held_out = []
    if s.eval_data:
        rows = Rows(s.eval_data, model, s)
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
        held_out = list(map(rows.__getitem__, order[: s.eval_rows if s.eval_rows >= 0 else None][rank::world]))
        held_out = [row for row in held_out if len(row.get("mels", ())) == 1]  # one clip of one window: can be exchanged
        if not common.sum_over_ranks(torch.tensor(len(held_out), device=device)):
            raise ValueError(f"{s.eval_data} has no usable row with one clip: is --audio_root right?")
    weights = list(model.trained().values())
    trained, total = (sum(p.numel() for p in parameters) for parameters in (weights, model.parameters()))
    talk(f"{len(data):,} rows, {steps_per_epoch} steps an epoch, {last_step} steps; {trained:,} trained and {total - trained:,} frozen parameters")

    # optimizer, resume
    model.train()
    optimizer = torch.optim.AdamW(weights, lr=s.lr, betas=(0.9, s.beta2), weight_decay=s.weight_decay, fused=True)
    made_from = None  # what a resumed run must find unchanged, besides its settings
    if rank == 0:
        made_from = {"llm_sha256": common.file_hash(s.llm), "whisper_sha256": common.file_hash(s.whisper), "data_bytes": data.rows.bytes}
    first_step = load_checkpoint(model, optimizer, s, made_from)
    if common.sum_over_ranks(torch.tensor(first_step, device=device)).item() != first_step * world:
        raise ValueError(f"the ranks do not find the same checkpoints in {s.out}: it has to be on a disk that all nodes see")
    if rank == 0:
        drop_old_checkpoints(s)
    if first_step:
        talk(f"continuing {s.out} at step {first_step}")
    elif s.standardize:
        model.qformer.standardize(*measure_taps(model, data, s.standardize))
        model.qformer.match_embeddings(model.llm.model.embed_tokens.weight)

    # log
    out = Path(s.out)
    log_file = out / "log.jsonl"
    if rank == 0:
        common.write_text(out / "run.json", json.dumps(common.run_description(s), indent=2))
        lines = log_file.read_text().splitlines() if first_step and log_file.exists() else []
        whole = [line for line in lines if line.endswith("}")]  # a full disk may have torn a line
        # what a killed run logged after its last checkpoint goes
        common.write_text(log_file, "".join(line + "\n" for line in whole if json.loads(line)["step"] <= first_step))
    peak = peak_flops(device, model.llm.model.embed_tokens.weight.dtype) * world

    def log(record):
        if rank == 0:
            record = {k: None if v != v or v in (math.inf, -math.inf) else v for k, v in record.items()}  # JSON has no NaN
            with common.writing(log_file), open(log_file, "a") as file:
                file.write(json.dumps(record) + "\n")
            bar.write("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in record.items()))

    # SIGTERM (a cluster taking its machine back) and Ctrl-C: finish the step, save, exit
    stop = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: stop.append(signal.Signals(number).name))

    workers = s.workers if s.workers >= 0 else 4 * (device.type == "cuda")
    sampler = Batches(data.rows, s, first_step, last_step, rank, world)
    loader = iter(torch.utils.data.DataLoader(data, batch_sampler=sampler, num_workers=workers, collate_fn=list))

    bar = tqdm(total=last_step, initial=first_step, desc="train", unit="step", disable=rank > 0, mininterval=5)
    step, n_left_out, left_out, n_skipped, skipped_in_a_row = first_step, 0, set(), 0, 0
    while True:
        # evaluate and save
        ending = step >= last_step or bool(common.sum_over_ranks(torch.tensor(len(stop), device=device)))
        if s.eval_data and (step % s.eval_every == 0 or ending) and (step > first_step or step == 0):
            log({"step": step} | evaluate(model, held_out, s.micro_batch))
        if rank == 0 and step > first_step and (step % s.save_every == 0 and not skipped_in_a_row or ending):
            save_checkpoint(model, optimizer, step, s, made_from)
        if ending:
            break

        # one step: the rows of this rank, in n_micro batches
        start = time.perf_counter()
        micro_batches = [next(loader) for _ in range(n_micro)]
        left_out |= {row["left_out"] for batch in micro_batches for row in batch if "left_out" in row and len(left_out) < 5}
        micro_batches = [[row for row in batch if "ids" in row] for batch in micro_batches]
        rows = [row for batch in micro_batches for row in batch]
        # What stands before the audio is the same frozen text in every row: not counted as work, see DeSTA.frozen_prefix.
        tokens = lambda row: len(row["ids"]) + len(row["target"]) - (row["ids"].index(AUDIO_ID) if row["mels"] else 0)
        totals = torch.tensor([
            len(rows), sum(len(r["mels"]) for r in rows), sum(map(tokens, rows)), sum(len(r["target"]) for r in rows)
        ], dtype=torch.float64, device=device)  # fmt: skip
        n_rows, n_clips, n_tokens, n_targets = common.sum_over_ranks(totals).tolist()
        n_left_out += s.global_batch - int(n_rows)
        lr = learning_rate(step, s.lr, s.warmup, last_step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        for weight in weights:
            weight.grad = torch.zeros_like(weight)
        loss = torch.zeros((), device=device)
        for m, batch in enumerate(micro_batches):
            # Dropout is a function of seed, step and micro-batch: nothing to save, and the same on any number of processes.
            torch.manual_seed(hash((s.seed, step, m * world + rank)) % 2**62)
            if batch:
                part = model.loss(batch, n_target_tokens=n_targets)
                if part.requires_grad:  # not so where no row of the micro-batch has audio
                    part.backward()
                loss += part.detach()
            elif s.shard_llm:
                model.take_part()
        # Each rank holds the gradient of its rows, already divided by the tokens of all: their sum is the gradient of the
        # global mean. DistributedDataParallel would do the same, but hangs on a micro-batch without any audio.
        for weight in weights:
            common.sum_over_ranks(weight.grad)
        common.sum_over_ranks(loss)
        norm = torch.nn.utils.clip_grad_norm_(weights, s.clip)
        step += 1
        bar.update()

        # Loss and gradient are sums over the ranks, so all ranks decide alike. AdamW would carry one NaN into every later step.
        if not n_rows or not (loss + norm).isfinite():
            reason = f"loss {loss.item()}, gradient norm {norm.item()}" if n_rows else "no row of the batch can be used"
            log({"step": step, "skipped": reason, "rows": common.gather([row["name"] for row in rows])})
            n_skipped, skipped_in_a_row = n_skipped + 1, skipped_in_a_row + 1
            if skipped_in_a_row == s.max_skipped:
                reason = f"{s.max_skipped} steps in a row were skipped, at last step {step} ({reason})"
                raise ValueError(f"{reason}. The checkpoints in {out} are from before; {log_file} names the rows. Is --lr too high?")
            continue
        optimizer.step()
        skipped_in_a_row = 0

        # log
        seconds = time.perf_counter() - start
        memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        log({
            "step": step, "loss": loss.item(), "lr": lr, "grad_norm": norm.item(), "seconds": seconds, "rows_per_second": n_rows / seconds,
            "mfu": flops(model, n_clips, n_tokens, n_targets) / seconds / peak, "memory_gb": memory / 2**30,
        })  # fmt: skip

    # close
    bar.close()
    if first := common.gather(sorted(left_out))[:5]:
        talk(f"{n_left_out} rows left out, among them: " + "; ".join(first))
    if stop:
        talk(f"stopped by {stop[0]} at step {step}, saved; the same command continues")
    else:
        talk(f"done: {out / 'adapter'}" + (f", {n_skipped} steps skipped" if n_skipped else ""))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    common.run(main)
