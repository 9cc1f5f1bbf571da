"""
bench.py: ours against the peer a user would take instead, side by side in one process and one run.

    python bench.py generate      # llama.generate against transformers' generate: the same weights, ragged prompts, stop rule
    python bench.py train         # a training step against one composed as the official implementation does it
    python bench.py encode        # Whisper's encoder against transformers'
    python bench.py audio         # files to log-mel: how many times faster than real time one data worker is
    python bench.py load          # import and loading, in fresh processes, against transformers
    python bench.py growth        # cost over batch, prompt length and rows;  python runs/plot_speed.py  draws it

    torchrun --nproc_per_node=2 bench.py generate|train                 # as the other scripts run: ours shared out over the processes,
                                                                        # the peer in one process with all cores
    python bench.py generate --llm random:8b                            # random weights at the shapes of Llama-3.1-8B, for GPUs
    python bench.py train --llm random:8b --whisper random:large-v3

Both sides run in turns; the first turn is warm-up and reported apart; then medians, and the median of the turns' ratios. On a
machine that others use too, the ratio of the CPU times (OMP_NUM_THREADS=1) is steadier than that of the clock. The last line is a JSON
object, also appended to out/bench.jsonl. The peer needs the packages of tests/requirements.txt.
"""

import ctypes
import dataclasses
import gc
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import soundfile
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train  # noqa: E402
import whisper as audio  # noqa: E402
from engine import run  # noqa: E402
from engine.fast import common_prefix  # noqa: E402
from engine.run import barrier, gather, setting, sum_over_ranks  # noqa: E402
from engine.weights import read_json  # noqa: E402
from llama import Llama, LlamaConfig, generate  # noqa: E402
from model import AUDIO, AUDIO_ID, DeSTA, DeSTAConfig  # noqa: E402
from qformer import QFormer, QFormerConfig  # noqa: E402
from tokenizer import Tokenizer  # noqa: E402


@dataclasses.dataclass
class Settings:
    llm: str = setting("weights/smollm2-135m-instruct", "Hugging Face folder, or random:8b, random:tiny: random weights of that shape")
    whisper: str = setting("weights/whisper-tiny.en", "Hugging Face folder, or random:large-v3, random:tiny-whisper")
    device: str = setting("", "cpu, cuda; '' takes the GPU if there is one")
    dtype: str = setting("", "float32 or bfloat16, on both sides; '' is what the scripts choose on this device")
    rows: int = setting(256, "generate: prompts")
    batches: str = setting("64,128", "generate: our batch sizes, the fastest in the warm-up counts; train and encode take the first")
    peer_batches: str = setting("32,64,128", "the same for the peer")
    max_new_tokens: int = setting(128, "generate: at most so many")
    repeats: int = setting(5, "turns after the warm-up")
    out: str = setting("out/bench.jsonl", "results are appended here; runs/plot_speed.py reads them")


# -- the two sides' models: the same weights, once in memory -----------------------------------------------------------------

TINY = dict(
    model_type="llama", vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=2048, rms_norm_eps=1e-5, rope_theta=1e4, rope_scaling=None, tie_word_embeddings=True,
)  # fmt: skip
WHISPER_TINY = dict(
    model_type="whisper", num_mel_bins=80, d_model=64, encoder_layers=4, encoder_attention_heads=4, encoder_ffn_dim=128, decoder_layers=1,
    decoder_attention_heads=4, decoder_ffn_dim=128, vocab_size=64, max_source_positions=100, max_target_positions=32, pad_token_id=0,
)  # fmt: skip
SHAPES = {
    "random:tiny": TINY, "random:tiny-whisper": WHISPER_TINY,
    "random:8b": TINY | dict(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        rope_theta=5e5, tie_word_embeddings=False,
    ),
    "random:large-v3": WHISPER_TINY | dict(
        num_mel_bins=128, d_model=1280, encoder_layers=32, encoder_attention_heads=20, encoder_ffn_dim=5120, decoder_layers=32,
        decoder_attention_heads=20, decoder_ffn_dim=5120, vocab_size=51866, max_source_positions=1500, max_target_positions=448,
    ),
}  # fmt: skip


def build(name, dtype, device):
    """A folder, or "random:SHAPE" -> (our frozen model, its config.json as a dict)"""
    if name not in SHAPES:
        c = read_json(Path(name) / "config.json")
        return (audio.Whisper if c["model_type"] == "whisper" else Llama).from_pretrained(name, dtype, device), c
    c = SHAPES[name]
    with tempfile.TemporaryDirectory() as folder, torch.device("meta"):
        Path(folder, "config.json").write_text(json.dumps(c))
        if c["model_type"] == "whisper":
            model = audio.Whisper(audio.WhisperConfig(**{f.name: c[f.name] for f in dataclasses.fields(audio.WhisperConfig)}))
        else:
            model = Llama(LlamaConfig.from_json(Path(folder) / "config.json"))
    model.to(dtype).to_empty(device=device)  # in the compute dtype from the start: an 8B model never exists twice
    for parameter_name, p in model.named_parameters():
        p.data.fill_(1.0) if parameter_name.endswith("norm.weight") else p.data.normal_(std=0.02)
    if c.get("model_type") == "llama" and c["tie_word_embeddings"]:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.eval().requires_grad_(False), c


def peer_llm(llm, c):
    """transformers' Llama on our tensors."""
    import transformers

    config = transformers.LlamaConfig(**{k: v for k, v in c.items() if k not in ("model_type", "torch_dtype")})
    with torch.device("meta"):
        peer = transformers.LlamaForCausalLM(config)
    peer.load_state_dict(llm.state_dict(), assign=True)
    peer.tie_weights()
    peer.model.rotary_emb = type(peer.model.rotary_emb)(config).to(llm.lm_head.weight.device)  # no weights: it is not in the state_dict
    return peer.eval().requires_grad_(False)


def peer_encoder(whisper, c, dtype):
    """transformers' Whisper encoder with our weights, in its own dtype if that differs."""
    import transformers

    with torch.device("meta"):
        peer = transformers.WhisperModel(transformers.WhisperConfig(**{k: v for k, v in c.items() if k not in ("model_type", "torch_dtype")})).encoder
    peer.load_state_dict({name: tensor.to(dtype) for name, tensor in whisper.encoder.state_dict().items()}, assign=True)
    return peer.eval().requires_grad_(False)


def peer_qformer(q):
    """The official adapter: transformers' BERT as a decoder with cross-attention, called once per tap, in float32."""
    import transformers
    from transformers.models.bert.modeling_bert import BertEncoder

    c = q.config
    bert = transformers.BertConfig(
        hidden_size=c.d_model, num_attention_heads=c.n_heads, num_hidden_layers=c.n_layers, intermediate_size=c.d_ff, is_decoder=True,
        add_cross_attention=True, attn_implementation="eager", hidden_dropout_prob=c.dropout, attention_probs_dropout_prob=c.dropout,
    )  # fmt: skip
    peer = torch.nn.Module()
    peer.layer_prompts = torch.nn.ParameterList(torch.empty(1, c.n_queries, c.d_model) for _ in range(c.n_taps))
    peer.layer_weights = torch.nn.Parameter(torch.empty(c.n_queries, c.n_taps))
    peer.qformer = BertEncoder(bert)
    peer.proj = torch.nn.Sequential(torch.nn.LayerNorm(c.d_model), torch.nn.Linear(c.d_model, c.d_llm))
    peer.load_state_dict(q.official_state_dict())
    return peer.to(q.layer_weights.device)


RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


# -- measuring -----------------------------------------------------------------------------------------------------------------


def timed(work, device):
    """-> (seconds by rank 0's clock until all ranks are done, CPU seconds of all processes, what work returned)"""
    sync = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    sync(), common.barrier()
    clock, cpu = time.perf_counter(), time.process_time()
    result = work()
    sync(), common.barrier()
    seconds = torch.tensor([(time.perf_counter() - clock) * (RANK == 0), time.process_time() - cpu], dtype=torch.float64)
    return *common.sum_over_ranks(seconds.to(device)).tolist(), result


def on_all_cores(work):
    """The peer: rank 0 alone, with the threads of all processes; the others wait."""
    if RANK:
        return None
    threads = torch.get_num_threads()
    torch.set_num_threads(threads * WORLD)
    result = work()
    torch.set_num_threads(threads)
    return result


def in_turns(ours, peer, repeats, device):
    """Run both once to warm up, then `repeats` times in turns. -> medians in seconds, and the median of the turns' ratios"""
    warm = [timed(work, device)[0] for work in (ours, peer)]
    turns = []
    for i in range(repeats):
        pair = {name: timed(work, device)[:2] for name, work in (("ours", ours), ("peer", peer))[:: (-1) ** i]}  # nobody is always first
        turns.append((*pair["ours"], *pair["peer"]))
    ours_clock, ours_cpu, peer_clock, peer_cpu = (statistics.median(column) for column in zip(*turns))
    ratios = sorted(peer / ours for ours, _, peer, _ in turns)
    return {
        "ours_seconds": ours_clock, "peer_seconds": peer_clock, "ratio": statistics.median(ratios), "ratio_min": ratios[0], "ratio_max": ratios[-1],
        "ours_cpu_seconds": ours_cpu, "peer_cpu_seconds": peer_cpu, "cpu_ratio": statistics.median(t[3] / t[1] for t in turns),
        "ours_warm_up": warm[0], "peer_warm_up": warm[1],
    }  # fmt: skip


def peak_memory(work, device):
    """Bytes that `work` holds at its peak beyond what was held before, in all processes."""
    return common.sum_over_ranks(torch.tensor(own_peak_memory(work, device), device=device)).item()


def own_peak_memory(work, device):
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)  # give freed memory back, or the work would reuse it unseen
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts anew
    status = lambda key: 1024 * int(Path("/proc/self/status").read_text().split(key + ":")[1].split()[0])
    before = status("VmRSS")
    work()
    return status("VmHWM") - before


def ceilings(dtype, device):
    """What this device reaches now -> (FLOP/s of a large square product, bytes/s of a large copy)"""
    n, size = (8192, 2**31) if device.type == "cuda" else (1024, 2**27)
    a, b = torch.randn(n, n, device=device).to(dtype), torch.empty(size, dtype=torch.uint8, device=device)
    product = min(timed(lambda: a @ a, device)[0] for _ in range(20))
    copy = min(timed(lambda: b.clone(), device)[0] for _ in range(10))
    return 2 * n**3 / product, 2 * size / copy


# -- generation ------------------------------------------------------------------------------------------------------------------


def ragged_prompts(s, llm, n, low=30, high=200):
    """n prompts of 30 to 200 tokens, and the ids that end an answer. Real weights get real questions, so that they end by themselves."""
    rng = random.Random(0)
    if s.llm in SHAPES:
        ids = lambda k: [rng.randrange(1, llm.config.vocab_size) for _ in range(k)]
        shared = ids(low - 5)
        return [shared + ids(rng.randint(5, high - low)) for _ in range(n)], set(range(0, llm.config.vocab_size, 50))
    tokenizer = Tokenizer(s.llm)
    sentences = [line for line in Path("demo/sentences.txt").read_text(encoding="utf-8").splitlines() if line and line[0] != "#"]
    asks = ["Continue the story.", "What is this about? Answer briefly.", "Translate into French.", "List the nouns.", "Hi!"]
    head, tail = map(tokenizer.encode, tokenizer.apply_chat_template([{"role": "user", "content": AUDIO}]).split(AUDIO))
    prompts = []
    for _ in range(n):
        text = " ".join([rng.choice(asks), *rng.sample(sentences, 20)])
        prompts.append(head + tokenizer.encode(text)[: max(1, rng.randint(low, high) - len(head) - len(tail))] + tail)
    return prompts, tokenizer.stop_ids


def peer_generate(peer, prompts, n_new, stop_ids, batch):
    """transformers' generate, prompts sorted by length (so that it pads little), left-padded."""
    order, answers = sorted(range(len(prompts)), key=lambda i: -len(prompts[i])), [None] * len(prompts)
    for start in range(0, len(order), batch):
        part = order[start : start + batch]
        T = max(len(prompts[i]) for i in part)
        ids = torch.tensor([[0] * (T - len(prompts[i])) + prompts[i] for i in part], device=peer.device)
        mask = torch.tensor([[0] * (T - len(prompts[i])) + [1] * len(prompts[i]) for i in part], device=peer.device)
        out = peer.generate(
            ids, attention_mask=mask, max_new_tokens=n_new, do_sample=False, eos_token_id=sorted(stop_ids), pad_token_id=min(stop_ids)
        )
        for i, new in zip(part, out[:, T:].tolist()):
            end = next((k for k, token in enumerate(new) if token in stop_ids), len(new))
            answers[i] = new[: end + 1]
    return answers


def bench_generate(s, device, dtype):
    llm, c = build(s.llm, dtype, device)
    peer = peer_llm(llm, c)
    prompts, stop_ids = ragged_prompts(s, llm, s.rows)
    ours = lambda batch: generate(llm, prompts[RANK::WORLD], s.max_new_tokens, stop_ids=stop_ids, batch_size=batch)
    theirs = lambda batch: on_all_cores(lambda: peer_generate(peer, prompts, s.max_new_tokens, stop_ids, batch))
    best = []
    for run, text in ((ours, s.batches), (theirs, s.peer_batches)):
        sizes = [int(b) for b in text.split(",")]
        best.append(min(sizes, key=lambda b: timed(lambda: run(b), device)[0]) if len(sizes) > 1 else sizes[0])
    answers = common.gather([(i, answer) for i, answer in zip(range(RANK, len(prompts), WORLD), ours(best[0]))])
    mine, others = [answer for _, answer in sorted(answers)], common.gather(theirs(best[1]) or [])
    same = sum(a == b for a, b in zip(mine, others)) / len(prompts)
    assert dtype != torch.float32 or same == 1, f"greedy answers must be the same in float32, {same:.0%} are"
    result = in_turns(lambda: ours(best[0]), lambda: theirs(best[1]), s.repeats, device)

    # Floors: every needed product at the speed of a large one; every step of decoding reads the weights and its rows' keys and values.
    rate, bandwidth = ceilings(dtype, device)
    n_new, prefix = sum(map(len, mine)), common_prefix([torch.tensor(p) for p in prompts])
    n_prompt = sum(map(len, prompts)) - prefix * (len(prompts) - 1)
    body = sum(p.numel() for p in llm.model.layers.parameters())
    head = c["vocab_size"] * c["hidden_size"]
    contexts = sum(len(a) * (len(p) - prefix + len(a) / 2) for p, a in zip(prompts, mine))
    kv_bytes = contexts * 2 * dtype.itemsize * llm.config.n_layers * llm.config.n_kv_heads * llm.config.head_dim
    rate, bandwidth = rate * WORLD, bandwidth * WORLD
    prefill = 2 * body * n_prompt / rate
    decode = max(2 * (body + head) * n_new / rate, ((body + head) * dtype.itemsize * n_new / best[0] + kv_bytes) / bandwidth)
    return result | {
        "rows": len(prompts), "prompt_tokens": sum(map(len, prompts)), "shared_prefix": prefix, "new_tokens": n_new, "same_answers": same,
        "processes": WORLD, "ours_batch": best[0], "peer_batch": best[1], "ours_tokens_per_second": n_new / result["ours_seconds"],
        "peer_tokens_per_second": n_new / result["peer_seconds"], "floor_seconds": prefill + decode,
        "fraction_of_floor": (prefill + decode) / result["ours_seconds"], "ceiling_flops": rate, "ceiling_bytes": bandwidth,
    }  # fmt: skip


def bench_growth(s, device, dtype):
    """Seconds of both sides over batch, prompt length and rows, one measurement a point; CPU seconds on CPUs."""
    llm, c = build(s.llm, dtype, device)
    peer, rng, points = peer_llm(llm, c), random.Random(0), []
    prompt = lambda n: [rng.randrange(1, c["vocab_size"]) for _ in range(n)]
    cases = [("batch", b, 32, 64, b) for b in (1, 4, 16, 32)] + [("prompt length", n, 8, n, 8) for n in (32, 128, 256, 512)]
    cases += [("rows", n, n, 64, 32) for n in (8, 32, 64)]
    for axis, x, rows, length, batch in [cases[0]] + cases:  # the first is warm-up
        prompts = [prompt(length) for _ in range(min(rows, s.rows))]
        seconds = {
            name: timed(work, device)[device.type == "cpu"] for name, work in (
                ("ours", lambda: generate(llm, prompts, s.max_new_tokens, batch_size=batch)),
                ("peer", lambda: peer_generate(peer, prompts, s.max_new_tokens, {0}, batch)),
            )
        }  # fmt: skip
        points.append({"axis": axis, "x": x, "rows": len(prompts), "prompt": length, "batch": batch, "new": s.max_new_tokens} | seconds)
    return {"points": points[1:]}


# -- a training step -----------------------------------------------------------------------------------------------------------


def peer_loss(parts, rows, taps, device):
    """The official way: encoder in float32 under autocast, one Q-Former call per tap, rows padded on the left, logits everywhere."""
    llm, encoder, q = parts
    with torch.autocast(device.type, torch.bfloat16, enabled=llm.dtype == torch.bfloat16):
        with torch.no_grad():
            states, keep = {}, lambda n: lambda block, inputs, output: states.update({n: output if torch.is_tensor(output) else output[0]})
            hooks = [encoder.layers[n].register_forward_hook(keep(n)) for n in taps]  # before the final norm, which hidden_states[-1] has
            encoder(torch.stack([row["mels"][0] for row in rows]).to(device))
            for hook in hooks:
                hook.remove()
        mix, vectors = q.layer_weights.softmax(-1), 0
        for i, queries in enumerate(q.layer_prompts):
            visible = torch.zeros(1, 1, queries.shape[1], queries.shape[1], device=device)
            seen = q.qformer(queries.expand(len(rows), -1, -1), attention_mask=visible, encoder_hidden_states=states[taps[i]])
            vectors = vectors + mix[:, i, None] * seen.last_hidden_state
        vectors = q.proj(vectors)
        sequences = [torch.tensor(row["ids"] + row["target"]) for row in rows]
        T = max(map(len, sequences))
        pad = lambda tensors, value: torch.stack([torch.nn.functional.pad(t, (T - len(t), 0), value=value) for t in tensors]).to(device)
        ids, mask = pad(sequences, 0), pad([torch.ones_like(t) for t in sequences], 0)
        labels = pad([torch.tensor([-100] * len(row["ids"]) + row["target"]) for row in rows], -100)
        x = llm.get_input_embeddings()(ids.clamp(min=0))
        x = x.index_put((ids == AUDIO_ID,), vectors.flatten(0, 1).to(x.dtype))
        return llm(inputs_embeds=x, attention_mask=mask, labels=labels).loss


def bench_train(s, device, dtype):
    (llm, c), (whisper, wc) = build(s.llm, dtype, device), build(s.whisper, dtype, device)
    w, batch = whisper.config, int(s.batches.split(",")[0])
    torch.manual_seed(0)
    config = QFormerConfig(w.d_model, w.encoder_attention_heads, llm.config.d_model, dropout=0.0)
    seconds = w.max_source_positions // audio.POSITIONS_PER_SECOND
    model = DeSTA(llm, None, whisper, QFormer(config).to(device), seconds)
    parts = peer_llm(llm, c), peer_encoder(whisper, wc, torch.float32), peer_qformer(model.qformer)

    # Rows as in training: a shared system prompt, 64 audio vectors, transcript and instruction, an answer; 120 to 300 tokens in all.
    rng = random.Random(0)
    ids = lambda k: [rng.randrange(1, c["vocab_size"]) for _ in range(k)]
    shared, mel = ids(30), lambda: torch.randn(w.num_mel_bins, 100 * seconds)
    rows = [{"ids": shared + [AUDIO_ID] * 64 + ids(rng.randint(16, 116)), "target": ids(rng.randint(10, 90)), "mels": [mel()]} for _ in range(batch)]
    lengths = [len(row["ids"]) + len(row["target"]) for row in rows]

    n_targets = sum(len(row["target"]) for row in rows)

    def step(loss, weights):
        for weight in weights:
            weight.grad = None
        value = loss()
        value.backward()
        return value.detach()

    def ours():
        value = step(lambda: model.loss(rows[RANK::WORLD], n_targets), list(model.qformer.parameters()))
        common.sum_over_ranks(torch.cat([weight.grad.flatten() for weight in model.qformer.parameters()]))
        return common.sum_over_ranks(value).item()

    peer = lambda: on_all_cores(lambda: step(lambda: peer_loss(parts, rows, model.taps, device), list(parts[2].parameters())).item())
    losses = ours(), common.gather([peer()])[0]
    assert abs(losses[0] - losses[1]) < (1e-4 if dtype == torch.float32 else 0.05), f"the two losses must agree: {losses}"
    result = in_turns(ours, peer, s.repeats, device)
    rate, _ = ceilings(dtype, device)
    needed = train.flops(model, batch, sum(lengths) - 30 * batch, n_targets)  # the shared beginning is kept from step to step
    return result | {
        "processes": WORLD, "batch": batch, "tokens": [min(lengths), max(lengths)], "losses": losses, "audio_seconds": seconds,
        "ours_samples_per_second": batch / result["ours_seconds"], "peer_samples_per_second": batch / result["peer_seconds"],
        "ours_peak_bytes": peak_memory(ours, device), "peer_peak_bytes": peak_memory(peer, device),
        "needed_flops": needed, "mfu": needed / result["ours_seconds"] / rate / WORLD, "ceiling_flops": rate * WORLD,
    }  # fmt: skip


# -- audio -------------------------------------------------------------------------------------------------------------------------


def bench_encode(s, device, dtype):
    whisper, c = build(s.whisper, dtype, device)
    peer, w, batch = peer_encoder(whisper, c, dtype), whisper.config, int(s.batches.split(",")[0])
    mel, taps, T = torch.randn(batch, w.num_mel_bins, 2 * w.max_source_positions, device=device), [*range(w.encoder_layers)], w.max_source_positions
    ours = lambda: whisper.encode(mel, taps)
    theirs = torch.no_grad()(lambda: peer(mel.to(dtype), output_hidden_states=True).hidden_states)
    close = 1e-3 if dtype == torch.float32 else 0.1
    a, b = ours()[:, 0].float(), theirs()[1].float()
    assert (a - b).norm() < close * b.norm(), f"the first block's outputs differ by {(a - b).norm() / b.norm():.1e}"
    result = in_turns(ours, theirs, s.repeats, device)
    rate, _ = ceilings(dtype, device)
    needed = 2 * T * batch * (w.encoder_layers * (12 * w.d_model**2 + 2 * T * w.d_model) + 6 * w.num_mel_bins * w.d_model + 3 * w.d_model**2)
    return result | {
        "batch": batch, "clip_seconds": T / 50, "ours_times_real_time": batch * T / 50 / result["ours_seconds"],
        "needed_flops": needed, "mfu": needed / result["ours_seconds"] / rate, "ceiling_flops": rate,
    }  # fmt: skip


def bench_audio(s, device, dtype):
    """30 s files of several rates and formats -> log-mel of 80 bins, on one thread as in a data worker."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    result = {"threads": 1}
    with tempfile.TemporaryDirectory() as folder:
        for name, rate, channels in (("16000.wav", 16000, 1), ("48000.flac", 48000, 2), ("44100.wav", 44100, 2), ("44100.mp3", 44100, 2),
                                     ("22050.ogg", 22050, 1), ("8000.wav", 8000, 1), ("44101.wav", 44101, 1)):  # fmt: skip
            noise = torch.randn(30 * rate, channels, generator=torch.Generator().manual_seed(0)) * 0.1
            soundfile.write(Path(folder) / name, noise.numpy(), rate)
            work = lambda: audio.log_mel([audio.load_audio(Path(folder) / name, 30)], 80)
            first = timed(work, device)[1]
            result[name] = {"times_real_time": 30 / statistics.median(timed(work, device)[1] for _ in range(s.repeats)), "first_seconds": first}
    torch.set_num_threads(threads)
    return result


def bench_load(s, device, dtype):
    """Fresh processes: import, then SmolLM2 and tiny.en with their tokenizers, ready to use."""
    programs = {
        "ours": f"""
from llama import Llama; from tokenizer import Tokenizer; from whisper import Whisper; import torch
Tokenizer({s.llm!r}); Llama.from_pretrained({s.llm!r}, {dtype}, {str(device)!r}); Whisper.from_pretrained({s.whisper!r}, {dtype}, {str(device)!r})""",
        "peer": f"""
from transformers import AutoModelForCausalLM, AutoTokenizer, WhisperForConditionalGeneration, WhisperProcessor; import torch
AutoTokenizer.from_pretrained({s.llm!r}); AutoModelForCausalLM.from_pretrained({s.llm!r}, dtype={dtype}).to({str(device)!r})
WhisperProcessor.from_pretrained({s.whisper!r}); WhisperForConditionalGeneration.from_pretrained({s.whisper!r}, dtype={dtype}).to({str(device)!r})""",
        "torch alone": "import torch",
    }
    times = {name: [] for name in programs}
    for i in range(s.repeats + 1):  # the first round fills the page cache
        for name, program in programs.items():
            clock, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            times[name] += [(time.perf_counter() - clock, cpu)] if i else []
    clock, cpu = ({name: statistics.median(t[k] for t in turns) for name, turns in times.items()} for k in (0, 1))
    return {"seconds": clock, "cpu_seconds": cpu, "ratio": clock["peer"] / clock["ours"], "cpu_ratio": cpu["peer"] / cpu["ours"]}


# ---------------------------------------------------------------------------------------------------------------------------------


BENCHES = {
    "generate": bench_generate, "train": bench_train, "encode": bench_encode, "audio": bench_audio, "load": bench_load, "growth": bench_growth,
}  # fmt: skip


def main():
    which = next((a for a in sys.argv[1:2] if a in BENCHES), None)
    s = common.parse_settings(Settings, __doc__, sys.argv[2 if which else 1 :])
    if which is None:
        raise ValueError(f"say which: python bench.py {'|'.join(BENCHES)}")
    device = common.start_processes()[2]
    device = torch.device(s.device) if s.device else device
    torch.manual_seed(0)  # the same random weights in every process
    dtype = getattr(torch, s.dtype) if s.dtype else compute_dtype(device)
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} of {os.cpu_count()} threads"
    hardware = f"{WORLD} × {hardware}" if WORLD > 1 else hardware
    result = {"bench": which, "llm": s.llm, "whisper": s.whisper, "device": hardware, "dtype": str(dtype), "torch": torch.__version__}
    result |= BENCHES[which](s, device, dtype) | {"load_average": os.getloadavg()[0], "time": time.strftime("%F %T")}
    if RANK:
        return
    for name, value in result.items():
        print(f"{name:>34}  {format(value, '.4g') if isinstance(value, float) else value}")
    line = json.dumps(result)
    Path(s.out).parent.mkdir(parents=True, exist_ok=True)
    with open(s.out, "a", encoding="utf-8") as file:
        file.write(line + "\n")
    print(line)


if __name__ == "__main__":
    try:
        main()
    except (FileNotFoundError, ValueError) as error:
        common.fail(error)
