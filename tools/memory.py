"""
memory.py: the official configuration in figures: its parameters, part by part, what a training step
takes of a GPU, and GPU-hours.

    python tools/memory.py                 # computed: real shapes without weights or a GPU
    python tools/memory.py --measure 12    # on a GPU, random weights: time and memory of one step
                                           # with 12 rows, and of one generation

The step is model.DeSTA.loss itself on the meta device, that is the textbook path, which GPUs run:
rows padded on the right, attention fused. Counted are weights; gradients and AdamW's two moments of
the trained ones; all that autograd keeps for the backward pass (its own hooks tell), with what a
fused attention keeps; the logits' gradient; the block that is computed again, or the two blocks
that are gathered. Not counted: CUDA itself, some 0.5 GB, and the allocator's gaps.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train
from llama import Llama, LlamaConfig, generate
from model import AUDIO_ID, DeSTA, DeSTAConfig
from qformer import QFormer, QFormerConfig
from whisper import Whisper, WhisperConfig

SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LLAMA_31_8B = LlamaConfig(128256, 4096, 32, 32, 8, 128, 14336, 1e-5, 5e5, SCALING, False)
LARGE_V3 = WhisperConfig(128, 1280, 32, 20, 5120, 32, 20, 5120, 51866)
# A row: prompt 60, vectors 64, transcript up to 100, answer up to 300. Most are shorter than these
# 524: 360, of which the answer is 100, stands for one.
TOKENS, TARGETS = 360, 100
GB = 1e9


def build(
    llm_config=LLAMA_31_8B,
    whisper_config=LARGE_V3,
    device="meta",
    dtype=torch.bfloat16,
    n_layers=6,
):
    """model.DeSTA with random weights, or with none at all on the meta device."""
    with torch.device("meta"):
        llm, whisper = Llama(llm_config), Whisper(whisper_config)
    for part in (llm.to(dtype), whisper.to(dtype)):
        part.requires_grad_(False)
        if device != "meta":
            part.to_empty(device=device)
            for name, tensor in part.named_parameters():
                tensor.fill_(1.0) if "norm" in name else tensor.normal_(std=0.02)
    w, d_llm = whisper_config, llm_config.d_model
    with torch.device(device):
        adapter = QFormer(QFormerConfig(w.d_model, w.encoder_attention_heads, d_llm, n_layers))
    config = DeSTAConfig(n_layers=n_layers, audio_seconds=w.max_source_positions // 50)
    return DeSTA(config, llm, None, whisper, adapter)


def rows_alike(model, n, tokens=TOKENS, targets=TARGETS):
    """n training rows as Reader.prepare makes them: all of these lengths, one silent clip each."""
    w = model.whisper.config
    ids = [AUDIO_ID] * model.adapter.n_vectors
    ids += [0] * (tokens - targets - len(ids))
    mel = torch.zeros(w.num_mel_bins, 2 * w.max_source_positions, device=model.device)
    return [{"ids": ids, "target": [0] * targets, "mels": [mel]}] * n


class FusedAttention(torch.autograd.Function):
    """On the meta device: what a fused attention keeps for its backward pass, which is q, k, v, the
    output and a float32 per query.
    """

    @staticmethod
    def forward(ctx, q, k, v):
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out


def kept_bytes(model, work):
    """Bytes that autograd keeps after work(), each storage once, without the model's weights."""
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    kept, real = {}, F.scaled_dot_product_attention

    def keep(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    if model.device.type == "meta":
        F.scaled_dot_product_attention = lambda q, k, v, **options: FusedAttention.apply(q, k, v)
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            work()
    finally:
        F.scaled_dot_product_attention = real
    return sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in weights)


def memory(model, n_rows, world, shard, checkpoint):
    """Bytes on one of `world` GPUs in a training step -> {what: bytes}"""
    llm, d_llm = model.llm, model.llm.config.d_model
    size = lambda module: sum(p.numel() * p.element_size() for p in module.parameters())
    block, blocks = size(llm.model.layers[0]), size(llm.model.layers)
    llm.checkpoint_activations = checkpoint
    inside = 0
    if checkpoint:  # the block that is being computed again
        at = torch.arange(TOKENS - 1, device="meta")[None]
        x = torch.empty(n_rows, TOKENS - 1, d_llm, device="meta", dtype=torch.bfloat16)
        x.requires_grad_()
        inside = kept_bytes(model, lambda: llm.model.layers[0](x, *llm.rope(at)))
    logits = n_rows * TARGETS * llm.config.vocab_size
    elsewhere = blocks - blocks // world if shard else 0
    return {
        "frozen": size(llm) + size(model.whisper.encoder) - elsewhere,
        "trained": 4 * size(model.adapter),  # weights, gradients, two moments, all float32
        "kept": kept_bytes(model, lambda: model.loss(rows_alike(model, n_rows))),
        "passing": logits * 4 + inside + 2 * block * shard,
    }


def print_parameters(model):
    llm, whisper, adapter = model.llm, model.whisper, model.adapter
    count = lambda *modules: sum(p.numel() for module in modules for p in module.parameters())
    n_queries = count(adapter.layer_prompts) + adapter.layer_weights.numel()
    blocks = f"Llama-3.1-8B: {llm.config.n_layers} blocks and norm"
    table = [
        ("Llama-3.1-8B: embeddings", "frozen", count(llm.model.embed_tokens)),
        (blocks, "frozen", count(llm.model.layers, llm.model.norm)),
        ("Llama-3.1-8B: head", "frozen", count(llm.lm_head)),
        ("Whisper large-v3: encoder", "frozen", count(whisper.encoder)),
        ("Whisper large-v3: decoder (transcripts only)", "frozen", count(whisper.decoder)),
        ("Q-Former: queries and mixing", "trained", n_queries),
        ("Q-Former: 6 layers", "trained", count(adapter.qformer)),
        ("Q-Former: norm and Linear into the LLM", "trained", count(adapter.proj)),
    ]
    total = lambda kind: sum(n for _, of_kind, n in table if of_kind == kind)
    table += [(f"all {kind}", kind, total(kind)) for kind in ("frozen", "trained")]
    print("| part | | parameters |\n| --- | --- | --- |")
    for part, kind, n in table:
        print(f"| {part} | {kind} | {n:,} |")


def print_memory(model, world=8):
    columns = (
        "rows at once|shard_llm|checkpoint_activations|frozen|trained|kept for backward|passing"
    )
    columns = [*columns.split("|"), "sum", "fits"]
    rows = f"rows of {TOKENS} tokens ({TARGETS} targets) and 30 s of audio"
    print(f"\nGB on each of {world} GPUs in a training step; {rows}; bf16, trained: float32")
    print(f"| {' | '.join(columns)} |\n" + "| --- " * len(columns) + "|")
    for n_rows in (12, 4, 1):
        for shard, checkpoint in ((0, 0), (0, 1), (1, 0), (1, 1)):
            parts = memory(model, n_rows, world, shard, bool(checkpoint)).values()
            total = sum(parts) / GB
            cards = [f"{card} GB" for card in (24, 48, 80) if total + 1.5 < card]  # CUDA and gaps
            cells = [n_rows, shard, checkpoint, *(f"{n / GB:.1f}" for n in parts), f"{total:.1f}"]
            print(f"| {' | '.join(map(str, cells))} | {' '.join(cards) or '-'} |")


def cost(model):
    """GPU-hours of the paper's recipe on one H100: computed, with the efficiencies of `assumed`.
    Nothing here is measured.
    """
    flops, bandwidth = 989e12, 3.35e12  # data sheet of the H100 SXM, dense bf16
    mfu, memory_share, clips, epochs = 0.45, 0.6, 5e6, 5
    prompt, shared, answer, batch, trained = 150, 40, 100, 64, 300
    llm, c = model.llm, model.llm.config
    body, head = sum(p.numel() for p in llm.model.layers.parameters()), llm.lm_head.weight.numel()
    kv = batch * (prompt + answer / 2) * 2 * 2 * c.n_layers * c.n_kv_heads * c.head_dim
    prefill = 2 * body * (prompt - shared) / (flops * mfu)
    decode = answer * (2 * (body + head) + kv) / batch / (bandwidth * memory_share)
    row = train.flops(model, 1, trained, answer)
    hardware = f"H100 SXM, {mfu:.0%} MFU, {memory_share:.0%} of the bandwidth at batch {batch}"
    lengths = f"prompts of {prompt} tokens ({shared} shared), answers of {answer}"
    return {
        "assumed": f"{hardware}, {lengths}, training rows of {trained} tokens, 30 s of audio",
        "generation_gpu_hours": clips * (prefill + decode) / 3600,
        "prefill_share": prefill / (prefill + decode),
        "training_tflop_per_row": row / 1e12,
        "training_gpu_hours": clips * epochs * row / (flops * mfu) / 3600,
        "training_rows_per_second_and_gpu": flops * mfu / row,
        "audio_seconds_needed_per_second_and_gpu": 30 * flops * mfu / row,
    }


def measure(model, n_rows, new_tokens=64):
    """One training step and one generation, each after one to warm up -> {what: seconds or GB}"""
    device, dtype = model.device, model.llm.lm_head.weight.dtype
    on_gpu = device.type == "cuda"
    optimizer = torch.optim.AdamW(model.adapter.parameters(), lr=1e-4, fused=True)
    rows, found = rows_alike(model, n_rows), {}

    def step():
        model.loss(rows).backward()
        optimizer.step()
        optimizer.zero_grad()

    shape = n_rows, TOKENS - TARGETS, model.llm.config.d_model
    prompts = torch.randn(shape, device=device, dtype=dtype) * 0.02
    works = {"step": step, "generation": lambda: generate(model.llm, prompts, new_tokens)}
    for name, work in works.items():
        work()
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        work()
        if on_gpu:
            torch.cuda.synchronize()
            found[f"{name}_gb"] = torch.cuda.max_memory_allocated() / GB
        found[f"{name}_seconds"] = time.perf_counter() - start
    return found


def main():
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    say = "run on the GPU with so many rows, instead of computing"
    parser.add_argument("--measure", type=int, default=0, metavar="ROWS", help=say)
    say = "1: with --measure, as in train.py"
    parser.add_argument("--checkpoint_activations", type=int, default=0, help=say)
    args = parser.parse_args()
    if not args.measure:
        model = build()
        print_parameters(model)
        print_memory(model)
        print("\nThe paper's 5 M generations and 5 epochs, computed, not measured")
        for name, value in cost(model).items():
            print(f"{name:>40}  {format(value, '.4g') if isinstance(value, float) else value}")
        return
    if not torch.cuda.is_available():
        sys.exit("error: --measure needs a GPU, and torch finds none")
    model = build(device="cuda")
    model.llm.checkpoint_activations = bool(args.checkpoint_activations)
    found = measure(model, args.measure)
    figures = ", ".join(f"{name} {value:.2f}" for name, value in found.items())
    setup = f"{torch.cuda.get_device_name()}, {args.measure} rows of {TOKENS} tokens"
    print(f"{setup}, checkpoint_activations {args.checkpoint_activations}: {figures}")


if __name__ == "__main__":
    main()
