"""
qformer.py: the adapter, the only part of DeSTA2.5-Audio that learns (paper section 3; 131.5M parameters at full size).

A few learned queries per encoder tap look at that tap's 1500 audio frames through cross-attention and come out as 64 vectors
that the LLM reads like token embeddings. The layers are BERT's, used as a decoder: self-attention among the queries
(bidirectional: queries have no order), cross-attention to the audio, feed-forward, each followed by its LayerNorm.

Attribute names spell the official checkpoint: "perception.connector." + a name of this module's state_dict.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass
class QFormerConfig:
    d_model: int  # Whisper's width; also the Q-Former's
    n_heads: int  # Whisper's heads
    d_llm: int  # width of the LLM's embeddings
    n_layers: int = 6
    n_queries: int = 64  # per tap, and after mixing
    n_taps: int = 4
    d_ff: int = 3072  # BERT-base's, whatever the width: the official code never sets it
    dropout: float = 0.1  # on attention probabilities and on outputs


class Linear(nn.Linear):
    """Trained in float32, computed in the dtype of its input."""

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


class LayerNorm(nn.LayerNorm):
    """Always float32 inside."""

    def forward(self, x):
        return super().forward(x.float()).to(x.dtype)


class Residual(nn.Module):
    """BERT's "output": Linear, dropout, add, then LayerNorm (post-norm)."""

    def __init__(self, d_in, d_out, dropout):
        super().__init__()
        self.dense, self.LayerNorm, self.dropout = Linear(d_in, d_out), LayerNorm(d_out, eps=1e-12), dropout

    def forward(self, x, residual):
        return self.LayerNorm(residual + F.dropout(self.dense(x), self.dropout, self.training))


class Attention(nn.Module):
    """Queries among themselves."""

    def __init__(self, c):
        super().__init__()
        self.n_heads, self.dropout = c.n_heads, c.dropout
        self.self = nn.ModuleDict({name: Linear(c.d_model, c.d_model) for name in ("query", "key", "value")})
        self.output = Residual(c.d_model, c.d_model, c.dropout)

    def forward(self, x):
        B, N, D = x.shape
        q, k, v = (self.self[name](x).view(B, N, self.n_heads, -1).transpose(1, 2) for name in ("query", "key", "value"))  # (B, heads, N, head_dim)
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # so few that fused attention is slower
        weights = scores.softmax(-1)
        out = F.dropout(weights, self.dropout, self.training) @ v
        return self.output(out.transpose(1, 2).reshape(B, N, D), x)


ONES = 8  # channels added to the frames: a one, which carries the biases, and zeros, because products want widths that 8 divides


def with_ones(audio):
    audio = F.pad(audio, (0, ONES))
    audio[..., -ONES] = 1
    return audio


class CrossAttention(Attention):
    """Queries of x (B, N, d_model) look at audio frames (B, T, d_model + ONES), see with_ones.

    Keys and values of the frames are never made. Per head, q · (W a) = (Wᵀ q) · a, so the few queries go through W instead of the 1500
    frames, and sum p (W a) = W (sum p a). Forward that is the same work when heads × N = d_model, as in the official model, and
    less with fewer queries; backward it is less always, for the frames need no gradient. On a CPU it is 1.7 times as fast as
    keys, values and fused attention (LOG.md).
    """

    def per_head(self, name, dtype):
        """The weight with its bias as the column that meets the ones. shape = (n_heads, head_dim, d_model + ONES)"""
        linear = self.self[name]
        weight = F.pad(torch.cat([linear.weight, linear.bias[:, None]], dim=1), (0, ONES - 1))
        return weight.view(self.n_heads, -1, weight.shape[1]).to(dtype)

    def forward(self, x, audio):
        B, N, D = x.shape
        H, head_dim = self.n_heads, D // self.n_heads
        q = self.self["query"](x).view(B * N, H, head_dim).transpose(0, 1) * head_dim**-0.5
        q = q @ self.per_head("key", x.dtype)  # (H, B * N, D + ONES)
        q = q.view(H, B, N, -1).transpose(0, 1).reshape(B, H * N, -1)
        weights = (q @ audio.transpose(1, 2)).softmax(-1)  # (B, H * N, T)
        weights = F.dropout(weights, self.dropout, self.training)
        seen = (weights @ audio).view(B, H, N, -1).transpose(0, 1).reshape(H, B * N, -1)
        out = seen @ self.per_head("value", x.dtype).transpose(1, 2)  # (H, B * N, head_dim)
        return self.output(out.transpose(0, 1).reshape(B, N, D), x)


class Layer(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.attention, self.crossattention = Attention(c), CrossAttention(c)
        self.intermediate = nn.ModuleDict({"dense": Linear(c.d_model, c.d_ff)})
        self.output = Residual(c.d_ff, c.d_model, c.dropout)

    def forward(self, x, audio):
        x = self.attention(x)
        x = self.crossattention(x, audio)
        return self.output(F.gelu(self.intermediate["dense"](x)), x)


class QFormer(nn.Module):
    """Encoder taps (B, n_taps, T, d_model) -> audio vectors (B, n_queries, d_llm), in the dtype of the input.

    Linear layers keep PyTorch's default initialisation, as the official code does (it never runs BERT's N(0, 0.02)).
    """

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        queries = [nn.Parameter(torch.randn(1, c.n_queries, c.d_model)) for _ in range(c.n_taps)]
        self.layer_prompts = nn.ParameterList(queries)  # each tap has its own queries, all taps share the layers
        self.layer_weights = nn.Parameter(torch.zeros(c.n_queries, c.n_taps))
        self.qformer = nn.Module()
        self.qformer.layer = nn.ModuleList(Layer(c) for _ in range(c.n_layers))
        self.proj = nn.Sequential(LayerNorm(c.d_model, eps=1e-5), Linear(c.d_model, c.d_llm))
        # Whisper's middle states have a few huge channels that drown the others in keys and values. With these set
        # (see `standardize`) each channel is brought to mean 0 and deviation 1 first. Buffers, not weights:
        # official_state_dict folds them into the key and value layers, so the file format stays the official one.
        self.register_buffer("tap_mean", torch.zeros(c.d_model), persistent=False)
        self.register_buffer("tap_std", torch.ones(c.d_model), persistent=False)

    def forward(self, taps):
        B, n_taps, T, D = taps.shape
        c = self.config
        assert (n_taps, D) == (c.n_taps, c.d_model), f"taps {tuple(taps.shape)} for {c}"
        dtype = taps.dtype
        audio = with_ones(((taps - self.tap_mean.to(dtype)) / self.tap_std.to(dtype)).view(B * n_taps, T, D))
        # All taps in one batch of B * n_taps, not one call per tap.
        queries = torch.cat(list(self.layer_prompts)).to(dtype)  # (n_taps, n_queries, D)
        x = queries.repeat(B, 1, 1)  # (B * n_taps, n_queries, D), taps fastest as in `audio`
        for layer in self.qformer.layer:
            x = layer(x, audio)
        x = x.view(B, n_taps, c.n_queries, D)
        mix = self.layer_weights.softmax(-1).to(dtype)  # each query weighs the taps for itself
        x = torch.einsum("btqd,qt->bqd", x, mix)
        return self.proj(x)

    @torch.no_grad()
    def standardize(self, mean, std):
        """Set the per-channel statistics (d_model,) of the taps."""
        self.tap_mean.copy_(mean)
        self.tap_std.copy_(std)

    @torch.no_grad()
    def match_embeddings(self, table):
        """Spread a fresh Q-Former's vectors like the LLM's token embeddings: same mean, same principal directions.

        table (vocab_size, d_llm). What the LLM reads then looks like text to it from the start, and it learns faster (LOG.md).
        """
        # proj's LayerNorm hands on channels of unit variance, so each column of the weight sets the spread along one direction.
        variance, directions = torch.linalg.eigh(torch.cov(table.float().T))  # (d_llm,) ascending, (d_llm, d_llm)
        spread = (directions * variance.clamp(min=0).sqrt()).flip(1)[:, : self.config.d_model]  # (d_llm, at most d_model)
        self.proj[1].weight.zero_()[:, : spread.shape[1]] = spread
        self.proj[1].bias.copy_(table.float().mean(0))

    def official_state_dict(self):
        """state_dict in which (x - mean) / std is part of the cross-attention's keys and values:
        W (x - m) / s + b  =  (W / s) x + (b - W m / s)."""
        state = {name: tensor.detach().clone() for name, tensor in self.state_dict().items()}
        for i in range(self.config.n_layers):
            for part in ("key", "value"):
                name = f"qformer.layer.{i}.crossattention.self.{part}"
                state[f"{name}.weight"] /= self.tap_std
                state[f"{name}.bias"] -= state[f"{name}.weight"] @ self.tap_mean
        return state
