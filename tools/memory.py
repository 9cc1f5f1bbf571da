"""
memory.py: the official configuration in figures: its parameters, part by part, what a training step takes of a GPU, and GPU-hours.

    python runs/memory.py               # computed: real shapes on the meta device, no weights, no GPU, a few seconds
    python runs/memory.py --measure 12  # on a GPU: one step with 12 rows and one generation, random weights; says time and memory

What is computed: weights; gradients and AdamW's two moments of the trained ones; everything autograd keeps for the backward
pass (counted by its own hooks, with what a fused attention keeps); the logits' gradient; the block that is computed
again, or the two blocks that are gathered. Not in it: CUDA itself, some 0.5 GB, and the allocator's gaps.
"""

import argparse
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import llama  # noqa: E402
import train  # noqa: E402
from llama import Llama, LlamaConfig  # noqa: E402
from qformer import QFormer, QFormerConfig  # noqa: E402
from whisper import Whisper, WhisperConfig, tap_layers  # noqa: E402

SCALING = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
LLAMA_31_8B = LlamaConfig(128256, 4096, 32, 32, 8, 128, 14336, 1e-5, 5e5, SCALING, False)
LARGE_V3 = WhisperConfig(128, 1280, 32, 20, 5120, 32, 20, 5120, 51866)
TOKENS, TARGETS = 360, 100  # of a row: prompt 60, vectors 64, transcript up to 100, answer up to 300; the set's rows are mostly shorter
GB = 1e9


def build(llm_config=LLAMA_31_8B, whisper_config=LARGE_V3, device="meta", dtype=torch.bfloat16, n_layers=6):
    """(whisper, qformer, llm) with random weights, or none at all on the meta device."""
    with torch.device("meta"):
        llm, whisper = Llama(llm_config).requires_grad_(False), Whisper(whisper_config).requires_grad_(False)
        qformer = QFormer(QFormerConfig(whisper_config.d_model, whisper_config.encoder_attention_heads, llm_config.d_model, n_layers=n_layers))
    if device != "meta":
        for part in (llm.to(dtype), whisper.to(dtype), qformer):
            part.to_empty(device=device)
            for name, tensor in part.named_parameters():
                torch.nn.init.constant_(tensor, 1) if "norm" in name.lower() else torch.nn.init.normal_(tensor, std=0.02)
        qformer.standardize(torch.zeros(whisper_config.d_model), torch.ones(whisper_config.d_model))
        return whisper, qformer, llm
    return whisper.to(dtype), qformer, llm.to(dtype)


def loss_of(whisper, qformer, llm, rows, tokens=TOKENS, targets=TARGETS):
    """One forward pass as model.DeSTA makes it, of rows that all look alike -> scalar."""
    w, device = whisper.config, llm.lm_head.weight.device
    taps = whisper.encode(torch.zeros(rows, w.num_mel_bins, 2 * w.max_source_positions, device=device), tap_layers(w.encoder_layers))
    vectors = qformer(taps)  # (rows, n_queries, d_llm)
    text = llm.embed(torch.zeros(rows, tokens - vectors.shape[1], dtype=torch.long, device=device))
    hidden = llm.hidden_states(torch.cat((vectors.to(text.dtype), text), dim=1))  # (rows, tokens, d_llm)
    logits = llm.lm_head(hidden[:, -targets:].flatten(0, 1)).float()  # (rows * targets, vocab_size)
    return F.cross_entropy(logits, torch.zeros(rows * targets, dtype=torch.long, device=device))


class FusedAttention(torch.autograd.Function):
    """On the meta device: what a fused attention keeps for its backward pass, which is q, k, v, the output and a float32 per query."""

    @staticmethod
    def forward(ctx, q, k, v):
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out


def kept_bytes(parts, run):
    """Bytes that autograd keeps after run(), each storage once, without the weights of `parts`."""
    weights = {p.untyped_storage()._cdata for part in parts for p in part.parameters()}
    kept = {}
    fused = lambda q, k, v, *args, **kwargs: FusedAttention.apply(q, k, v)
    real, llama.attend, F.scaled_dot_product_attention = (llama.attend, F.scaled_dot_product_attention), fused, fused
    try:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.untyped_storage()._cdata, t) is None or t, lambda t: t):
            run()
    finally:
        llama.attend, F.scaled_dot_product_attention = real
    return sum(t.untyped_storage().nbytes() for storage, t in kept.items() if storage not in weights)


def memory(parts, rows, world, shard, checkpoint):
    """Bytes on one of `world` GPUs in a training step -> {what: bytes}"""
    whisper, qformer, llm = parts
    size = lambda module: sum(p.numel() * p.element_size() for p in module.parameters())
    block, blocks = size(llm.model.layers[0]), size(llm.model.layers)
    llm.checkpoint_activations = checkpoint
    inside = 0
    if checkpoint:  # the block that is being computed again
        x = torch.empty(rows, TOKENS, llm.config.d_model, device="meta", dtype=torch.bfloat16, requires_grad=True)
        inside = kept_bytes(parts, lambda: llm.model.layers[0](x, *llm.rope(torch.arange(TOKENS, device="meta")[None])))
    logits = rows * TARGETS * llm.config.vocab_size
    return {
        "frozen": size(llm) + size(whisper) - (blocks - blocks // world if shard else 0),
        "trained": 4 * size(qformer),  # weights, gradients, two moments, all float32
        "kept": kept_bytes(parts, lambda: loss_of(*parts, rows)),
        "passing": logits * 4 + inside + 2 * block * shard,
    }


def print_parameters(whisper, qformer, llm):
    count = lambda *modules: sum(p.numel() for module in modules for p in module.parameters())
    table = [
        ("Llama-3.1-8B: embeddings", "frozen", count(llm.model.embed_tokens)),
        (f"Llama-3.1-8B: {llm.config.n_layers} blocks and norm", "frozen", count(llm.model.layers, llm.model.norm)),
        ("Llama-3.1-8B: head", "frozen", count(llm.lm_head)),
        ("Whisper large-v3: encoder", "frozen", count(whisper.encoder)),
        ("Whisper large-v3: decoder (transcripts only)", "frozen", count(whisper.decoder)),
        ("Q-Former: queries and mixing", "trained", sum(p.numel() for p in [*qformer.layer_prompts, qformer.layer_weights])),
        ("Q-Former: 6 layers", "trained", count(qformer.qformer)),
        ("Q-Former: norm and Linear into the LLM", "trained", count(qformer.proj)),
    ]
    table += [(f"all {kind}", kind, sum(n for _, k, n in table if k == kind)) for kind in ("frozen", "trained")]
    print("| part | | parameters |\n| --- | --- | --- |")
    for part, kind, n in table:
        print(f"| {part} | {kind} | {n:,} |")


def print_memory(parts, world=8):
    print(f"\nGB on each of {world} GPUs in a training step; rows of {TOKENS} tokens ({TARGETS} targets) and 30 s of audio; bf16, trained: float32")
    print("| rows at once | shard_llm | checkpoint_activations | frozen | trained | kept for backward | passing | sum | fits |")
    print("| --- " * 9 + "|")
    for rows in (12, 4, 1):
        for shard, checkpoint in ((0, 0), (0, 1), (1, 0), (1, 1)):
            found = memory(parts, rows, world, shard, bool(checkpoint))
            total = sum(found.values()) / GB
            fits = " ".join(f"{card} GB" for card in (24, 48, 80) if total + 1.5 < card) or "-"  # 1.5: CUDA and gaps
            print(f"| {rows} | {shard} | {checkpoint} | " + " | ".join(f"{n / GB:.1f}" for n in found.values()) + f" | {total:.1f} | {fits} |")


def cost(parts):
    """GPU-hours of the paper's recipe on one H100: computed, with the efficiencies of `assumed`. Nothing here is measured."""
    flops, bandwidth = 989e12, 3.35e12  # data sheet of the H100 SXM, dense bf16
    mfu, memory_share, clips, epochs, prompt, shared, answer, batch = 0.45, 0.6, 5e6, 5, 150, 40, 100, 64
    whisper, qformer, llm = parts
    c, body, head = llm.config, sum(p.numel() for p in llm.model.layers.parameters()), llm.lm_head.weight.numel()
    kv = batch * (prompt + answer / 2) * 2 * 2 * c.n_layers * c.n_kv_heads * c.head_dim
    prefill = 2 * body * (prompt - shared) / (flops * mfu)
    decode = answer * (2 * (body + head) + kv) / batch / (bandwidth * memory_share)
    row = train.flops(SimpleNamespace(llm=llm, whisper=whisper, qformer=qformer, audio_seconds=30), 1, 300, answer)
    return {
        "assumed": f"H100 SXM, {mfu:.0%} MFU, {memory_share:.0%} of the bandwidth at batch {batch}, prompts of {prompt} tokens ({shared} shared), "
        f"answers of {answer}, training rows of 300 tokens, 30 s of audio",
        "generation_gpu_hours": clips * (prefill + decode) / 3600, "prefill_share": prefill / (prefill + decode),
        "training_tflop_per_row": row / 1e12, "training_gpu_hours": clips * epochs * row / (flops * mfu) / 3600,
        "training_rows_per_second_and_gpu": flops * mfu / row, "audio_seconds_needed_per_second_and_gpu": 30 * flops * mfu / row,
    }  # fmt: skip


def measure(parts, rows, new_tokens=64):
    """One training step and one generation, each after one to warm up -> {what: seconds or GB}"""
    whisper, qformer, llm = parts
    device = llm.lm_head.weight.device
    on_gpu = device.type == "cuda"
    optimizer, found = torch.optim.AdamW(qformer.parameters(), lr=1e-4, fused=True), {}

    def train_step():
        loss_of(*parts, rows).backward()
        optimizer.step()
        optimizer.zero_grad()

    prompts = torch.randn(rows, TOKENS - TARGETS, llm.config.d_model, device=device, dtype=llm.lm_head.weight.dtype) * 0.02
    for name, run in (("step", train_step), ("generation", lambda: llama.generate(llm, prompts, new_tokens))):
        run()
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        run()
        if on_gpu:
            torch.cuda.synchronize()
            found[f"{name}_gb"] = torch.cuda.max_memory_allocated() / GB
        found[f"{name}_seconds"] = time.perf_counter() - start
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", type=int, default=0, metavar="ROWS", help="run on the GPU with so many rows, instead of computing")
    parser.add_argument("--checkpoint_activations", type=int, default=0, help="1: with --measure, as in train.py")
    args = parser.parse_args()
    if not args.measure:
        parts = build()
        print_parameters(*parts)
        print_memory(parts)
        print("\nThe paper's 5 M generations and 5 epochs, computed, not measured")
        for name, value in cost(parts).items():
            print(f"{name:>40}  {format(value, '.4g') if isinstance(value, float) else value}")
        return
    if not torch.cuda.is_available():
        sys.exit("error: --measure needs a GPU, and torch finds none")
    parts = build(device="cuda")
    parts[2].checkpoint_activations = bool(args.checkpoint_activations)
    figures = ", ".join(f"{name} {value:.2f}" for name, value in measure(parts, args.measure).items())
    print(f"{torch.cuda.get_device_name()}, {args.measure} rows, {TOKENS} tokens, checkpoint_activations {args.checkpoint_activations}: {figures}")


if __name__ == "__main__":
    main()
