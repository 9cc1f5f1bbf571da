"""
bench.py: ours against the peer a user would take instead, side by side in one process and one run.

    python tools/bench.py generate    # llama.generate against transformers' generate: the same
                                      # weights, ragged prompts, stop rule
    python tools/bench.py train       # a training step against one composed as the official code's
    python tools/bench.py encode      # Whisper's encoder against transformers'
    python tools/bench.py audio       # files to log-mel: how many times faster than real time
    python tools/bench.py load        # import and loading, in fresh processes
    python tools/bench.py growth      # cost over batch, prompt length and rows;
                                      # `python tools/plot.py --speed out/bench.jsonl` draws it

    # As the other scripts run: ours shared out over the processes, the peer in one with all cores.
    torchrun --standalone --nproc_per_node=2 tools/bench.py generate
    # For GPUs: random weights at the shapes of Llama-3.1-8B and Whisper large-v3.
    python tools/bench.py train --llm random:8b --whisper random:large-v3

Both sides run in turns; the first turn is warm-up and reported apart; then medians, and the median
of the turns' ratios. On a machine that others use too, the ratio of the CPU times
(OMP_NUM_THREADS=1) is steadier than that of the clock. The last line is a JSON object, also
appended to out/bench.jsonl. The peer needs the packages of tests/requirements.txt.
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
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train
import whisper as audio
from engine import run
from engine.fast import common_prefix
from engine.run import barrier, gather, setting, sum_over_ranks
from engine.weights import read_json
from llama import Llama, LlamaConfig, generate
from model import AUDIO, AUDIO_ID, DeSTA, DeSTAConfig
from qformer import QFormer, QFormerConfig
from tokenizer import Tokenizer


@dataclasses.dataclass
class Settings:
    llm: str = setting(
        "weights/smollm2-135m-instruct", "Hugging Face folder, or random:8b, random:tiny"
    )
    whisper: str = setting("weights/whisper-tiny.en", "or random:large-v3, random:tiny-whisper")
    device: str = setting("", "cpu, cuda; '' takes the GPU if there is one")
    dtype: str = setting("", "float32 or bfloat16, on both sides; '' is what the scripts choose")
    rows: int = setting(256, "generate: prompts")
    batches: str = setting("64,128", "generate: ours, the fastest counts; the others use the first")
    peer_batches: str = setting("32,64,128", "the same for the peer")
    max_new_tokens: int = setting(128, "generate: at most so many")
    repeats: int = setting(5, "turns after the warm-up")
    out: str = setting("out/bench.jsonl", "results are appended here; tools/plot.py reads them")


RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


# -- the two sides' models: the same weights, once in memory ---------------------------------------

TINY = dict(
    model_type="llama", vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048, rms_norm_eps=1e-5,
    rope_theta=1e4, rope_scaling=None, tie_word_embeddings=True,
)  # fmt: skip
LLAMA_8B = TINY | dict(
    vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
    num_attention_heads=32, num_key_value_heads=8, rope_theta=5e5, tie_word_embeddings=False,
)  # fmt: skip
TINY_WHISPER = dict(
    model_type="whisper", num_mel_bins=80, d_model=64, encoder_layers=4, encoder_attention_heads=4,
    encoder_ffn_dim=128, decoder_layers=1, decoder_attention_heads=4, decoder_ffn_dim=128,
    vocab_size=64, max_source_positions=100, max_target_positions=32, pad_token_id=0,
)  # fmt: skip
LARGE_V3 = TINY_WHISPER | dict(
    num_mel_bins=128, d_model=1280, encoder_layers=32, encoder_attention_heads=20,
    encoder_ffn_dim=5120, decoder_layers=32, decoder_attention_heads=20, decoder_ffn_dim=5120,
    vocab_size=51866, max_source_positions=1500, max_target_positions=448,
)  # fmt: skip
SHAPES = {
    "random:tiny": TINY,
    "random:8b": LLAMA_8B,
    "random:tiny-whisper": TINY_WHISPER,
    "random:large-v3": LARGE_V3,
}


def build(name, dtype, device):
    """A folder, or "random:SHAPE" -> (our frozen model, its config.json as a dict)"""
    if name not in SHAPES:
        c = read_json(Path(name) / "config.json")
        kind = audio.Whisper if c["model_type"] == "whisper" else Llama
        return kind.from_pretrained(name, dtype, device), c
    c = SHAPES[name]
    with tempfile.TemporaryDirectory() as folder, torch.device("meta"):
        file = Path(folder, "config.json")
        file.write_text(json.dumps(c))
        if c["model_type"] == "whisper":
            names = [field.name for field in dataclasses.fields(audio.WhisperConfig)]
            model = audio.Whisper(audio.WhisperConfig(**{key: c[key] for key in names}))
        else:
            model = Llama(LlamaConfig.from_json(file))
    # In the compute dtype from the start: an 8B model never exists twice.
    model.to(dtype).to_empty(device=device)
    for key, p in model.named_parameters():
        p.data.fill_(1.0) if key.endswith("norm.weight") else p.data.normal_(std=0.02)
    if c.get("tie_word_embeddings"):
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.eval().requires_grad_(False), c


def peer_config(kind, c):
    rest = {key: value for key, value in c.items() if key not in ("model_type", "torch_dtype")}
    return kind(**rest)


def peer_llm(llm, c):
    """transformers' Llama on our tensors."""
    import transformers

    config = peer_config(transformers.LlamaConfig, c)
    with torch.device("meta"):
        peer = transformers.LlamaForCausalLM(config)
    peer.load_state_dict(llm.state_dict(), assign=True)
    peer.tie_weights()
    # It has no weights, so it is not in the state_dict.
    rotary = type(peer.model.rotary_emb)(config)
    peer.model.rotary_emb = rotary.to(llm.lm_head.weight.device)
    return peer.eval().requires_grad_(False)


def peer_encoder(whisper, c, dtype):
    """transformers' Whisper encoder with our weights, in its own dtype if that differs."""
    import transformers

    with torch.device("meta"):
        peer = transformers.WhisperModel(peer_config(transformers.WhisperConfig, c)).encoder
    state = {name: tensor.to(dtype) for name, tensor in whisper.encoder.state_dict().items()}
    peer.load_state_dict(state, assign=True)
    return peer.eval().requires_grad_(False)


def peer_qformer(q):
    """The official adapter: transformers' BERT as a decoder with cross-attention, called once per
    tap, in float32.
    """
    import transformers
    from transformers.models.bert.modeling_bert import BertEncoder

    c = q.config
    bert = transformers.BertConfig(
        hidden_size=c.d_model,
        num_attention_heads=c.n_heads,
        num_hidden_layers=c.n_layers,
        intermediate_size=c.d_ff,
        is_decoder=True,
        add_cross_attention=True,
        attn_implementation="eager",
        hidden_dropout_prob=c.dropout,
        attention_probs_dropout_prob=c.dropout,
    )
    peer = torch.nn.Module()
    queries = [torch.empty(1, c.n_queries, c.d_model) for _ in range(c.n_taps)]
    peer.layer_prompts = torch.nn.ParameterList(queries)
    peer.layer_weights = torch.nn.Parameter(torch.empty(c.n_queries, c.n_taps))
    peer.qformer = BertEncoder(bert)
    norm, linear = torch.nn.LayerNorm(c.d_model), torch.nn.Linear(c.d_model, c.d_llm)
    peer.proj = torch.nn.Sequential(norm, linear)
    peer.load_state_dict(q.state_to_save())
    return peer.to(q.layer_weights.device)


# -- measuring -------------------------------------------------------------------------------------


def timed(work, device):
    """-> (seconds by rank 0's clock until all ranks are done, CPU seconds of all processes, what
    work returned)
    """
    sync = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    sync(), barrier()
    clock, cpu = time.perf_counter(), time.process_time()
    result = work()
    sync(), barrier()
    spent = (time.perf_counter() - clock) * (RANK == 0), time.process_time() - cpu
    seconds = sum_over_ranks(torch.tensor(spent, dtype=torch.float64, device=device))
    return *seconds.tolist(), result


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
    """Run both once to warm up, then `repeats` times in turns. -> medians in seconds, and the
    median of the turns' ratios
    """
    warm = [timed(work, device)[0] for work in (ours, peer)]
    turns = []
    for i in range(repeats):
        order = (("ours", ours), ("peer", peer))[:: (-1) ** i]  # nobody is always first
        pair = {name: timed(work, device)[:2] for name, work in order}
        turns.append((*pair["ours"], *pair["peer"]))
    ours_clock, ours_cpu, peer_clock, peer_cpu = map(statistics.median, zip(*turns))
    ratios = [peer / ours for ours, _, peer, _ in turns]
    return {
        "ours_seconds": ours_clock,
        "peer_seconds": peer_clock,
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "ours_cpu_seconds": ours_cpu,
        "peer_cpu_seconds": peer_cpu,
        "cpu_ratio": statistics.median(peer / ours for _, ours, _, peer in turns),
        "ours_warm_up": warm[0],
        "peer_warm_up": warm[1],
    }


def peak_memory(work, device):
    """Bytes that `work` holds at its peak beyond what was held before, in all processes."""
    return sum_over_ranks(torch.tensor(own_peak_memory(work, device), device=device)).item()


def own_peak_memory(work, device):
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)  # give freed memory back, or the work would reuse it unseen
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts anew
    status = Path("/proc/self/status")
    read = lambda key: 1024 * int(status.read_text().split(key + ":")[1].split()[0])
    before = read("VmRSS")
    work()
    return read("VmHWM") - before


def ceilings(dtype, device):
    """What this device reaches now -> (FLOP/s of a large square product, bytes/s of a large copy)"""
    n, size = (8192, 2**31) if device.type == "cuda" else (1024, 2**27)
    a = torch.randn(n, n, device=device).to(dtype)
    b = torch.empty(size, dtype=torch.uint8, device=device)
    product = min(timed(lambda: a @ a, device)[0] for _ in range(20))
    copy = min(timed(lambda: b.clone(), device)[0] for _ in range(10))
    return 2 * n**3 / product, 2 * size / copy


# -- generation ------------------------------------------------------------------------------------


def ragged_prompts(s, llm, n, low=30, high=200):
    """n prompts of 30 to 200 tokens, and the ids that end an answer. Real weights get real
    questions, so that they end by themselves.
    """
    rng = random.Random(0)
    if s.llm in SHAPES:
        ids = lambda k: [rng.randrange(1, llm.config.vocab_size) for _ in range(k)]
        shared = ids(low - 5)
        prompts = [shared + ids(rng.randint(5, high - low)) for _ in range(n)]
        return prompts, set(range(0, llm.config.vocab_size, 50))
    tokenizer = Tokenizer(s.llm)
    lines = Path("demo/sentences.txt").read_text(encoding="utf-8").splitlines()
    sentences = [line for line in lines if line and line[0] != "#"]
    asks = ["Continue the story.", "What is this about? Answer briefly.", "Translate into French."]
    asks += ["List the nouns.", "Hi!"]
    template = tokenizer.apply_chat_template([{"role": "user", "content": AUDIO}])
    head, tail = map(tokenizer.encode, template.split(AUDIO))
    prompts = []
    for _ in range(n):
        text = tokenizer.encode(" ".join([rng.choice(asks), *rng.sample(sentences, 20)]))
        length = rng.randint(low, high) - len(head) - len(tail)
        prompts.append(head + text[: max(1, length)] + tail)
    return prompts, tokenizer.stop_ids


def peer_generate(peer, prompts, n_new, stop_ids, batch):
    """transformers' generate, prompts sorted by length (so that it pads little), left-padded."""
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    stops = dict(eos_token_id=sorted(stop_ids), pad_token_id=min(stop_ids))
    answers = [None] * len(prompts)
    for start in range(0, len(order), batch):
        part = order[start : start + batch]
        T = max(len(prompts[i]) for i in part)
        n_padding = [T - len(prompts[i]) for i in part]
        ids = [[0] * n + prompts[i] for i, n in zip(part, n_padding)]
        mask = [[0] * n + [1] * (T - n) for n in n_padding]
        ids, mask = (torch.tensor(rows, device=peer.device) for rows in (ids, mask))
        options = dict(attention_mask=mask, max_new_tokens=n_new, do_sample=False)
        out = peer.generate(ids, **options, **stops)
        for i, new in zip(part, out[:, T:].tolist()):
            end = next((k for k, token in enumerate(new) if token in stop_ids), len(new))
            answers[i] = new[: end + 1]
    return answers


def fastest(work, batches, device):
    """The batch size, of those in a text like "32,64", with which work(batch) is done first."""
    sizes = [int(size) for size in batches.split(",")]
    if len(sizes) == 1:
        return sizes[0]
    return min(sizes, key=lambda size: timed(lambda: work(size), device)[0])


def bench_generate(s, device, dtype):
    llm, c = build(s.llm, dtype, device)
    peer = peer_llm(llm, c)
    prompts, stop_ids = ragged_prompts(s, llm, s.rows)
    own, most = prompts[RANK::WORLD], s.max_new_tokens
    ours = lambda batch: generate(llm, own, most, stop_ids=stop_ids, batch_size=batch)
    their_answers = lambda batch: peer_generate(peer, prompts, most, stop_ids, batch)
    theirs = lambda batch: on_all_cores(lambda: their_answers(batch))
    batch = fastest(ours, s.batches, device)
    peer_batch = fastest(theirs, s.peer_batches, device)
    numbered = gather(list(zip(range(RANK, len(prompts), WORLD), ours(batch))))
    answers, others = [answer for _, answer in sorted(numbered)], gather(theirs(peer_batch) or [])
    same = sum(a == b for a, b in zip(answers, others)) / len(prompts)
    problem = f"greedy answers must be the same in float32, {same:.0%} are"
    assert dtype != torch.float32 or same == 1, problem
    result = in_turns(lambda: ours(batch), lambda: theirs(peer_batch), s.repeats, device)

    # The floor: every needed product at the speed of a large one; every step of decoding reads the
    # weights and its rows' keys and values.
    rate, bandwidth = (ceiling * WORLD for ceiling in ceilings(dtype, device))
    n_new, n_prompt = sum(map(len, answers)), sum(map(len, prompts))
    prefix = common_prefix([torch.tensor(prompt) for prompt in prompts])
    body = sum(p.numel() for p in llm.model.layers.parameters())
    weights = body + c["vocab_size"] * c["hidden_size"]
    contexts = sum(len(a) * (len(p) - prefix + len(a) / 2) for p, a in zip(prompts, answers))
    kv_size = 2 * dtype.itemsize * llm.config.n_layers * llm.config.n_kv_heads * llm.config.head_dim
    prefill = 2 * body * (n_prompt - prefix * (len(prompts) - 1)) / rate
    read = weights * dtype.itemsize * n_new / batch + contexts * kv_size
    floor = prefill + max(2 * weights * n_new / rate, read / bandwidth)
    return result | {
        "rows": len(prompts),
        "prompt_tokens": n_prompt,
        "shared_prefix": prefix,
        "new_tokens": n_new,
        "same_answers": same,
        "processes": WORLD,
        "ours_batch": batch,
        "peer_batch": peer_batch,
        "ours_tokens_per_second": n_new / result["ours_seconds"],
        "peer_tokens_per_second": n_new / result["peer_seconds"],
        "floor_seconds": floor,
        "fraction_of_floor": floor / result["ours_seconds"],
        "ceiling_flops": rate,
        "ceiling_bytes": bandwidth,
    }


def bench_growth(s, device, dtype):
    """Seconds of both sides over batch, prompt length and rows, one measurement a point; CPU
    seconds on CPUs.
    """
    llm, c = build(s.llm, dtype, device)
    peer, rng, points = peer_llm(llm, c), random.Random(0), []
    prompt = lambda n: [rng.randrange(1, c["vocab_size"]) for _ in range(n)]
    new, on_cpu = s.max_new_tokens, device.type == "cpu"
    cases = [("batch", b, 32, 64, b) for b in (1, 4, 16, 32)]  # axis, x, rows, prompt, batch
    cases += [("prompt length", n, 8, n, 8) for n in (32, 128, 256, 512)]
    cases += [("rows", n, n, 64, 32) for n in (8, 32, 64)]
    for axis, x, rows, length, batch in [cases[0], *cases]:  # the first is warm-up
        prompts = [prompt(length) for _ in range(min(rows, s.rows))]
        ours = lambda: generate(llm, prompts, new, batch_size=batch)
        theirs = lambda: peer_generate(peer, prompts, new, {0}, batch)
        point = {"axis": axis, "x": x, "rows": len(prompts), "prompt": length, "batch": batch}
        seconds = {"ours": timed(ours, device)[on_cpu], "peer": timed(theirs, device)[on_cpu]}
        points.append(point | {"new": new} | seconds)
    return {"points": points[1:]}


# -- a training step -------------------------------------------------------------------------------


def peer_vectors(encoder, q, mels, taps):
    """Mels (B, n_mels, frames) -> audio vectors (B, n_queries, d_llm), one Q-Former call per tap."""
    states = {}

    def keep(n):  # before the final norm, which hidden_states[-1] of transformers has behind it
        def hook(block, inputs, output):
            states[n] = output if torch.is_tensor(output) else output[0]

        return encoder.layers[n].register_forward_hook(hook)

    hooks = [keep(n) for n in taps]
    with torch.no_grad():
        encoder(mels)
    for hook in hooks:
        hook.remove()
    mix, vectors = q.layer_weights.softmax(-1), 0
    for i, queries in enumerate(q.layer_prompts):
        visible = torch.zeros(1, 1, queries.shape[1], queries.shape[1], device=mels.device)
        options = dict(attention_mask=visible, encoder_hidden_states=states[taps[i]])
        seen = q.qformer(queries.expand(len(mels), -1, -1), **options)
        vectors = vectors + mix[:, i, None] * seen.last_hidden_state
    return q.proj(vectors)


def peer_loss(parts, rows, taps, device):
    """The official way: encoder in float32 under autocast, rows padded on the left, logits
    everywhere.
    """
    llm, encoder, q = parts
    with torch.autocast(device.type, torch.bfloat16, enabled=llm.dtype == torch.bfloat16):
        mels = torch.stack([row["mels"][0] for row in rows]).to(device)
        vectors = peer_vectors(encoder, q, mels, taps)
        sequences = [torch.tensor(row["ids"] + row["target"]) for row in rows]
        T = max(map(len, sequences))

        def padded(tensors, value):
            return torch.stack([F.pad(t, (T - len(t), 0), value=value) for t in tensors]).to(device)

        ids, mask = padded(sequences, 0), padded([torch.ones_like(t) for t in sequences], 0)
        labels = [torch.tensor([-100] * len(row["ids"]) + row["target"]) for row in rows]
        x = llm.get_input_embeddings()(ids.clamp(min=0))
        x = x.index_put((ids == AUDIO_ID,), vectors.flatten(0, 1).to(x.dtype))
        return llm(inputs_embeds=x, attention_mask=mask, labels=padded(labels, -100)).loss


def bench_train(s, device, dtype):
    (llm, c), (whisper, wc) = build(s.llm, dtype, device), build(s.whisper, dtype, device)
    w, batch = whisper.config, int(s.batches.split(",")[0])
    torch.manual_seed(0)
    size = w.d_model, w.encoder_attention_heads, llm.config.d_model
    adapter = QFormer(QFormerConfig(*size, dropout=0.0)).to(device)
    seconds = w.max_source_positions // 50
    model = DeSTA(DeSTAConfig(audio_seconds=seconds), llm, None, whisper, adapter)
    parts = peer_llm(llm, c), peer_encoder(whisper, wc, torch.float32), peer_qformer(adapter)

    # Rows as in training: a shared system prompt, 64 audio vectors, transcript and instruction, an
    # answer; 120 to 300 tokens in all.
    rng = random.Random(0)
    ids = lambda k: [rng.randrange(1, c["vocab_size"]) for _ in range(k)]
    shared, rows = ids(30), []
    for _ in range(batch):
        prompt = shared + [AUDIO_ID] * 64 + ids(rng.randint(16, 116))
        target, mel = ids(rng.randint(10, 90)), torch.randn(w.num_mel_bins, 100 * seconds)
        rows.append({"ids": prompt, "target": target, "mels": [mel]})
    lengths = [len(row["ids"]) + len(row["target"]) for row in rows]
    n_targets = sum(len(row["target"]) for row in rows)
    gradients = train.flat_gradients(list(adapter.parameters()))

    def ours():
        gradients.zero_()
        loss = model.loss(rows[RANK::WORLD], n_targets)
        loss.backward()
        sum_over_ranks(gradients)
        return sum_over_ranks(loss.detach()).item()

    def theirs():
        parts[2].zero_grad()
        loss = peer_loss(parts, rows, model.taps, device)
        loss.backward()
        return loss.item()

    peer = lambda: on_all_cores(theirs)
    losses = ours(), gather([peer()])[0]
    close = 1e-4 if dtype == torch.float32 else 0.05
    assert abs(losses[0] - losses[1]) < close, f"the two losses must agree: {losses}"
    result = in_turns(ours, peer, s.repeats, device)
    rate = ceilings(dtype, device)[0] * WORLD
    n_tokens = sum(train.n_computed(row, model) for row in rows)
    needed = train.flops(model, batch, n_tokens, n_targets)
    return result | {
        "processes": WORLD,
        "batch": batch,
        "tokens": [min(lengths), max(lengths)],
        "losses": losses,
        "audio_seconds": seconds,
        "ours_samples_per_second": batch / result["ours_seconds"],
        "peer_samples_per_second": batch / result["peer_seconds"],
        "ours_peak_bytes": peak_memory(ours, device),
        "peer_peak_bytes": peak_memory(peer, device),
        "needed_flops": needed,
        "mfu": needed / result["ours_seconds"] / rate,
        "ceiling_flops": rate,
    }


# -- audio -----------------------------------------------------------------------------------------


def bench_encode(s, device, dtype):
    whisper, c = build(s.whisper, dtype, device)
    peer, w, batch = peer_encoder(whisper, c, dtype), whisper.config, int(s.batches.split(",")[0])
    T, D, taps = w.max_source_positions, w.d_model, [*range(w.encoder_layers)]
    mel = torch.randn(batch, w.num_mel_bins, 2 * T, device=device)
    ours = lambda: whisper.encode(mel, taps)

    @torch.no_grad()
    def theirs():
        return peer(mel.to(dtype), output_hidden_states=True).hidden_states

    a, b = ours()[:, 0].float(), theirs()[1].float()
    apart = (a - b).norm() / b.norm()
    close = 1e-3 if dtype == torch.float32 else 0.1
    assert apart < close, f"the first block's outputs differ by {apart:.1e}"
    result = in_turns(ours, theirs, s.repeats, device)
    rate, _ = ceilings(dtype, device)
    convolutions = 6 * w.num_mel_bins * D + 3 * D**2
    needed = 2 * T * batch * (w.encoder_layers * (12 * D**2 + 2 * T * D) + convolutions)
    return result | {
        "batch": batch,
        "clip_seconds": T / 50,
        "ours_times_real_time": batch * T / 50 / result["ours_seconds"],
        "needed_flops": needed,
        "mfu": needed / result["ours_seconds"] / rate,
        "ceiling_flops": rate,
    }


def bench_audio(s, device, dtype):
    """30 s files of several rates and formats -> log-mel of 80 bins, on one thread as in a data
    worker.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    result = {"threads": 1}
    channels = {"16000.wav": 1, "48000.flac": 2, "44100.wav": 2, "44100.mp3": 2, "22050.ogg": 1}
    channels |= {"8000.wav": 1, "44101.wav": 1}
    with tempfile.TemporaryDirectory() as folder:
        for name, n_channels in channels.items():
            file, rate = Path(folder) / name, int(name.split(".")[0])
            generator = torch.Generator().manual_seed(0)
            noise = torch.randn(30 * rate, n_channels, generator=generator) * 0.1
            soundfile.write(file, noise.numpy(), rate)
            work = lambda: audio.log_mel([audio.load_audio(file, 30)], 80)
            first, *rest = [timed(work, device)[1] for _ in range(1 + s.repeats)]
            speed = 30 / statistics.median(rest)
            result[name] = {"times_real_time": speed, "first_seconds": first}
    torch.set_num_threads(threads)
    return result


OURS = """
import torch
from llama import Llama
from tokenizer import Tokenizer
from whisper import Whisper
Tokenizer({llm!r})
Llama.from_pretrained({llm!r}, {dtype}, {device!r})
Whisper.from_pretrained({whisper!r}, {dtype}, {device!r})
"""
PEER = """
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers import WhisperForConditionalGeneration, WhisperProcessor
AutoTokenizer.from_pretrained({llm!r})
AutoModelForCausalLM.from_pretrained({llm!r}, dtype={dtype}).to({device!r})
WhisperProcessor.from_pretrained({whisper!r})
WhisperForConditionalGeneration.from_pretrained({whisper!r}, dtype={dtype}).to({device!r})
"""


def bench_load(s, device, dtype):
    """Fresh processes: import, then SmolLM2 and tiny.en with their tokenizers, ready to use."""
    names = dict(llm=str(s.llm), whisper=str(s.whisper), dtype=dtype, device=str(device))
    programs = {"ours": OURS.format(**names), "peer": PEER.format(**names)}
    programs["torch alone"] = "import torch"
    root = str(Path(__file__).resolve().parent.parent)
    place = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": root}
    times = {name: [] for name in programs}
    for i in range(s.repeats + 1):  # the first round fills the page cache
        for name, program in programs.items():
            command = [sys.executable, "-c", program]
            clock, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run(command, check=True, capture_output=True, env=place)
            spent, after = time.perf_counter() - clock, resource.getrusage(resource.RUSAGE_CHILDREN)
            cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            times[name] += [(spent, cpu)] if i else []
    medians = {name: [*map(statistics.median, zip(*turns))] for name, turns in times.items()}
    clock, cpu = ({name: median[k] for name, median in medians.items()} for k in (0, 1))
    return {
        "seconds": clock,
        "cpu_seconds": cpu,
        "ratio": clock["peer"] / clock["ours"],
        "cpu_ratio": cpu["peer"] / cpu["ours"],
    }


# --------------------------------------------------------------------------------------------------

BENCHES = {
    "generate": bench_generate,
    "train": bench_train,
    "encode": bench_encode,
    "audio": bench_audio,
    "load": bench_load,
    "growth": bench_growth,
}


def main():
    which = next((name for name in sys.argv[1:2] if name in BENCHES), None)
    s = run.parse_settings(Settings, __doc__, sys.argv[2 if which else 1 :])
    if which is None:
        raise ValueError(f"say which: python tools/bench.py {'|'.join(BENCHES)}")
    device = run.start_processes()[2]
    device = torch.device(s.device) if s.device else device
    torch.manual_seed(0)  # the same random weights in every process
    dtype = getattr(torch, s.dtype) if s.dtype else run.compute_dtype(device)
    hardware = f"CPU, {torch.get_num_threads()} of {os.cpu_count()} threads"
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    result = {
        "bench": which,
        "llm": s.llm,
        "whisper": s.whisper,
        "device": f"{WORLD} × {hardware}" if WORLD > 1 else hardware,
        "dtype": str(dtype),
        "torch": torch.__version__,
    }
    result |= BENCHES[which](s, device, dtype)
    result |= {"load_average": os.getloadavg()[0], "time": time.strftime("%F %T")}
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
    run.main(main)
