"""
train.py: train the adapter, and nothing else, to make the frozen LLM answer from sound as it
answered from text (paper section 4).

    python train.py                                             # the demo, on a laptop
    torchrun --nproc_per_node=8 train.py --recipe paper --llm DIR --whisper DIR \\
        --data F.jsonl --audio_root DIR --out DIR
    torchrun --nproc_per_node=8 train.py --init_from ADAPTER \\
        --data F.jsonl --audio_root DIR --out DIR               # go on from an adapter

Run the same command again to continue a stopped run.
"""

import collections
import contextlib
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from engine import checkpoint, fast, run
from engine.checkpoint import file_hash, write_text
from engine.rows import Batches, JsonLines, split_long
from engine.run import copy_from_rank_0, setting, sum_over_ranks
from engine.weights import check_same_weights
from model import AUDIO_ID, LLM_PREFIX, LONG, DeSTA, audios_of, before_question, inherit
from recipes import TRAIN


@dataclass
class Settings:
    recipe: str = setting("demo", "column of recipes.py for what no flag gives: demo or paper")
    llm: str = setting("weights/smollm2-135m-instruct", "Hugging Face folder of the frozen LLM")
    whisper: str = setting("weights/whisper-tiny.en", "Hugging Face folder of the frozen Whisper")
    data: str = setting("data/demo/train.jsonl", "rows: a file, several with commas, or a folder")
    eval_data: str = setting("data/demo/test.jsonl", "held-out rows for the curve; '' for none")
    audio_root: str = setting("data/demo", "folder that audio paths start from")
    out: str = setting("out/demo", "a folder: adapter/, checkpoints/, log.jsonl, run.json")
    init_from: str = setting("", "adapter to go on from: its size, window and models are kept")
    # the adapter
    n_layers: int = setting(TRAIN["n_layers"], "layers of the Q-Former", low=1, high=100)
    n_queries: int = setting(TRAIN["n_queries"], "audio vectors per clip", low=1, high=1500)
    n_taps: int = setting(4, "the last so many of Whisper's four taps", low=1, high=4)
    audio_seconds: int = setting(TRAIN["audio_seconds"], "window of a clip", low=1, high=30)
    long_audio: str = setting("cut", "rest of longer clips: cut, or split (heard)", choices=LONG)
    fit_window: int = setting(TRAIN["fit_window"], "1: shorter clips have shorter windows", high=1)
    dropout: float = setting(TRAIN["dropout"], "in the Q-Former, and in LoRA", high=0.99)
    lora_rank: int = setting(0, "16: the paper's comparison, LoRA on the LLM's q, k, v", high=4096)
    train_llm: int = setting(0, "1: all weights of the LLM learn too, in float32", high=1)
    standardize: int = setting(TRAIN["standardize"], "clips to fit a fresh adapter to")
    # optimisation
    lr: float = setting(TRAIN["lr"], "peak learning rate")
    llm_lr: float = setting(-1.0, "peak rate of LoRA and of --train_llm; -1: as --lr")
    warmup: int = setting(TRAIN["warmup"], "steps of linear warm-up")
    epochs: int = setting(TRAIN["epochs"], "passes over the data", low=1)
    max_steps: int = setting(-1, "stop here instead; the cosine ends here too", low=1)
    global_batch: int = setting(TRAIN["global_batch"], "rows per step, all processes", low=1)
    micro_batch: int = setting(TRAIN["micro_batch"], "rows per pass of one process", low=1)
    max_tokens_per_pass: int = setting(
        TRAIN["max_tokens_per_pass"], "a longer micro-batch takes several passes", low=1
    )
    length_pool: int = setting(TRAIN["length_pool"], "batches sorted by length together", low=1)
    weight_decay: float = setting(TRAIN["weight_decay"], "AdamW")
    beta2: float = setting(TRAIN["beta2"], "AdamW", high=0.9999)
    clip: float = setting(TRAIN["clip"], "gradient norm", low=1e-9)
    max_answer_tokens: int = setting(TRAIN["max_answer_tokens"], "longer: left out", low=1)
    max_prompt: int = setting(TRAIN["max_prompt"], "tokens and vectors; longer: left out", low=1)
    seed: int = setting(0, "of initialisation, order and dropout")
    # the run
    max_skipped: int = setting(10, "give up after so many steps without a finite loss", low=1)
    eval_every: int = setting(TRAIN["eval_every"], "steps between evaluations", low=1)
    eval_rows: int = setting(48, "held-out rows per evaluation; -1 means all", low=-1)
    save_every: int = setting(TRAIN["save_every"], "steps between checkpoints", low=1)
    keep: int = setting(2, "checkpoints kept", low=1)
    shard_llm: int = setting(0, "1: the LLM shared out among the processes (FSDP2)", high=1)
    checkpoint_activations: int = setting(0, "1: less memory, the LLM computed twice", high=1)
    workers: int = setting(-1, "data-loading processes; -1: none on CPU, 4 per GPU", high=100)
    textbook: int = setting(0, "1: compute as GPUs do, on CPUs too: slower", high=1)


# What may change when a run goes on.
FREE = """max_steps epochs eval_every eval_rows save_every keep workers out max_skipped recipe
    micro_batch max_tokens_per_pass shard_llm checkpoint_activations textbook""".split()
# What comes from the adapter of --init_from, unless a flag says otherwise.
INHERITED = """llm whisper n_layers n_queries n_taps lora_rank train_llm audio_seconds long_audio
    fit_window max_answer_tokens"""


# -- data ------------------------------------------------------------------------------------------


class Rows(torch.utils.data.Dataset):
    """Prepared training rows: see model.Reader.prepare. A row that cannot be used becomes
    {"left_out": reason}.
    """

    def __init__(self, path, reader, settings):
        self.rows, self.reader, self.settings = JsonLines(path), reader, settings

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        s, reason = self.settings, None
        try:  # one bad row among millions must not stop a run of days
            row = self.rows[i]
            prepared = self.reader.prepare(row, s.audio_root)
            if len(prepared["target"]) > s.max_answer_tokens:
                reason = f"answer longer than --max_answer_tokens {s.max_answer_tokens}"
            elif len(prepared["ids"]) > s.max_prompt:
                reason = f"prompt longer than --max_prompt {s.max_prompt} tokens"
            else:
                return prepared | {"name": f"{self.rows.name(i)} ({row.get('id')})"}
        except (ValueError, OSError) as error:
            reason = " ".join(str(error).split())  # a file's name can hold a line break
        except Exception as error:  # a row can be wrong in more ways than can be listed
            reason = f"not in the form of a training row, see generate_data.py ({error!r})"
        return {"left_out": f"row left out: {self.rows.name(i)}: {reason}"}

    def context(self):
        """What stands before the question in most rows, as messages; None where that holds audio or
        nothing.
        """
        seen = collections.Counter()
        for i in range(0, len(self), max(1, len(self) // 64)):
            with contextlib.suppress(Exception):  # a broken row is told of when its turn comes
                seen[json.dumps(before_question(self.rows[i]["messages"]))] += 1
        context = json.loads(seen.most_common(1)[0][0]) if seen else None
        return context if context and not audios_of(context) else None


def start_loader(data, sampler, workers, device):
    """Iterator over the sampler's micro-batches, prepared in `workers` processes."""
    workers = workers if workers >= 0 else 4 * (device.type == "cuda")
    options = dict(num_workers=workers, worker_init_fn=run.ignore_signals, collate_fn=list)
    # Log-mels in pinned memory: a GPU fetches them by itself, while it computes.
    options["pin_memory"] = device.type == "cuda"
    with run.children_ignore_signals():  # the main process answers them, when the step is done
        return iter(torch.utils.data.DataLoader(data, batch_sampler=sampler, **options))


@dataclass
class Batch:
    """One rank's part of a global batch, and the counts of the whole."""

    micro_batches: list  # of lists of prepared rows
    n_rows: float
    n_clips: float
    n_tokens: float
    n_targets: float
    n_frames: float = 0.0  # of the encoder, in all clips

    @property
    def counts(self):
        """What `flops` needs."""
        return self.n_clips, self.n_tokens, self.n_targets, self.n_frames


def batches(loader, n_micro, model, left_out, warnings):
    """Yields a Batch per step. Rows that cannot be used are dropped; the tallies are told why."""
    for micro_batches in zip(*[loader] * n_micro):
        for row in (row for rows in micro_batches for row in rows):
            if "left_out" in row:
                left_out.add(row["left_out"])
            for warning in row.get("warnings", ()):
                warnings.add(warning)
        micro_batches = [[row for row in rows if "ids" in row] for rows in micro_batches]
        rows = [row for part in micro_batches for row in part]
        n_clips = sum(len(row["mels"]) for row in rows)
        n_frames = sum(mel.shape[-1] // 2 for row in rows for mel in row["mels"])
        n_tokens = sum(n_computed(row, model) for row in rows)
        n_targets = sum(len(row["target"]) for row in rows)
        counts = len(rows), n_clips, n_tokens, n_targets, n_frames
        totals = sum_over_ranks(torch.tensor(counts, dtype=torch.float64, device=model.device))
        yield Batch(micro_batches, *totals.tolist())


def n_computed(row, model):
    """Tokens that the LLM computes for a row. What stands before the audio is not among them where
    it is kept (engine/fast.py).
    """
    n = len(row["ids"]) + len(row["target"])
    kept = row["mels"] and fast.wanted(model.llm.lm_head.weight) and fast.shares_prefix(model)
    return n - row["ids"].index(AUDIO_ID) if kept else n


def held_out_rows(s, model, rank, world):
    """This rank's share of the held-out rows: those with one clip of one window. Each also holds
    the next one's clip as "wrong_mels": all ranks read all rows, so that how many ranks there are
    makes no difference.
    """
    if s.eval_rows == 0:
        raise ValueError("--eval_rows 0: for no evaluation give --eval_data ''")
    rows = Rows(s.eval_data, model.reader, s)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [rows[i] for i in order[: s.eval_rows if s.eval_rows >= 0 else None]]
    rows = [row for row in rows if len(row.get("mels", ())) == 1]
    if not rows:
        raise ValueError(f"{s.eval_data} has no usable row with one clip: is --audio_root right?")
    pairs = zip(rows, rows[1:] + rows[:1])
    return [row | {"wrong_mels": other["mels"]} for row, other in pairs][rank::world]


def measure_taps(model, rows, n_clips):
    """Mean and standard deviation (d_model,) of each channel of the taps, over the clips of n_clips
    rows or some more.
    """
    count, total, squares = 0, 0.0, 0.0
    for i in range(0, len(rows), max(1, len(rows) // n_clips)):
        for mel in rows[i].get("mels", ()):  # clips of a row can differ in length
            taps = model.whisper.encode(mel[None], model.taps)
            taps = taps.double().flatten(0, 2)  # (windows * taps * frames, d_model)
            count += len(taps)
            total, squares = total + taps.sum(0), squares + taps.square().sum(0)
    if count == 0:
        none = f"none of {n_clips} rows of {rows.rows.path} has audio that can be used"
        raise ValueError(f"{none}: is --audio_root right? {rows[0].get('left_out', '')}")
    mean = total / count
    return mean.float(), (squares / count - mean.square()).clamp(min=1e-6).sqrt().float()


# -- schedule, cost, evaluation --------------------------------------------------------------------


def learning_rate(step, peak, warmup, total):
    """Linear warm-up, then half a cosine down to 0 at step `total`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def flops(model, n_clips, n_tokens, n_targets, n_frames=None):
    """FLOPs that one training step has to do, to three percent.

    n_frames: of the encoder, in all clips, where they fill no whole windows (--fit_window).

    A frozen LLM weight costs 4 per token (2 forward, 2 for the gradient of its input; none for its
    own), a frozen encoder weight 2 (no gradient at all), a trained weight 6. Attention products are
    left out of the LLM's count.
    """
    llm, w = model.llm.config, model.whisper.config
    frames = 50 * model.config.audio_seconds if n_frames is None else n_frames / max(n_clips, 1)
    encoder = 2 * frames * w.encoder_layers * (12 * w.d_model**2 + 2 * frames * w.d_model)
    per_block = sum(p.numel() for p in model.llm.model.layers[0].parameters())
    per_weight = 6 if model.config.train_llm else 4
    blocks = per_weight * per_block * llm.n_layers * n_tokens
    head = per_weight * llm.d_model * llm.vocab_size * n_targets
    return n_clips * (encoder + model.adapter.flops(frames)) + blocks + head


@torch.no_grad()
def evaluate(model, rows, batch_size):
    """Loss per target token on this rank's held-out rows, summed over the ranks: with the right
    clip, and with a wrong one.

    Only the audio vectors are exchanged, the transcripts stay. The difference of the two losses is
    what is *heard*: the first falls quickly by learning the form of the answers alone.
    """
    model.eval()
    totals = torch.zeros(3, dtype=torch.float64, device=model.device)  # right, wrong, tokens
    swapped = [row | {"mels": row["wrong_mels"]} for row in rows]
    most = sum_over_ranks(torch.tensor(len(rows), device=model.device), dist.ReduceOp.MAX)
    for start in range(0, most, batch_size):
        if start < len(rows):
            right = model.losses(rows[start : start + batch_size])
            wrong = model.losses(swapped[start : start + batch_size])
            totals += torch.stack(
                [right.sum(), wrong.sum(), torch.tensor(len(right)).to(right)]
            ).double()
        elif model.llm.sharded:
            model.take_part(), model.take_part()
    right, wrong, tokens = sum_over_ranks(totals).tolist()
    model.train()
    return {"eval_loss": right / tokens, "eval_loss_wrong_clip": wrong / tokens}


# -- one step --------------------------------------------------------------------------------------


def flat_gradients(weights):
    """One buffer whose parts are the gradients of all weights, so that all ranks are summed in one
    message.
    """
    flat = torch.zeros(sum(weight.numel() for weight in weights), device=weights[0].device)
    for weight, part in zip(weights, flat.split([weight.numel() for weight in weights])):
        weight.grad = part.view_as(weight)
    return flat


def accumulate(model, batch, seed, max_tokens):
    """Add the gradients of this rank's micro-batches to .grad. -> their part of the global batch's
    loss, ()

    max_tokens: a longer micro-batch takes several passes; but for dropout, the sum is the same.
    DistributedDataParallel would do the same, but hangs on a micro-batch without any audio.
    """
    micro_batches = [split_long(rows, max_tokens) for rows in batch.micro_batches]
    n_missing = 0
    if model.llm.sharded:  # all ranks gather its blocks equally often
        n_passes = torch.tensor(sum(map(len, micro_batches)), device=model.device)
        n_missing = int(sum_over_ranks(n_passes.clone(), dist.ReduceOp.MAX) - n_passes)
    # Without any row there is nothing to learn: not finite, so no step is made.
    loss = torch.tensor(0.0 if batch.n_rows else math.nan, device=model.device)
    for m, parts in enumerate(micro_batches):
        torch.manual_seed(seed(m))
        for rows in parts:
            part = model.loss(rows, n_target_tokens=batch.n_targets)
            if part.requires_grad:  # not so where no row has audio and the LLM is frozen
                part.backward()
            loss += part.detach()
    for _ in range(n_missing):
        model.take_part()
    return loss


def update(optimizer, weights, gradients, lr, clip, loss):
    """Sum gradients and loss over the ranks, clip, and step, unless one is not finite.

    Each rank holds the gradient of its rows, already divided by the tokens of all: their sum is the
    gradient of the global mean. All ranks see the same sums, so they decide alike. AdamW would
    carry one NaN into every later step.
    -> (loss, gradient norm)
    """
    sum_over_ranks(gradients)
    loss = sum_over_ranks(loss).item()
    norm = torch.nn.utils.clip_grad_norm_(weights, clip).item()
    if math.isfinite(loss + norm):
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("share", 1)
        optimizer.step()
    return loss, norm


# --------------------------------------------------------------------------------------------------


def n_accumulated(s, world):
    """Micro-batches of each process in a step."""
    if s.global_batch % (s.micro_batch * world):
        parts = f"micro_batch {s.micro_batch} x {world} processes"
        raise ValueError(f"global_batch {s.global_batch} is not a multiple of {parts}")
    if s.shard_llm and not dist.is_initialized():
        remedy = "start them with torchrun --nproc_per_node=N"
        raise ValueError(f"--shard_llm shares the LLM out among processes: {remedy}")
    if s.shard_llm and s.train_llm:
        raise ValueError("--train_llm needs the LLM whole: not with --shard_llm")
    return s.global_batch // (s.micro_batch * world)


def n_steps(s, n_rows):
    per_epoch = n_rows // s.global_batch
    if per_epoch == 0:
        few = f"{s.data} has {n_rows} rows, fewer than one global batch of {s.global_batch}"
        raise ValueError(f"{few}: make more, or lower --global_batch")
    return s.max_steps if s.max_steps >= 0 else s.epochs * per_epoch


def build(s, device):
    """The model with a fresh adapter, or with the one of --init_from."""
    keys = """n_layers n_queries n_taps audio_seconds long_audio fit_window lora_rank train_llm
        max_answer_tokens dropout"""
    config = {key: getattr(s, key) for key in keys.split()}
    options = dict(device=device, shard_llm=bool(s.shard_llm), **config)
    if s.train_llm:  # trained weights are float32; Whisper keeps its dtype
        options |= dict(dtype=torch.float32, audio_dtype=run.compute_dtype(device))
    model = DeSTA.from_pretrained(s.llm, s.whisper, s.init_from or None, **options)
    model.llm.checkpoint_activations = bool(s.checkpoint_activations)
    model.whisper.decoder.cpu()  # it writes transcripts, which training rows have: 1.8 GB
    hears = model.whisper.config.max_source_positions // 50
    if s.audio_seconds > hears:
        raise ValueError(f"--audio_seconds {s.audio_seconds}: {s.whisper} hears {hears} s at most")
    return model


def make_optimizer(s, model):
    """AdamW. What learns inside the LLM has a rate of its own: `share` times the schedule's."""
    named = model.trained()
    inside = [weight for name, weight in named.items() if name.startswith(LLM_PREFIX)]
    adapter = [weight for name, weight in named.items() if not name.startswith(LLM_PREFIX)]
    groups = [{"params": adapter}]
    if inside:
        groups.append({"params": inside, "share": s.llm_lr / s.lr if s.llm_lr >= 0 else 1.0})
    return torch.optim.AdamW(groups, betas=(0.9, s.beta2), weight_decay=s.weight_decay, fused=True)


def resume(s, model, optimizer, data, rank, world):
    """Load the newest checkpoint, or fit a fresh adapter. -> (step to go on with, record to
    save)
    """
    record = {"settings": asdict(s), "made_from": None}
    if rank == 0:  # what a resumed run must find unchanged, besides its settings
        hashes = {"llm_sha256": file_hash(s.llm), "whisper_sha256": file_hash(s.whisper)}
        record["made_from"] = hashes | {"data_bytes": data.rows.bytes}
    step = checkpoint.load(s.out, model, optimizer, record, asdict(Settings()), FREE)
    if sum_over_ranks(torch.tensor(step, device=model.device)).item() != step * world:
        remedy = "it has to be on a disk that all nodes see"
        raise ValueError(f"the ranks do not find the same checkpoints in {s.out}: {remedy}")
    if step == 0 and s.standardize:
        if rank == 0:
            table = model.llm.model.embed_tokens.weight
            model.adapter.fit(*measure_taps(model, data, s.standardize), table)
        copy_from_rank_0([*model.adapter.parameters(), *model.adapter.buffers()])
    check_same_weights(model)
    if rank == 0:
        checkpoint.drop_old(s.out, s.keep)
        write_text(Path(s.out) / "run.json", json.dumps(run.description(s), indent=2))
    return step, record


def main():
    s = run.parse_settings(Settings, __doc__)
    fast.textbook = bool(s.textbook)
    if s.init_from:  # flag, then adapter, then recipe
        inherit(s, s.init_from, INHERITED.split())
        s.standardize = 0
    if not s.out or Path(s.out).resolve() == Path.cwd():
        raise ValueError(f"--out {s.out!r} is the current folder: name one for this run")

    # processes, seed
    rank, world, device = run.start_processes()
    say = print if rank == 0 else lambda text: None
    n_micro = n_accumulated(s, world)
    parts = f"{s.micro_batch} rows x {world} processes x {n_micro} accumulation steps"
    say(f"{s.global_batch} rows a step = {parts}")
    torch.manual_seed(s.seed)  # every rank starts from the same adapter

    # model, data
    model = build(s, device)
    data = Rows(s.data, model.reader, s)
    model.config.context = data.context()
    last_step = n_steps(s, len(data))
    if rank == 0 and 0 < last_step < 2 * s.warmup:
        most = f"--warmup {s.warmup} takes most of the {last_step} steps"
        run.warn(f"{most}: the rate hardly reaches --lr; a twentieth is usual")
    held_out = held_out_rows(s, model, rank, world) if s.eval_data else []
    weights = list(model.trained().values())
    n_trained = sum(weight.numel() for weight in weights)
    n_frozen = sum(p.numel() for p in model.parameters()) - n_trained
    say(
        f"{len(data):,} rows, {last_step} steps; {n_trained:,} trained, {n_frozen:,} frozen weights"
    )

    # optimizer, resume
    model.train()
    optimizer = make_optimizer(s, model)
    gradients = flat_gradients(weights)
    first_step, record = resume(s, model, optimizer, data, rank, world)
    if first_step:
        say(f"continuing {s.out} at step {first_step}")

    # loader, log
    stop = run.Stop()
    sampler = Batches(data.rows, s, first_step, last_step, rank, world)
    loader = start_loader(data, sampler, s.workers, device)
    left_out, warnings = run.Tally("rows left out"), run.Tally("warnings about audio files")
    steps = batches(loader, n_micro, model, left_out, warnings)
    log = run.Log(Path(s.out) / "log.jsonl", first_step, last_step, rank)
    tables = getattr(model.adapter, "tables", dict)  # an adapter may have some for the log
    skipped = run.Skipped(s.max_skipped, log, s.out)
    peak = run.peak_flops(device, model.llm.lm_head.weight.dtype) * world

    step = first_step  # may be beyond the last: then nothing is left to do
    for step in range(first_step, last_step + 1):
        # evaluate, save
        ending = step == last_step or stop.asked(device)
        # A signal starts no evaluation: a cluster that takes its machine back waits half a minute.
        evaluates = step % s.eval_every == 0 or step == last_step
        if s.eval_data and evaluates and (step > first_step or step == 0):
            log({"step": step} | evaluate(model, held_out, s.micro_batch) | tables())
        saves = ending or (step % s.save_every == 0 and not skipped.in_a_row)
        if rank == 0 and saves and step > first_step:
            checkpoint.save(s.out, model, optimizer, step, record, s.keep)
        if ending:
            break

        # one step
        start = time.perf_counter()
        batch = next(steps)
        gradients.zero_()
        # Dropout is a function of seed, step and micro-batch: nothing to save, and the same on any
        # number of processes.
        seed_of = lambda m: hash((s.seed, step, m * world + rank)) % 2**62
        loss = accumulate(model, batch, seed_of, s.max_tokens_per_pass)
        lr = learning_rate(step, s.lr, s.warmup, last_step)
        loss, norm = update(optimizer, weights, gradients, lr, s.clip, loss)
        if skipped.check(step + 1, loss, norm, batch):
            continue

        # log
        seconds = time.perf_counter() - start
        work = flops(model, *batch.counts)
        speed = {"rows_per_second": batch.n_rows / seconds, "mfu": work / seconds / peak}
        record_of_step = {
            "step": step + 1,
            "loss": loss,
            "lr": lr,
            "grad_norm": norm,
            "seconds": seconds,
        }
        log(record_of_step | speed | {"memory_gb": run.peak_memory(device) / 2**30})

    # close
    log.close()
    left_out.close(), warnings.close()
    if step < last_step:
        name = stop[0] if stop else "a signal to another rank"
        say(f"stopped by {name} at step {step}, saved; the same command continues")
    else:
        say(f"done: {s.out}/adapter" + (f", {skipped.n} steps skipped" if skipped.n else ""))


if __name__ == "__main__":
    run.main(main)
