"""
llama.py: the frozen LLM, written by hand: decoder-only transformer, loading, batched generation.

Reads any Hugging Face folder of the Llama family (Llama-3.1/3.2, SmolLM2) and its two close relatives, Qwen2.5 (q/k/v
biases) and Qwen3 (q/k norms), which differ by fields of config.json only. Attribute names below are the names in
the official safetensors files, so that no mapping table stands between the file and the code.

    python llama.py "Why is the sky blue?"                       # weights/smollm2-135m-instruct, made by demo/prepare.py
    python llama.py "Why is the sky blue?" --llm DIR --temperature 0.7
"""

import argparse
import math
import sys
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from tokenizer import Tokenizer, read_json

# ----------------------------------------------------------------------------------------------------------------------
# Model


@dataclass
class LlamaConfig:
    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_ff: int
    norm_eps: float
    rope_theta: float
    rope_scaling: dict | None  # Llama-3.1 and later
    tie_embeddings: bool
    qkv_bias: bool = False  # Qwen2.5
    qk_norm: bool = False  # Qwen3

    @classmethod
    def from_json(cls, path):
        """Read config.json as transformers 4 (rope_theta, rope_scaling) or 5 (rope_parameters) writes it."""
        c = read_json(path)
        family = c.get("model_type")
        if family not in ("llama", "qwen2", "qwen3") or c.get("hidden_act", "silu") != "silu":
            raise ValueError(f"{path}: model_type {family!r} is not supported (llama, qwen2, qwen3 with silu are)")
        if c.get("use_sliding_window") or c.get("mlp_bias") or (family != "qwen2" and c.get("attention_bias")):
            raise ValueError(f"{path}: sliding windows, mlp_bias and attention_bias are not supported")
        rope = c.get("rope_parameters") or (c.get("rope_scaling") or {})
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind not in ("default", "llama3"):
            raise ValueError(f"{path}: rope_type {kind!r} is not supported (default and llama3 are)")
        return cls(
            vocab_size=c["vocab_size"],
            d_model=c["hidden_size"],
            n_layers=c["num_hidden_layers"],
            n_heads=c["num_attention_heads"],
            n_kv_heads=c.get("num_key_value_heads") or c["num_attention_heads"],
            head_dim=c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"],
            d_ff=c["intermediate_size"],
            norm_eps=c["rms_norm_eps"],
            rope_theta=rope.get("rope_theta") or c.get("rope_theta", 10000.0),
            rope_scaling=rope if kind == "llama3" else None,
            tie_embeddings=c.get("tie_word_embeddings", False),
            qkv_bias=family == "qwen2",
            qk_norm=family == "qwen3",
        )


def rope_frequencies(config, device=None):
    """Angle per position of each pair of channels, float32. shape = (head_dim / 2,)

    Llama-3.1 stretches the slow pairs for long contexts: wavelengths beyond original/low_freq_factor are multiplied by
    `factor`, those under original/high_freq_factor are kept, those between are blended (modeling_rope_utils.py).
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64, device=device).float() / config.head_dim
    freqs = 1.0 / config.rope_theta**exponents
    if s := config.rope_scaling:
        low, high = s["low_freq_factor"], s["high_freq_factor"]
        turns = s["original_max_position_embeddings"] * freqs / (2 * math.pi)  # rotations within the old context
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        freqs = keep * freqs + (1 - keep) * freqs / s["factor"]
    return freqs


def rotate(x, cos, sin):
    """Rotary position embedding, Hugging Face layout: channel i pairs with i + head_dim/2. x: (B, heads, T, head_dim)"""
    x1, x2 = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-x2, x1), dim=-1) * sin


# The weights come from a file. To initialize them first, even on the meta device, would import 800 modules (sympy …): 1.3 s.
Linear, Embedding = (type(c.__name__, (c,), {"reset_parameters": lambda self: None}) for c in (nn.Linear, nn.Embedding))


class RMSNorm(nn.Module):
    def __init__(self, dim, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.empty(dim)), eps

    def forward(self, x):  # statistics in float32, whatever x is
        return self.weight * F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype)


def causal_bias(positions, n_keys, dtype):
    """Added to attention scores: 0 for keys up to a query's position, -inf beyond. positions: (B, T). shape = (B, 1, T, n_keys)"""
    hidden = torch.arange(n_keys, device=positions.device) > positions[:, None, :, None]
    return torch.zeros(hidden.shape, dtype=dtype, device=positions.device).masked_fill_(hidden, -torch.inf)


def attend(q, k, v, bias=None, prefix=None, fused=None):
    """Attention of q (B, n_heads, T, head_dim) to k, v (B, n_kv_heads, S, head_dim), n_heads / n_kv_heads query heads sharing each k, v.

    bias: see causal_bias; None: plain causal attention. Right-padded rows need nothing more. prefix: further k, v (1, n_kv_heads, P, head_dim)
    that every query sees, of every row. fused: by PyTorch's kernels, by default on GPUs.
    """
    fused = q.is_cuda if fused is None else fused
    B, H, T, head_dim = q.shape
    G, S = k.shape[1:3]
    if bias is None and (prefix or not fused):
        bias = causal_bias(torch.arange(T, device=q.device)[None], S, q.dtype)
    if prefix and T > 1:  # many queries a row: copied in front of every row's keys
        k, v = (torch.cat((old.expand(B, -1, -1, -1), new), dim=2) for old, new in zip(prefix, (k, v)))
        bias, prefix, S = F.pad(bias, (k.shape[2] - S, 0)), None, k.shape[2]
    if bias is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    # The query heads of one group become further query positions of their shared head: K and V are never copied per head.
    q = q.reshape(B, G, H // G * T, head_dim)
    if fused and not prefix:  # the memory-efficient kernel: the flash kernel takes no bias, and this one no grouped heads
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.repeat(1, 1, H // G, 1)).view(B, H, T, head_dim)
    # On CPUs plain products are faster at the lengths of a prompt: the backward pass of the fused bf16 kernel takes 5 times as long.
    q = q * head_dim**-0.5
    scores = ((q @ k.transpose(-1, -2)).view(B, G, H // G, T, S) + bias[:, :, None]).view(B, G, -1, S)
    if not prefix:
        return (scores.softmax(-1) @ v).view(B, H, T, head_dim)
    # One query a row: those of all rows look at the prefix together, in one product that reads it once.
    old_k, old_v = prefix
    together = lambda t: t.transpose(0, 1).reshape(1, G, -1, t.shape[-1])  # (B, G, H/G, …) -> (1, G, B * H/G, …)
    apart = lambda t: t.view(G, B, -1, t.shape[-1]).transpose(0, 1)
    scores = torch.cat((apart(together(q) @ old_k.transpose(-1, -2)), scores), dim=-1)  # (B, G, H/G, P + S)
    old_weights, weights = scores.softmax(-1).split((old_k.shape[2], S), dim=-1)
    return (weights @ v + apart(together(old_weights) @ old_v)).view(B, H, T, head_dim)


class Prefix(list):
    """Keys and values, layer by layer, of tokens that many rows start with: one pass with it as its cache fills it."""

    def attend(self, layer, q, k, v):
        self.append((k.contiguous(), v.contiguous()))  # (1, n_kv_heads, P, head_dim)
        return attend(q, k, v)


class Attention(nn.Module):
    """Grouped-query attention: n_heads query heads share n_kv_heads key/value heads."""

    def __init__(self, c):
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = c.n_heads, c.n_kv_heads, c.head_dim
        self.q_proj = Linear(c.d_model, c.n_heads * c.head_dim, bias=c.qkv_bias)
        self.k_proj = Linear(c.d_model, c.n_kv_heads * c.head_dim, bias=c.qkv_bias)
        self.v_proj = Linear(c.d_model, c.n_kv_heads * c.head_dim, bias=c.qkv_bias)
        self.o_proj = Linear(c.n_heads * c.head_dim, c.d_model, bias=False)
        self.q_norm = RMSNorm(c.head_dim, c.norm_eps) if c.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(c.head_dim, c.norm_eps) if c.qk_norm else nn.Identity()

    def forward(self, x, cos, sin, cache=None, layer=None):
        B, T, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(B, T, self.n_heads, self.head_dim)).transpose(1, 2)  # (B, heads, T, head_dim)
        k = self.k_norm(self.k_proj(x).view(B, T, self.n_kv_heads, self.head_dim)).transpose(1, 2)
        v = self.v_proj(x).view(B, T, self.n_kv_heads, self.head_dim).transpose(1, 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        out = attend(q, k, v) if cache is None else cache.attend(layer, q, k, v)
        return self.o_proj(out.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate_proj = Linear(c.d_model, c.d_ff, bias=False)
        self.up_proj = Linear(c.d_model, c.d_ff, bias=False)
        self.down_proj = Linear(c.d_ff, c.d_model, bias=False)

    def forward(self, x):  # SwiGLU
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.input_layernorm = RMSNorm(c.d_model, c.norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.d_model, c.norm_eps)
        self.mlp = MLP(c)

    def forward(self, x, cos, sin, cache=None, layer=None):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, cache, layer)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """Decoder-only transformer. Frozen: its weights never need a gradient, only its inputs do."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.model = nn.Module()  # the official files prefix everything but the head with "model."
        self.model.embed_tokens = Embedding(c.vocab_size, c.d_model)
        self.model.layers = nn.ModuleList(Block(c) for _ in range(c.n_layers))
        self.model.norm = RMSNorm(c.d_model, c.norm_eps)
        self.lm_head = Linear(c.d_model, c.vocab_size, bias=False)
        self.sharded = False  # see shard_blocks
        self.checkpoint_activations = False  # keep each block's input only, and compute the rest again on the way back

    @classmethod
    def from_pretrained(cls, folder, dtype=torch.float32, device="cpu", shard=False):
        """Build on the meta device (no memory), then put each tensor of the files in its place. shard: see shard_blocks."""
        with torch.device("meta"):
            llm = cls(LlamaConfig.from_json(Path(folder) / "config.json")).requires_grad_(False)
        if llm.config.tie_embeddings:
            llm.lm_head.weight = llm.model.embed_tokens.weight
        if shard:
            shard_blocks(llm, device)
        load_weights(llm, folder, dtype, device)
        return llm.eval().requires_grad_(False)

    def rope(self, positions):
        """cos and sin for positions (B or 1, T), computed in float32, in the compute dtype. shape = (B, 1, T, head_dim)"""
        angles = positions[..., None].float() * rope_frequencies(self.config, positions.device)
        angles = torch.cat((angles, angles), dim=-1)[:, None]
        dtype = self.model.embed_tokens.weight.dtype
        return angles.cos().to(dtype), angles.sin().to(dtype)

    def embed(self, ids):
        return F.embedding(ids, self.model.embed_tokens.weight)

    def hidden_states(self, x, cache=None, positions=None):
        """What the output head reads. x: embeddings (B, T, d_model) -> (B, T, d_model), after the final norm."""
        T = x.shape[1]
        cos, sin = self.rope(torch.arange(T, device=x.device)[None] if positions is None else positions)
        for i, block in enumerate(self.model.layers):
            if self.checkpoint_activations and torch.is_grad_enabled():
                x = checkpoint(block, x, cos, sin, cache, i, use_reentrant=False)
            else:
                x = block(x, cos, sin, cache, i)
        return self.model.norm(x)

    def forward(self, x):
        """Token ids (B, T) or embeddings (B, T, d_model) -> logits (B, T, vocab_size). Rows are right-padded, if at all."""
        x = x if x.is_floating_point() else self.embed(x)
        return self.lm_head(self.hidden_states(x))


def shard_blocks(llm, device):
    """FSDP2: of every block each process keeps 1 / world size, and all gather it when its turn comes, forward and backward.

    So all processes must run hidden_states, and its backward pass, equally often. Embeddings and head stay whole.
    """
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method  # here: it takes half as long to import as torch

    mesh = init_device_mesh(torch.device(device).type, (dist.get_world_size(),))
    for block in llm.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(llm, mesh=mesh, ignored_params={llm.model.embed_tokens.weight, llm.model.norm.weight, llm.lm_head.weight})
    register_fsdp_forward_method(llm, "hidden_states")  # the root's: the next block is gathered while this one computes
    llm.sharded = True


def add_lora(llm, rank, dropout=0.0):
    """Beside W x in the q, k and v projections, a trained B A x of low rank (the paper's comparison; alpha = rank, so its scale is 1).

    B starts at 0, so at first nothing changes. The parameters get peft's names, ….q_proj.lora_A.default.weight, as in the official files.
    """

    def correct(linear, inputs, output):
        x = F.dropout(inputs[0], dropout, linear.training)
        return output + F.linear(F.linear(x, linear.lora_A["default"].weight.to(x.dtype)), linear.lora_B["default"].weight.to(x.dtype))

    device = llm.model.embed_tokens.weight.device
    for block in llm.model.layers:
        for linear in (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj):
            linear.lora_A = nn.ModuleDict({"default": nn.Linear(linear.in_features, rank, bias=False, device=device)})
            linear.lora_B = nn.ModuleDict({"default": nn.Linear(rank, linear.out_features, bias=False, device=device)})
            nn.init.zeros_(linear.lora_B["default"].weight)
            linear.register_forward_hook(correct)


def load_weights(module, folder, dtype, device):
    """Fill `module` (built on meta) from folder/model*.safetensors, one tensor at a time: nothing exists twice.

    Errors: FileNotFoundError without weights; ValueError listing every missing, unknown or misshapen tensor.
    """
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    names = sorted(set(read_json(index)["weight_map"].values())) if index.exists() else ["model.safetensors"]
    parameters = dict(module.named_parameters(remove_duplicate=False))
    tied = {name for name in parameters if name == "lm_head.weight" and module.config.tie_embeddings}
    missing, unknown, misshapen, loaded = set(parameters) - tied, [], [], {}
    for file in (folder / name for name in names):
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing: make the demo's weights with `python demo/prepare.py`, or download it")
        try:
            with safe_open(file, framework="pt", device=str(device)) as tensors:
                for name in tensors.keys():
                    if name not in parameters:
                        unknown.append(name)
                    elif tensors.get_slice(name).get_shape() != list(parameters[name].shape):
                        shape, wanted = tensors.get_slice(name).get_shape(), list(parameters[name].shape)
                        misshapen.append(f"{name} {shape}, expected {wanted}")
                    elif name not in tied:
                        loaded[name] = tensors.get_tensor(name).to(dtype)
                        if hasattr(p := parameters[name], "placements"):  # a DTensor: this process's part; the whole tensor is let go
                            from torch.distributed.tensor import distribute_tensor

                            loaded[name] = distribute_tensor(loaded[name], p.device_mesh, p.placements, src_data_rank=None)
                    missing.discard(name)
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged ({error}): download or make it again") from None
    problems = {"missing": sorted(missing), "unknown": sorted(unknown), "wrong shape": misshapen}
    if any(problems.values()):
        lists = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in problems.items() if names)
        raise ValueError(f"{folder}: the weights do not fit config.json. {lists}")
    module.load_state_dict(loaded, strict=False, assign=True)
    if tied:
        module.lm_head.weight = module.model.embed_tokens.weight


# ----------------------------------------------------------------------------------------------------------------------
# Generation: continuous batching over one cache.
#
# A step of decoding reads every weight once, whatever the batch, so throughput is won by keeping many rows in flight. Each
# row owns one slot of the cache, and the rows in flight are always the first slots: a finished row's slot is taken
# over by the last one, so nothing is computed for rows that are done. When an eighth of the slots are free, the next prompts
# are prefilled into them together. What all prompts begin with (the system prompt) is prefilled, kept and read once for all.


class KVCache:
    """Keys and values of the rows in flight: what follows the shared prefix. A token's place in its row's slot is its position after the prefix."""

    def __init__(self, config, n_slots, prefix, dtype, device):
        empty = torch.empty(n_slots, config.n_kv_heads, 0, config.head_dim, dtype=dtype, device=device)
        self.layers = [[empty, empty] for _ in range(config.n_layers)]  # k, v
        self.prefix = prefix

    def fit(self, length):
        """Make slots long enough, and not much longer: decoding reads them whole. For a part of a slot is not contiguous in
        memory, and the batched product of CPUs would copy it every time (2.3 instead of 0.6 ms per layer, 64 rows of 200 tokens)."""
        n_slots, G, size, head_dim = self.layers[0][0].shape
        if not size - 128 < length <= size:
            fitting = -(-length // 64) * 64
            zeros = self.layers[0][0].new_zeros(n_slots, G, max(0, fitting - size), head_dim)  # a masked key must still be a number
            for layer in self.layers:  # one after the other: the cache never exists twice
                layer[:] = [torch.cat((t[:, :, :fitting], zeros), dim=2) for t in layer]

    def aim(self, first, places):
        """The next pass computes these places (B, T) of the slots first, first + 1, …"""
        self.rows = slice(first, first + len(places))
        self.at = torch.arange(first, first + len(places), device=places.device)[:, None], slice(None), places
        # None: a fresh prompt sees the prefix and itself, nothing that is stored
        self.bias = causal_bias(places, self.layers[0][0].shape[2], self.layers[0][0].dtype) if places.shape[1] == 1 else None

    def attend(self, layer, q, k, v):
        """Store this pass's k, v (B, n_kv_heads, T, head_dim), and let its queries attend to all that their slots hold."""
        all_k, all_v = self.layers[layer]
        all_k[self.at], all_v[self.at] = k.transpose(1, 2), v.transpose(1, 2)
        if self.bias is not None:
            k, v = all_k[self.rows], all_v[self.rows]
        return attend(q, k, v, self.bias, self.prefix[layer] if self.prefix else None)

    def move(self, source, target):
        for k, v in self.layers:
            k[target], v[target] = k[source], v[source]


def sample(logits, temperature, top_p, uniform):
    """Next token per row. logits (B, vocab), uniform (B,) in [0, 1): a row's draw depends on its own number only."""
    logits = logits.float()  # also because argmax in bf16 takes four times as long on CPUs
    if temperature == 0:
        return logits.argmax(-1)
    probs = (logits / temperature).softmax(-1)
    order = None
    if top_p < 1:  # the smallest set of tokens, most likely first, that holds top_p of the probability
        probs, order = probs.sort(-1, descending=True)
        probs = probs * (probs.cumsum(-1) - probs < top_p)
    cumulative = probs.cumsum(-1)
    choice = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)
    choice = choice.clamp(max=logits.shape[-1] - 1)
    return (choice if order is None else order.gather(-1, choice)).squeeze(-1)


def common_prefix(prompts):
    """How many leading tokens (or embeddings) all prompts share, at most all but the last one of the shortest."""
    n = min(len(p) for p in prompts) - 1
    for p in prompts[1:]:
        same = p[:n] == prompts[0][:n]
        same = same.all(-1) if same.dim() == 2 else same
        n = int(same.long().cumprod(0).sum())
    return n


@torch.inference_mode()
def generate(llm, prompts, max_new_tokens=128, temperature=0.0, top_p=1.0, stop_ids=(), seed=0, batch_size=64, progress=False):
    """Continue every prompt. -> list of token id lists; one that ended by itself ends with its stop id.

    prompts: id lists, or embedding tensors (T, d_model), of any lengths. temperature 0 is greedy. seed: an int, or
    one int per prompt: a row's draws depend on its seed alone, never on its neighbours or on batch_size.
    """
    device, dtype = llm.model.embed_tokens.weight.device, llm.model.embed_tokens.weight.dtype
    prompts = [torch.as_tensor(p, device=device) for p in prompts]
    if max_new_tokens < 1 or not temperature >= 0 or not 0 < top_p <= 1 or batch_size < 1:
        raise ValueError("generate: max_new_tokens and batch_size must be at least 1, temperature at least 0, top_p above 0 and at most 1")
    if not prompts:
        return []
    if min(len(p) for p in prompts) == 0:
        raise ValueError("generate: a prompt is empty")
    seeds = [seed * 1_000_003 + i for i in range(len(prompts))] if isinstance(seed, int) else seed
    as_embeddings = lambda p: p.to(dtype) if p.is_floating_point() else llm.embed(p)

    # Longest first: neighbours in a prefill have like lengths (little padding), and so have the rows in flight.
    waiting = deque(sorted(range(len(prompts)), key=lambda i: -len(prompts[i])))
    n_slots = min(batch_size, len(prompts))
    group = max(1, n_slots // 8)  # prompts prefilled together: enough for an efficient product, few enough to refill often
    rows = []  # rows[s]: the prompt that slot s works on
    answers, draws = [[] for _ in prompts], {}
    bar = tqdm(total=len(prompts), desc="generate", unit="row", disable=not progress, leave=False)
    n_tokens = 0

    P, prefix = common_prefix(prompts) if len(prompts) > 1 else 0, Prefix()
    if P:
        llm.hidden_states(as_embeddings(prompts[0][:P])[None], prefix)
    cache = KVCache(llm.config, n_slots, prefix, dtype, device)
    held = lambda r: len(prompts[r]) - P + len(answers[r])  # tokens after the prefix, the one to be chosen next not counted

    while rows or waiting:
        if waiting and n_slots - len(rows) >= group:  # prefill
            first, new = len(rows), [waiting.popleft() for _ in range(min(group, len(waiting)))]
            parts = [as_embeddings(prompts[r][P:]) for r in new]
            x = nn.utils.rnn.pad_sequence(parts, batch_first=True)  # (rows, T, d_model), right-padded
            last = torch.tensor([len(part) - 1 for part in parts], device=device)
            places = torch.arange(x.shape[1], device=device).expand(len(new), -1)
            rows += new
        else:  # decode: the token that was chosen last, for all rows in flight
            first = 0
            x = llm.embed(torch.tensor([[answers[r][-1]] for r in rows], device=device))
            last = torch.zeros(len(rows), dtype=torch.long, device=device)
            places = torch.tensor([[held(r) - 1] for r in rows], device=device)
        cache.fit(max(map(held, rows)))
        cache.aim(first, places)
        hidden = llm.hidden_states(x, cache, P + places)[torch.arange(len(x), device=device), last]  # (rows, d_model)
        uniform = None
        if temperature > 0:
            for r in rows[first:]:
                if r not in draws:
                    draws[r] = torch.rand(max_new_tokens, generator=torch.Generator().manual_seed(seeds[r]))
            uniform = torch.stack([draws[r][len(answers[r])] for r in rows[first:]]).to(device)
        tokens = sample(llm.lm_head(hidden), temperature, top_p, uniform).tolist()
        n_tokens += len(tokens)
        for s, token in reversed(list(enumerate(tokens, start=first))):  # from the back: what moves into a hole is never finished itself
            answers[rows[s]].append(token)
            if token in stop_ids or len(answers[rows[s]]) == max_new_tokens:
                draws.pop(rows[s], None)
                end = rows.pop()
                if s < len(rows):
                    cache.move(len(rows), s)
                    rows[s] = end
                bar.update()
        bar.set_postfix_str(f"{n_tokens / max(1e-9, bar.format_dict['elapsed']):.0f} tokens/s", refresh=False)
    bar.close()
    return answers


def main():
    parser = argparse.ArgumentParser(description="Ask the LLM alone, without audio.")
    parser.add_argument("prompt")
    parser.add_argument("--llm", default="weights/smollm2-135m-instruct", help="Hugging Face folder")
    parser.add_argument("--max_new_tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    args = parser.parse_args()
    tokenizer = Tokenizer(args.llm)
    llm = Llama.from_pretrained(args.llm)
    ids = tokenizer.encode(tokenizer.apply_chat_template([{"role": "user", "content": args.prompt}]))
    answer = generate(llm, [ids], args.max_new_tokens, args.temperature, stop_ids=tokenizer.stop_ids)[0]
    print(tokenizer.decode(answer))


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
