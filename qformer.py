"""
qformer.py: the adapter, the only part of DeSTA2.5-Audio that learns (paper section 3; 131.5M
parameters at full size).

A few learned queries per encoder tap look at that tap's 1500 audio frames through cross-attention
and come out as 64 vectors, which the LLM reads like token embeddings. The layers are BERT's, used
as a decoder: self-attention among the queries (bidirectional: queries have no order),
cross-attention to the audio, feed-forward, each followed by its LayerNorm.

Attribute names spell the official checkpoint: "perception.connector." + a name of this module's
state_dict.

What the rest of the code needs of an adapter is forward(taps), n_vectors, fit(…), state_to_save()
and flops(…), with LoRA config.dropout, too; it may have tables() for the log. Another one, an MLP
say, needs these and a line in DeSTA.from_pretrained (tests/test_adapter_seam.py trains one).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from engine import fast
from engine.attention import attend


@dataclass
class QFormerConfig:
    d_model: int  # Whisper's width; also the Q-Former's
    n_heads: int  # Whisper's heads
    d_llm: int  # width of the LLM's embeddings
    n_layers: int = 6
    n_queries: int = 64  # per tap, and after mixing
    n_taps: int = 4
    d_ff: int = 3072  # BERT-base's, whatever the width: the official code never sets it
    dropout: float = 0.1  # on attention weights and on outputs


class Linear(nn.Linear):
    """Trained in float32, computed in the dtype of its input."""

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


class LayerNorm(nn.LayerNorm):
    """Always float32 inside."""

    def forward(self, x):
        return super().forward(x.float()).to(x.dtype)


class Output(nn.Module):
    """How each part of a BERT layer ends: Linear, dropout, add the residual, then LayerNorm
    (post-norm).
    """

    def __init__(self, d_in, d_out, dropout):
        super().__init__()
        self.dense, self.LayerNorm = Linear(d_in, d_out), LayerNorm(d_out, eps=1e-12)
        self.dropout = dropout

    def forward(self, x, residual):
        return self.LayerNorm(residual + F.dropout(self.dense(x), self.dropout, self.training))


class Attention(nn.Module):
    """The queries look at one another, or, given audio frames, at these."""

    def __init__(self, c):
        super().__init__()
        self.n_heads, self.dropout = c.n_heads, c.dropout
        self.self = nn.ModuleDict(
            {name: Linear(c.d_model, c.d_model) for name in ("query", "key", "value")}
        )
        self.output = Output(c.d_model, c.d_model, c.dropout)

    def heads(self, x):
        B, T, D = x.shape
        return x.view(B, T, self.n_heads, D // self.n_heads).transpose(1, 2)  # (B, H, T, D/H)

    def forward(self, x, audio=None):
        """x (B, N, D), audio (B, T, D) or None -> (B, N, D)"""
        if audio is not None and fast.wanted(x):
            return self.output(fast.cross_attention(self, x, audio), residual=x)
        source = x if audio is None else audio
        q = self.heads(self.self["query"](x))  # (B, H, N, D/H)
        # (B, H, T, D/H)
        k, v = self.heads(self.self["key"](source)), self.heads(self.self["value"](source))
        seen = attend(q, k, v, dropout=self.dropout if self.training else 0.0)  # (B, H, N, D/H)
        return self.output(seen.transpose(1, 2).reshape(x.shape), residual=x)


class Layer(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.attention, self.crossattention = Attention(c), Attention(c)
        self.intermediate = nn.ModuleDict({"dense": Linear(c.d_model, c.d_ff)})
        self.output = Output(c.d_ff, c.d_model, c.dropout)

    def forward(self, x, audio):
        x = self.attention(x)
        x = self.crossattention(x, audio)
        return self.output(F.gelu(self.intermediate["dense"](x)), residual=x)


class QFormer(nn.Module):
    """Encoder taps (B, n_taps, T, d_model) -> audio vectors (B, n_vectors, d_llm), in the dtype of
    the input.

    Linear layers keep PyTorch's default initialisation, as the official code does (it never runs
    BERT's N(0, 0.02)).
    """

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.n_vectors = c.n_queries
        # Each tap has its own queries, all taps share the layers.
        queries = [nn.Parameter(torch.randn(1, c.n_queries, c.d_model)) for _ in range(c.n_taps)]
        self.layer_prompts = nn.ParameterList(queries)
        self.layer_weights = nn.Parameter(torch.zeros(c.n_queries, c.n_taps))
        self.qformer = nn.Module()
        self.qformer.layer = nn.ModuleList(Layer(c) for _ in range(c.n_layers))
        self.proj = nn.Sequential(LayerNorm(c.d_model, eps=1e-5), Linear(c.d_model, c.d_llm))
        # Buffers, not weights: state_to_save folds them into the key and value layers, so the file
        # stays the official one.
        self.register_buffer("tap_mean", torch.zeros(c.d_model), persistent=False)
        self.register_buffer("tap_std", torch.ones(c.d_model), persistent=False)

    def forward(self, taps):
        B, n_taps, T, D = taps.shape
        c = self.config
        assert (n_taps, D) == (c.n_taps, c.d_model), f"taps {tuple(taps.shape)} for {c}"
        dtype = taps.dtype
        # All taps in one batch of B * n_taps, not one call per tap.
        audio = ((taps - self.tap_mean.to(dtype)) / self.tap_std.to(dtype)).view(B * n_taps, T, D)
        queries = torch.cat(list(self.layer_prompts)).to(dtype)  # (n_taps, n_queries, D)
        x = queries.repeat(B, 1, 1)  # (B * n_taps, n_queries, D), taps fastest as in `audio`
        for layer in self.qformer.layer:
            x = layer(x, audio)
        x = x.view(B, n_taps, c.n_queries, D)
        mix = self.layer_weights.softmax(-1).to(dtype)  # each query weighs the taps for itself
        x = torch.einsum("btqd,qt->bqd", x, mix)
        return self.proj(x)

    @torch.no_grad()
    def fit(self, mean, std, table):
        """Fit a fresh Q-Former to Whisper before it and the LLM after it. Not in the paper.

        It then learns faster (LOG.md, "learning to hear").
        mean, std (d_model,): of each channel of the taps. Whisper's middle states have a few huge
        channels that drown the others in keys and values; from now on each is brought to mean 0 and
        deviation 1. table (vocab_size, d_llm): the LLM's token embeddings. The vectors get their
        mean and principal directions: what the LLM reads looks like text to it from the start.
        """
        self.tap_mean.copy_(mean)
        self.tap_std.copy_(std)
        # proj's LayerNorm hands on channels of unit variance, so each column of its Linear sets the
        # spread along one direction: the largest first, at most d_model of them.
        variance, directions = torch.linalg.eigh(torch.cov(table.float().T))  # ascending
        spread = (directions * variance.clamp(min=0).sqrt()).flip(1)[:, : self.config.d_model]
        self.proj[1].weight.zero_()[:, : spread.shape[1]] = spread
        self.proj[1].bias.copy_(table.float().mean(0))

    @torch.no_grad()
    def tables(self):
        """For the training log: how much each query takes of each tap (n_queries, n_taps)."""
        weights = self.layer_weights.softmax(-1).tolist()
        return {"tap_weights": [[round(weight, 4) for weight in query] for query in weights]}

    def flops(self, n_frames):
        """Of a clip, forward and backward; n_frames in each tap."""
        c = self.config
        queries = (
            c.n_layers * 6 * (6 * c.d_model**2 + 2 * c.d_model * c.d_ff) * c.n_taps * c.n_queries
        )
        # cross-attention: every query of every head with every channel of every frame, twice
        frames = c.n_layers * 4 * 2 * c.n_heads * c.n_queries * c.d_model * c.n_taps * n_frames
        return queries + frames

    def state_to_save(self):
        """{official name: tensor}, with (x - mean) / std made part of the cross-attention's keys
        and values: W (x - m) / s + b  =  (W / s) x + (b - W m / s)."""
        state = {name: tensor.detach().clone() for name, tensor in self.state_dict().items()}
        for i in range(self.config.n_layers):
            for part in ("key", "value"):
                name = f"qformer.layer.{i}.crossattention.self.{part}"
                state[f"{name}.weight"] /= self.tap_std
                state[f"{name}.bias"] -= state[f"{name}.weight"] @ self.tap_mean
        return state
