"""
fast.py: what makes the method fast on CPUs.

Each function equals, by a test, the textbook form that GPUs run:
- cross_attention: the Q-Former's, without keys and values of the audio frames
- losses: model.DeSTA.losses, with rows end to end instead of padded, and their common start kept
- attend_after_prefix: decoding, with the keys and values of a common start read once for all rows
"""

import torch
import torch.nn.functional as F

from engine.attention import attend, causal_bias

textbook = False  # --textbook: the readable path on CPUs too


def wanted(x):
    """Whether a tensor goes the fast way. On GPUs FlashAttention and large products are faster than
    what is done here.
    """
    return x.device.type == "cpu" and not textbook


# -- the Q-Former ----------------------------------------------------------------------------------


def cross_attention(layer, x, audio):
    """qformer.Attention of x (B, N, D) to audio (B, T, D), up to its output layer. -> (B, N, D)

    Keys and values of the frames are never made. Per head, q · (W a) = (Wᵀ q) · a, so the few
    queries go through W instead of the 1500 frames, and Σ p (W a) = W Σ p a. The key's bias adds
    the same to all scores of a query, and softmax does not see it. 1.7 times as fast as keys,
    values and fused attention (LOG.md, "a training step twice as fast").
    """
    B, N, D = x.shape
    H, d = layer.n_heads, D // layer.n_heads
    weight = lambda name: layer.self[name].weight.to(x.dtype).view(H, d, D)
    q = layer.self["query"](x).view(B * N, H, d).transpose(0, 1) * d**-0.5  # (H, B * N, d)
    q = (q @ weight("key")).view(H, B, N, D).transpose(0, 1).reshape(B, H * N, D)
    weights = (q @ audio.transpose(1, 2)).softmax(-1)  # (B, H * N, T)
    weights = F.dropout(weights, layer.dropout, layer.training)
    seen = (weights @ audio).view(B, H, N, D).transpose(0, 1).reshape(H, B * N, D)
    out = seen @ weight("value").transpose(1, 2)  # (H, B * N, d)
    out = out.transpose(0, 1).reshape(B, N, H, d)
    # The value's bias counts as often as the weights sum to: once, but for dropout.
    total = weights.sum(-1).view(B, H, N, 1).transpose(1, 2)  # (B, N, H, 1)
    return (out + total * layer.self["value"].bias.to(x.dtype).view(H, d)).reshape(B, N, D)


# -- the shared prefix -----------------------------------------------------------------------------


class Prefix(list):
    """Keys and values, layer by layer, of tokens that many rows start with: one pass with it as its
    cache fills it.
    """

    def attend(self, layer, q, k, v):
        self.append((k.contiguous(), v.contiguous()))  # (1, n_kv_heads, P, head_dim)
        return attend(q, k, v, causal=True)


def common_prefix(prompts):
    """How many leading tokens (or embeddings) all prompts share, at most all but the last one of
    the shortest.
    """
    n = min(len(p) for p in prompts) - 1
    same = torch.ones(n, dtype=torch.bool, device=prompts[0].device)
    for p in prompts[1:]:
        equal = p[:n] == prompts[0][:n]
        same &= equal.all(-1) if equal.dim() == 2 else equal
    return int(same.long().cumprod(0).sum())  # the one wait for the device


def attend_after_prefix(q, k, v, bias, prefix):
    """`attend` to prefix + k, v. prefix: k, v (1, n_kv_heads, P, head_dim) that every query of
    every row sees whole.

    bias: of k alone; None: causal.
    """
    B, H, T, d = q.shape
    G, S = k.shape[1:3]
    if bias is None:
        bias = causal_bias(torch.arange(T, device=q.device)[None], S, q.dtype)
    old_k, old_v = prefix
    if T > 1:  # many queries a row: copied in front of every row's keys
        k, v = (
            torch.cat((old.expand(B, -1, -1, -1), new), dim=2) for old, new in zip(prefix, (k, v))
        )
        return attend(q, k, v, bias=F.pad(bias, (old_k.shape[2], 0)))
    # One query a row: those of all rows look at the prefix together, in one product that reads it
    # once.
    q = (q * d**-0.5).view(B, G, H // G, d)
    # (B, G, H/G, …) -> (1, G, B * H/G, …)
    together = lambda t: t.transpose(0, 1).reshape(1, G, -1, t.shape[-1])
    apart = lambda t: t.view(G, B, -1, t.shape[-1]).transpose(0, 1)
    scores = (q @ k.transpose(-1, -2)).view(B, G, -1, S) + bias
    # (B, G, H/G, P + S)
    scores = torch.cat((apart(together(q) @ old_k.transpose(-1, -2)), scores), dim=-1)
    old_weights, weights = scores.softmax(-1).split((old_k.shape[2], S), dim=-1)
    return (weights @ v + apart(together(old_weights) @ old_v)).view(B, H, T, d)


# -- the loss --------------------------------------------------------------------------------------


class Packed:
    """Rows of these lengths laid end to end, (1, sum of lengths, …), each continuing the prefix: no
    padding is computed anywhere.
    """

    def __init__(self, lengths, prefix):
        self.lengths, self.prefix = lengths, prefix

    def attend(self, layer, q, k, v):
        rows = zip(*(t.split(self.lengths, dim=2) for t in (q, k, v)))
        if not self.prefix:
            return torch.cat([attend(*row, causal=True) for row in rows], dim=2)
        return torch.cat(
            [attend_after_prefix(*row, None, self.prefix[layer]) for row in rows], dim=2
        )


def losses(model, rows):
    """model.DeSTA.losses, with the same result.

    What all rows start with (template header, system prompt, worked examples) does not depend on
    trained weights: its keys and values are computed once and kept in model.prefix.
    """
    P, shortest = 0, min(len(row["ids"]) for row in rows)
    first, shares = rows[0]["ids"], shares_prefix(model)
    while (
        shares
        and P < shortest - 1
        and first[P] >= 0
        and all(row["ids"][P] == first[P] for row in rows)
    ):
        P += 1
    prefix = kept_prefix(model, first[:P])
    sequences = [torch.tensor(row["ids"][P:] + row["target"][:-1]) for row in rows]
    lengths = [len(sequence) for sequence in sequences]
    ids = torch.cat(sequences)[None]  # (1, T), T the sum of lengths
    positions = torch.cat([P + torch.arange(n) for n in lengths])[None].to(model.device)
    x = model.embed(ids, [mel for row in rows for mel in row["mels"]])
    hidden = model.llm.hidden_states(x, Packed(lengths, prefix), positions)[0]  # (T, d_llm)
    ends = torch.tensor(lengths).cumsum(0).tolist()
    position = torch.cat(
        [torch.arange(end - len(row["target"]), end) for end, row in zip(ends, rows)]
    )
    # long: an empty target would be float
    targets = [torch.tensor(row["target"], dtype=torch.long) for row in rows]
    targets = torch.cat(targets).to(model.device)
    logits = model.llm.lm_head(hidden[position.to(model.device)]).float()  # (n_targets, vocab_size)
    return F.cross_entropy(logits, targets, reduction="none")


def shares_prefix(model):
    """Not where the LLM learns (LoRA, --train_llm): the prefix changes with every step, and has
    gradients. Nor where it is sharded: every rank must make the same number of passes.
    """
    c = model.config
    return not (c.lora_rank or c.train_llm or model.llm.sharded)


@torch.no_grad()
def kept_prefix(model, ids):
    """Keys and values of token ids. The last result is kept: a data set's rows mostly start
    alike.
    """
    if ids and model.prefix[0] != ids:
        prefix = Prefix()
        model.llm.hidden_states(model.llm.embed(torch.tensor([ids], device=model.device)), prefix)
        model.prefix = ids, prefix
    return model.prefix[1] if ids else None
