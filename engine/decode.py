"""
decode.py: batched generation.

A step of decoding reads every weight once, however many rows it serves, so many rows are kept in
flight, each in a lane of the cache. `generate` admits prompts to free lanes (one pass over all
their tokens), steps (one token for every row in flight) and retires the rows that are done. Lanes
come in two forms, which give the same tokens:

- GrowingLanes, for CPUs, where every number costs time. Lanes are as long as needed, rows in flight
  are always the first ones, and what all prompts begin with (the system prompt) is kept and read
  once for all of them.
- FixedLanes, for GPUs, where every launch costs time. Nothing changes its shape or its address, so
  a step can be compiled and replayed as one CUDA graph, as in gpt-fast.
"""

from collections import deque
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from engine.attention import attend, causal_bias
from engine.fast import Prefix, attend_after_prefix, common_prefix


def use_fixed_lanes(device):
    return device.type != "cpu"


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
    seed: an int, or one int per prompt: a row's draws depend on its seed alone, never on its
    neighbours or on batch_size.
    """
    if max_new_tokens < 1 or not temperature >= 0 or not 0 < top_p <= 1 or batch_size < 1:
        ranges = "max_new_tokens and batch_size at least 1, temperature at least 0, top_p in (0, 1]"
        raise ValueError(f"generate: {ranges}")
    prompts = [torch.as_tensor(p) for p in prompts]
    if not prompts:
        return []
    if min(len(p) for p in prompts) == 0:
        raise ValueError("generate: a prompt is empty")
    seeds = [seed * 1_000_003 + i for i in range(len(prompts))] if isinstance(seed, int) else seed

    P, prefix = common_prefix(prompts) if len(prompts) > 1 else 0, Prefix()
    if P:
        llm.hidden_states(embed(llm, [prompts[0][:P]]), prefix)
    rows = [Row(prompt[P:], seed) for prompt, seed in zip(prompts, seeds)]
    n_lanes = min(batch_size, len(rows))
    sampling = Sampling(temperature, top_p, max_new_tokens)
    if use_fixed_lanes(llm.lm_head.weight.device):
        lanes = fixed_lanes(llm, n_lanes, max(map(len, prompts)) + max_new_tokens)
    else:
        lanes = GrowingLanes(llm, n_lanes)
    lanes.start(prefix, P, sampling)

    # Longest first: neighbours in a prefill have like lengths (little padding), and so have the
    # rows in flight.
    waiting = deque(sorted(rows, key=lambda row: -len(row.prompt)))
    # prompts admitted together: enough for an efficient product, few enough to refill often
    group = max(1, n_lanes // 8)
    bar = tqdm(total=len(rows), desc="generate", unit="row", disable=not progress, leave=False)
    n_tokens = 0
    while lanes.rows or waiting:
        if waiting and n_lanes - len(lanes.rows) >= group:
            new = [waiting.popleft() for _ in range(min(group, len(waiting)))]
            chosen = lanes.admit(new)
        else:
            chosen = lanes.step()
        # From the last lane to the first: a row that is moved into a free lane is still running.
        for lane, token in reversed(chosen):
            row = lanes.rows[lane]
            row.answer.append(token)
            if token in stop_ids or len(row.answer) == max_new_tokens:
                lanes.retire(lane)
                bar.update()
        n_tokens += len(chosen)
        speed = n_tokens / max(1e-9, bar.format_dict["elapsed"])
        bar.set_postfix_str(f"{speed:.0f} tokens/s", refresh=False)
    bar.close()
    return [row.answer for row in rows]


@dataclass
class Row:
    """A prompt, ids (T,) or embeddings (T, d_model) after the shared prefix, and its answer."""

    prompt: torch.Tensor
    seed: int
    answer: list = field(default_factory=list)

    def length(self):
        """Tokens after the prefix; the next step feeds the last of them."""
        return len(self.prompt) + len(self.answer)

    def draws(self, n):
        """The numbers in [0, 1) that choose its first n tokens."""
        return torch.rand(n, generator=torch.Generator().manual_seed(self.seed))


@dataclass
class Sampling:
    temperature: float
    top_p: float
    max_new_tokens: int


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


def embed(llm, prompts):
    """Ids or embeddings of any lengths -> embeddings (B, T, d_model), padded on the right."""
    weight = llm.model.embed_tokens.weight
    x = nn.utils.rnn.pad_sequence(prompts, batch_first=True).to(weight.device)
    return x.to(weight.dtype) if x.is_floating_point() else llm.embed(x)


def to_host(tensor):
    """-> list. Waits for the device: once for a step, and nowhere else while decoding."""
    return tensor.tolist()


# -- lanes for CPUs --------------------------------------------------------------------------------


class GrowingLanes:
    """rows[i]: the row in lane i. A token's place in its lane is its position after the prefix."""

    def __init__(self, llm, n_lanes):
        c, weight = llm.config, llm.model.embed_tokens.weight
        empty = weight.new_empty(n_lanes, c.n_kv_heads, 0, c.head_dim)
        self.layers = [[empty, empty] for _ in range(c.n_layers)]  # k, v
        self.llm, self.rows, self.draws = llm, [], []

    def start(self, prefix, P, sampling):
        self.prefix, self.P, self.sampling = prefix, P, sampling

    def admit(self, new):
        """Prefill the prompts of new rows. -> [(lane, the first token of its answer), …]"""
        first = len(self.rows)
        self.rows += new
        if self.sampling.temperature > 0:
            self.draws += [row.draws(self.sampling.max_new_tokens) for row in new]
        x = embed(self.llm, [row.prompt for row in new])  # (rows, T, d_model)
        places = torch.arange(x.shape[1]).expand(len(new), -1)
        return self.forward(first, x, places, torch.tensor([len(row.prompt) - 1 for row in new]))

    def step(self):
        """Feed the token chosen last of every row. -> [(lane, its next token), …]"""
        x = self.llm.embed(torch.tensor([[row.answer[-1]] for row in self.rows]))
        places = torch.tensor([[row.length() - 1] for row in self.rows])
        return self.forward(0, x, places, torch.zeros(len(self.rows), dtype=torch.long))

    def retire(self, lane):
        """The last row in flight takes the lane over."""
        last = len(self.rows) - 1
        if lane < last:
            for k, v in self.layers:
                k[lane], v[lane] = k[last], v[last]
        for items in filter(None, (self.rows, self.draws)):
            items[lane] = items[last]
            items.pop()

    def forward(self, first, x, places, last):
        """x (B, T, d_model) at places (B, T) of the lanes first, first + 1, …; the token after
        index `last` (B,) of each is chosen.
        """
        self.fit(max(row.length() for row in self.rows))
        n_keys, dtype = self.layers[0][0].shape[2], self.layers[0][0].dtype
        lanes = torch.arange(first, first + len(x))
        self.lanes, self.at = slice(first, first + len(x)), (lanes[:, None], slice(None), places)
        # None: a fresh prompt sees the prefix and itself, nothing that is stored before
        self.bias = causal_bias(places, n_keys, dtype) if x.shape[1] == 1 else None
        hidden = self.llm.hidden_states(x, self, self.P + places)[torch.arange(len(x)), last]
        uniform, s = None, self.sampling
        if s.temperature > 0:
            pairs = zip(self.rows[first:], self.draws[first:])
            uniform = torch.stack([draws[len(row.answer)] for row, draws in pairs])
        tokens = sample(self.llm.lm_head(hidden), s.temperature, s.top_p, uniform)
        return list(enumerate(to_host(tokens), start=first))

    def attend(self, layer, q, k, v):
        """Store k, v (B, n_kv_heads, T, head_dim); let the queries attend to all that their lanes
        hold.
        """
        all_k, all_v = self.layers[layer]
        all_k[self.at], all_v[self.at] = k.transpose(1, 2), v.transpose(1, 2)
        if self.bias is not None:
            k, v = all_k[self.lanes], all_v[self.lanes]
        if self.prefix:
            return attend_after_prefix(q, k, v, self.bias, self.prefix[layer])
        return attend(q, k, v, causal=self.bias is None, bias=self.bias)

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


# -- lanes for GPUs --------------------------------------------------------------------------------

KEYS = 256  # a step reads a multiple of so many keys of each lane; each multiple has its own graph
COMPILE = dict(mode="reduce-overhead")  # tests on CPUs: dict(backend="eager")
# Steps without a compiled graph: compiling takes about as long as these would save with one. A
# question or two never wait for it.
COMPILE_AFTER = 5000


def fixed_lanes(llm, n_lanes, length):
    """Those of the last call, with their graphs, where they are large enough. They stay with the
    LLM.
    """
    length = -(-length // KEYS) * KEYS
    kept = llm.lanes
    if kept is None or kept.n_lanes < n_lanes or kept.length < length:
        if kept is not None:
            n_lanes, length = max(n_lanes, kept.n_lanes), max(length, kept.length)
        kept = llm.lanes = None  # freed before the new ones are made
        llm.lanes = FixedLanes(llm, n_lanes, length)
    return llm.lanes


class FixedLanes:
    """rows[i]: the row in lane i, where there is one. A token's place in its lane is its position.

    A free lane is computed too. It goes on from where its row ended, and nobody reads its tokens.
    """

    def __init__(self, llm, n_lanes, length):
        c, weight = llm.config, llm.model.embed_tokens.weight
        self.llm, self.n_lanes, self.length = llm, n_lanes, length
        lanes = lambda: weight.new_zeros(n_lanes, c.n_kv_heads, length, c.head_dim)
        self.layers = [[lanes(), lanes()] for _ in range(c.n_layers)]  # k, v
        # For each lane: the token that the next step feeds, its place, and the number in [0, 1)
        # that chooses the token after each place.
        self.token, self.place = weight.new_zeros(2, n_lanes, 1, dtype=torch.long).unbind()
        self.draws = weight.new_zeros(n_lanes, length, dtype=torch.float32)
        self.decode, self.n_steps = self.decode_step, 0

    def start(self, prefix, P, sampling):
        self.P, self.sampling, self.rows = P, sampling, {}
        for layer, new in zip(self.layers, prefix):
            for lanes, of_prefix in zip(layer, new):
                lanes[:, :, :P] = of_prefix
        self.place.fill_(self.length - 1)  # lanes that were never used must not write to the prefix

    def admit(self, new):
        """Prefill the prompts of new rows. -> [(lane, the first token of its answer), …]"""
        free = [lane for lane in range(self.n_lanes) if lane not in self.rows][: len(new)]
        self.rows |= zip(free, new)
        P, s, device = self.P, self.sampling, self.place.device
        x = embed(self.llm, [row.prompt for row in new])  # (B, T, d_model)
        lanes = torch.tensor(free, device=device)
        places = torch.arange(P, P + x.shape[1], device=device)[None]
        hidden = self.llm.hidden_states(x, Prefill(self.layers, lanes, P), places)
        ends = torch.tensor([len(row.prompt) for row in new], device=device)
        hidden = hidden[torch.arange(len(new), device=device), ends - 1]  # (B, d_model)
        if s.temperature > 0:
            draws = torch.zeros(len(new), self.length)
            for row, of_row in zip(new, draws):
                start = P + len(row.prompt) - 1
                of_row[start : start + s.max_new_tokens] = row.draws(s.max_new_tokens)
            self.draws[lanes] = draws.to(device)
        uniform = self.draws[lanes, P + ends - 1]
        tokens = sample(self.llm.lm_head(hidden), s.temperature, s.top_p, uniform)
        self.token[lanes, 0], self.place[lanes, 0] = tokens, P + ends
        return list(zip(free, to_host(tokens)))

    def step(self):
        """Feed the token chosen last of every row. -> [(lane, its next token), …]"""
        if self.n_steps == COMPILE_AFTER:
            self.compile()
        self.n_steps += 1
        longest = self.P + max(row.length() for row in self.rows.values())
        self.decode(-(-longest // KEYS) * KEYS)
        tokens = to_host(self.token[:, 0])
        return [(lane, tokens[lane]) for lane in self.rows]

    def retire(self, lane):
        del self.rows[lane]

    def compile(self):
        # CUDA graphs copy what comes in, unless it is known to stay where it is.
        for tensor in (self.token, self.place, self.draws, *sum(self.layers, [])):
            torch._dynamo.mark_static_address(tensor)
        torch._dynamo.config.recompile_limit = 100  # one for each n_keys and sampling
        self.decode = torch.compile(self.decode_step, fullgraph=True, dynamic=False, **COMPILE)

    def decode_step(self, n_keys):
        """One step of all lanes, from the buffers to the buffers: this is what is compiled."""
        x, s = self.llm.embed(self.token), self.sampling  # (n_lanes, 1, d_model)
        cache = Step(self.layers, self.place, n_keys)
        hidden = self.llm.hidden_states(x, cache, self.place)[:, 0]
        uniform = self.draws.gather(1, self.place)[:, 0]
        tokens = sample(self.llm.lm_head(hidden), s.temperature, s.top_p, uniform)
        self.token.copy_(tokens[:, None])
        self.place.add_(1).clamp_(max=self.length - 1)


class Prefill:
    """The cache of a pass over new prompts, which go to `lanes` (B,), after the P tokens that every
    lane starts with.
    """

    def __init__(self, layers, lanes, P):
        self.layers, self.lanes, self.P = layers, lanes, P

    def attend(self, layer, q, k, v):
        P, end = self.P, self.P + q.shape[2]
        for lanes, new in zip(self.layers[layer], (k, v)):
            lanes[:, :, P:end][self.lanes] = new
        if not P:
            return attend(q, k, v, causal=True)
        # FlashAttention counts queries from the first key on: empty ones stand for the prefix. It
        # takes no mask, and attention is a small part of the pass.
        k, v = (lanes[:, :, :end][self.lanes] for lanes in self.layers[layer])
        return attend(F.pad(q, (0, 0, P, 0)), k, v, causal=True)[:, :, P:]


class Step:
    """The cache of a step: one token for every lane, at `place` (n_lanes, 1), sees the keys up to
    there, of the first n_keys.
    """

    def __init__(self, layers, place, n_keys):
        self.layers, self.n_keys = layers, n_keys
        lanes = torch.arange(len(place), device=place.device)[:, None]
        self.at = lanes, slice(None), place
        self.bias = causal_bias(place, n_keys, layers[0][0].dtype)

    def attend(self, layer, q, k, v):
        all_k, all_v = self.layers[layer]
        all_k[self.at], all_v[self.at] = k.transpose(1, 2), v.transpose(1, 2)
        k, v = all_k[:, :, : self.n_keys], all_v[:, :, : self.n_keys]
        return attend(q, k, v, bias=self.bias)
