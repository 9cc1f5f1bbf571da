"""
llama.py: the frozen LLM, written by hand: a decoder-only transformer, and its loading.

Reads any Hugging Face folder of the Llama family (Llama-3.1/3.2, SmolLM2) and its two close
relatives, Qwen2.5 (q/k/v biases) and Qwen3 (q/k norms), which differ by fields of config.json only.
Attribute names are those in the official safetensors files, so that no mapping table stands between
the file and the code. `generate`, batched, comes from engine/decode.py.

    python llama.py "Why is the sky blue?"                      # the demo's LLM, without audio
    python llama.py "Why is the sky blue?" --llm DIR --temperature 0.7
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from engine import run
from engine.attention import attend
from engine.decode import generate
from engine.run import argument, compute_dtype, default_device, setting
from engine.weights import Embedding, Linear, load_weights, read_json, shard_blocks
from tokenizer import Tokenizer

# --------------------------------------------------------------------------------------------------
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
        """Read config.json as transformers 4 (rope_theta, rope_scaling) or 5 (rope_parameters)
        writes it.
        """
        c = read_json(path)
        family = c.get("model_type")
        if family not in ("llama", "qwen2", "qwen3") or c.get("hidden_act", "silu") != "silu":
            supported = "llama, qwen2 and qwen3 with silu are"
            raise ValueError(f"{path}: model_type {family!r} is not supported; {supported}")
        extras = ["use_sliding_window", "mlp_bias"] + ["attention_bias"] * (family != "qwen2")
        if on := [name for name in extras if c.get(name)]:
            raise ValueError(f"{path}: {', '.join(on)} is not supported")
        rope = c.get("rope_parameters") or (c.get("rope_scaling") or {})
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind not in ("default", "llama3"):
            raise ValueError(f"{path}: rope_type {kind!r} is not supported; default and llama3 are")
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

    Llama-3.1 stretches the slow pairs for long contexts: wavelengths beyond
    original/low_freq_factor are multiplied by `factor`, those under original/high_freq_factor are
    kept, those between are blended (modeling_rope_utils.py).
    """
    channels = torch.arange(0, config.head_dim, 2, dtype=torch.int64, device=device)
    freqs = 1.0 / config.rope_theta ** (channels.float() / config.head_dim)
    if s := config.rope_scaling:
        low, high = s["low_freq_factor"], s["high_freq_factor"]
        # rotations within the old context
        turns = s["original_max_position_embeddings"] * freqs / (2 * math.pi)
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        freqs = keep * freqs + (1 - keep) * freqs / s["factor"]
    return freqs


def rotate(x, cos, sin):
    """Rotary position embedding of x (B, heads, T, head_dim).

    Hugging Face layout: channel i pairs with i + head_dim/2.
    """
    x1, x2 = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-x2, x1), dim=-1) * sin


class RMSNorm(nn.Module):
    def __init__(self, dim, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.empty(dim)), eps

    def forward(self, x):  # statistics in float32, whatever x is
        return self.weight * F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype)


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
        q = self.q_norm(self.q_proj(x).view(B, T, self.n_heads, self.head_dim))
        k = self.k_norm(self.k_proj(x).view(B, T, self.n_kv_heads, self.head_dim))
        v = self.v_proj(x).view(B, T, self.n_kv_heads, self.head_dim)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, heads, T, head_dim)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        out = attend(q, k, v, causal=True) if cache is None else cache.attend(layer, q, k, v)
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
    """Decoder-only transformer. Its weights are frozen (but with --lora_rank and --train_llm):
    they need no gradient, only its inputs do.
    """

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.model = nn.Module()  # the official files prefix everything but the head with "model."
        self.model.embed_tokens = Embedding(c.vocab_size, c.d_model)
        self.model.layers = nn.ModuleList(Block(c) for _ in range(c.n_layers))
        self.model.norm = RMSNorm(c.d_model, c.norm_eps)
        self.lm_head = Linear(c.d_model, c.vocab_size, bias=False)
        self.sharded = False  # see shard_blocks
        self.lanes = None  # see engine.decode.fixed_lanes
        # keep each block's input only, and compute the rest again on the way back
        self.checkpoint_activations = False

    @classmethod
    def from_pretrained(cls, folder, dtype=torch.float32, device="cpu", shard=False):
        """A frozen LLM from a Hugging Face folder. shard: see engine.weights.shard_blocks."""
        with torch.device("meta"):  # no memory, until each tensor of the files is put in its place
            llm = cls(LlamaConfig.from_json(Path(folder) / "config.json")).requires_grad_(False)
        tied = {"lm_head.weight"} if llm.config.tie_embeddings else set()
        if tied:
            llm.lm_head.weight = llm.model.embed_tokens.weight
        if shard:
            shard_blocks(llm, device)
        load_weights(llm, folder, dtype, device, tied=tied)
        if tied:
            llm.lm_head.weight = llm.model.embed_tokens.weight
        return llm.eval().requires_grad_(False)

    def rope(self, positions):
        """cos and sin for positions (B or 1, T). shape = (B or 1, 1, T, head_dim)

        Computed in float32, returned in the compute dtype.
        """
        angles = positions[..., None].float() * rope_frequencies(self.config, positions.device)
        angles = torch.cat((angles, angles), dim=-1)[:, None]
        dtype = self.model.embed_tokens.weight.dtype
        return angles.cos().to(dtype), angles.sin().to(dtype)

    def embed(self, ids):
        return F.embedding(ids, self.model.embed_tokens.weight)

    def hidden_states(self, x, cache=None, positions=None):
        """Embeddings (B, T, d_model) -> what the output head reads (B, T, d_model), after the norm.

        cache: has attend(layer, q, k, v), which takes the place of causal attention.
        positions (B or 1, T): by default 0 … T - 1.
        """
        if positions is None:
            positions = torch.arange(x.shape[1], device=x.device)[None]
        cos, sin = self.rope(positions)
        for i, block in enumerate(self.model.layers):
            if self.checkpoint_activations and torch.is_grad_enabled():
                x = checkpoint(block, x, cos, sin, cache, i, use_reentrant=False)
            else:
                x = block(x, cos, sin, cache, i)
        return self.model.norm(x)

    def forward(self, x):
        """Token ids (B, T) or embeddings (B, T, d_model) -> logits (B, T, vocab_size).

        Rows are padded on the right, if at all.
        """
        x = x if x.is_floating_point() else self.embed(x)
        return self.lm_head(self.hidden_states(x))


def add_lora(llm, rank, dropout=0.0):
    """The paper's comparison: beside W x in the q, k and v projections, a trained B A x of low rank.

    B starts at 0, so at first nothing changes. alpha = rank, so the scale is 1. The parameters get
    peft's names, ….q_proj.lora_A.default.weight, as in the official files.
    """

    def add_low_rank(linear, inputs, output):
        x = F.dropout(inputs[0], dropout, linear.training)
        x = F.linear(x, linear.lora_A["default"].weight.to(x.dtype))
        return output + F.linear(x, linear.lora_B["default"].weight.to(x.dtype))

    device = llm.model.embed_tokens.weight.device
    for block in llm.model.layers:
        attention = block.self_attn
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
            A = nn.Linear(linear.in_features, rank, bias=False, device=device)
            B = nn.Linear(rank, linear.out_features, bias=False, device=device)
            nn.init.zeros_(B.weight)
            linear.lora_A = nn.ModuleDict({"default": A})
            linear.lora_B = nn.ModuleDict({"default": B})
            linear.register_forward_hook(add_low_rank)


# --------------------------------------------------------------------------------------------------


@dataclass
class Settings:
    prompt: str = argument("the question")
    llm: str = setting("weights/smollm2-135m-instruct", "Hugging Face folder")
    max_new_tokens: int = setting(128, "the answer is cut here", low=1)
    temperature: float = setting(0.0, "0 is greedy", high=100)


def main():
    s = run.parse_settings(Settings, "Ask the LLM alone, without audio.")
    device = default_device()
    tokenizer = Tokenizer(s.llm)
    llm = Llama.from_pretrained(s.llm, compute_dtype(device), device)
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": s.prompt}])
    ids, stop_ids = tokenizer.encode(prompt), tokenizer.stop_ids
    print(
        tokenizer.decode(
            generate(llm, [ids], s.max_new_tokens, s.temperature, stop_ids=stop_ids)[0]
        )
    )


if __name__ == "__main__":
    run.main(main)
