"""
decode.py: batched generation: continuous batching over one cache.

A step of decoding reads every weight once, whatever the batch, so throughput is won by keeping many
rows in flight. Each
row owns one lane of the cache, and the rows in flight are always the first ones: a finished row's
lane is taken over by the last one, so nothing is computed for rows that are done. When an eighth of
the lanes are free, the next prompts are prefilled into them together. What all prompts begin with
(the system prompt) is prefilled, kept and read once for all.
"""

from collections import deque

import torch
from torch import nn
from tqdm import tqdm

from engine.attention import attend, causal_bias
from engine.fast import Prefix, attend_after_prefix, common_prefix


class KVCache:
    """Keys and values of the rows in flight: what follows the shared prefix. A token's place in its
    row's lane is its position after the prefix.
    """

    def __init__(self, config, n_lanes, prefix, dtype, device):
        empty = torch.empty(
            n_lanes, config.n_kv_heads, 0, config.head_dim, dtype=dtype, device=device
        )
        self.layers = [[empty, empty] for _ in range(config.n_layers)]  # k, v
        self.prefix = prefix

    def fit(self, length):
        """Make lanes long enough, and not much longer: decoding reads them whole. For a part of a
        lane is not contiguous in memory, and the batched product of CPUs would copy it every time
        (2.3 instead of 0.6 ms per layer, 64 rows of 200 tokens)."""
        n_lanes, G, size, head_dim = self.layers[0][0].shape
        if not size - 128 < length <= size:
            fitting = -(-length // 64) * 64
            # a masked key must still be a number
            zeros = self.layers[0][0].new_zeros(n_lanes, G, max(0, fitting - size), head_dim)
            for layer in self.layers:  # one after the other: the cache never exists twice
                layer[:] = [torch.cat((t[:, :, :fitting], zeros), dim=2) for t in layer]

    def aim(self, first, places):
        """The next pass computes these places (B, T) of the lanes first, first + 1, …"""
        self.rows = slice(first, first + len(places))
        self.at = (
            torch.arange(first, first + len(places), device=places.device)[:, None],
            slice(None),
            places,
        )
        # None: a fresh prompt sees the prefix and itself, nothing that is stored before
        self.bias = (
            causal_bias(places, self.layers[0][0].shape[2], self.layers[0][0].dtype)
            if places.shape[1] == 1
            else None
        )

    def attend(self, layer, q, k, v):
        """Store this pass's k, v (B, n_kv_heads, T, head_dim), and let its queries attend to all
        that their lanes hold.
        """
        all_k, all_v = self.layers[layer]
        all_k[self.at], all_v[self.at] = k.transpose(1, 2), v.transpose(1, 2)
        if self.bias is not None:
            k, v = all_k[self.rows], all_v[self.rows]
        if self.prefix:
            return attend_after_prefix(q, k, v, self.bias, self.prefix[layer])
        return attend(q, k, v, causal=self.bias is None, bias=self.bias)

    def move(self, source, target):
        for k, v in self.layers:
            k[target], v[target] = k[source], v[source]


def sample(logits, temperature, top_p, uniform):
    """Next token per row. logits (B, vocab), uniform (B,) in [0, 1): a row's draw depends on its
    own number only.
    """
    logits = logits.float()  # also because argmax in bf16 takes four times as long on CPUs
    if temperature == 0:
        return logits.argmax(-1)
    probs = (logits / temperature).softmax(-1)
    order = None
    # the smallest set of tokens, most likely first, that holds top_p of the probability
    if top_p < 1:
        probs, order = probs.sort(-1, descending=True)
        probs = probs * (probs.cumsum(-1) - probs < top_p)
    cumulative = probs.cumsum(-1)
    choice = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)
    choice = choice.clamp(max=logits.shape[-1] - 1)
    return (choice if order is None else order.gather(-1, choice)).squeeze(-1)


@torch.inference_mode()
def generate(
    llm,
    prompts,
    max_new_tokens=128,
    temperature=0.0,
    top_p=1.0,
    stop_ids=(),
    seed=0,
    batch_size=64,
    progress=False,
):
    """Continue every prompt. -> list of token id lists; one that ended by itself ends with its stop
    id.

    prompts: id lists, or embedding tensors (T, d_model), of any lengths. temperature 0 is greedy.
    seed: an int, or
    one int per prompt: a row's draws depend on its seed alone, never on its neighbours or on
    batch_size.
    """
    device, dtype = llm.model.embed_tokens.weight.device, llm.model.embed_tokens.weight.dtype
    prompts = [torch.as_tensor(p, device=device) for p in prompts]
    if max_new_tokens < 1 or not temperature >= 0 or not 0 < top_p <= 1 or batch_size < 1:
        ranges = "max_new_tokens and batch_size at least 1, temperature at least 0, top_p in (0, 1]"
        raise ValueError(f"generate: {ranges}")
    if not prompts:
        return []
    if min(len(p) for p in prompts) == 0:
        raise ValueError("generate: a prompt is empty")
    seeds = [seed * 1_000_003 + i for i in range(len(prompts))] if isinstance(seed, int) else seed
    as_embeddings = lambda p: p.to(dtype) if p.is_floating_point() else llm.embed(p)

    # Longest first: neighbours in a prefill have like lengths (little padding), and so have the
    # rows in flight.
    waiting = deque(sorted(range(len(prompts)), key=lambda i: -len(prompts[i])))
    n_lanes = min(batch_size, len(prompts))
    # prompts prefilled together: enough for an efficient product, few enough to refill often
    group = max(1, n_lanes // 8)
    rows = []  # rows[s]: the prompt that lane s works on
    answers, draws = [[] for _ in prompts], {}
    bar = tqdm(total=len(prompts), desc="generate", unit="row", disable=not progress, leave=False)
    n_tokens = 0

    P, prefix = common_prefix(prompts) if len(prompts) > 1 else 0, Prefix()
    if P:
        llm.hidden_states(as_embeddings(prompts[0][:P])[None], prefix)
    cache = KVCache(llm.config, n_lanes, prefix, dtype, device)
    # tokens after the prefix, the one to be chosen next not counted
    held = lambda r: len(prompts[r]) - P + len(answers[r])

    while rows or waiting:
        if waiting and n_lanes - len(rows) >= group:  # prefill
            first, new = len(rows), [waiting.popleft() for _ in range(min(group, len(waiting)))]
            parts = [as_embeddings(prompts[r][P:]) for r in new]
            # (rows, T, d_model), right-padded
            x = nn.utils.rnn.pad_sequence(parts, batch_first=True)
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
        # (rows, d_model)
        hidden = llm.hidden_states(x, cache, P + places)[torch.arange(len(x), device=device), last]
        uniform = None
        if temperature > 0:
            for r in rows[first:]:
                if r not in draws:
                    draws[r] = torch.rand(
                        max_new_tokens, generator=torch.Generator().manual_seed(seeds[r])
                    )
            uniform = torch.stack([draws[r][len(answers[r])] for r in rows[first:]]).to(device)
        tokens = sample(llm.lm_head(hidden), temperature, top_p, uniform).tolist()
        n_tokens += len(tokens)
        # From the last lane to the first, so that the row that we move into a free lane is one that
        # is still running.
        for s, token in reversed(list(enumerate(tokens, start=first))):
            answers[rows[s]].append(token)
            if token in stop_ids or len(answers[rows[s]]) == max_new_tokens:
                draws.pop(rows[s], None)
                end = rows.pop()
                if s < len(rows):
                    cache.move(len(rows), s)
                    rows[s] = end
                bar.update()
        bar.set_postfix_str(
            f"{n_tokens / max(1e-9, bar.format_dict['elapsed']):.0f} tokens/s", refresh=False
        )
    bar.close()
    return answers
