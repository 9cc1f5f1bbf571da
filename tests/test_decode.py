"""engine/decode.py: the lanes of GPUs, run on the CPU, and the compiled step give the tokens of the
lanes of CPUs, of transformers, and of each prompt alone. How often decoding waits for the device.
"""

import random

import pytest
import torch
import torch._dynamo.backends.common
import transformers
from conftest import randomize

import llama
import whisper
from engine import decode

SIZES = dict(
    vocab_size=199, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
    num_attention_heads=8, num_key_value_heads=2,
    max_position_embeddings=1024, rms_norm_eps=1e-5,
)  # fmt: skip
STOP = set(range(0, 199, 20))  # often enough that rows end at very different times


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """(transformers' model, ours), the same random weights, float32. Qwen2: it has biases."""
    folder = tmp_path_factory.mktemp("llm")
    torch.manual_seed(0)
    reference = randomize(
        transformers.AutoModelForCausalLM.from_config(
            transformers.Qwen2Config(**SIZES, use_sliding_window=False)
        ),
        std=0.1,
    ).float()
    reference.save_pretrained(folder)
    return reference, llama.Llama.from_pretrained(folder)


@pytest.fixture(params=["fixed", "compiled"])
def like_gpus(request, monkeypatch, pair):
    """The lanes of GPUs, with and without a compiled step; short buckets, so that a row goes
    through several.
    """
    compiled = request.param == "compiled"
    monkeypatch.setattr(decode, "use_fixed_lanes", lambda device: True)
    monkeypatch.setattr(decode, "COMPILE", dict(backend="eager"))
    monkeypatch.setattr(
        decode, "COMPILE_AFTER", 3 if compiled else 10**9
    )  # the first steps without: the change must not be seen
    monkeypatch.setattr(decode, "KEYS", 64)
    pair[1].lanes = None
    torch._dynamo.reset()
    yield compiled
    assert (pair[1].lanes.decode != pair[1].lanes.decode_step) == compiled, (
        "this test was to run the other form"
    )
    pair[1].lanes = None


def prompts(n=17, longest=70, start=(), seed=0):
    rng = random.Random(seed)
    return [
        [*start, *(rng.randrange(199) for _ in range(rng.randint(1, longest)))] for _ in range(n)
    ]


def one_by_one(llm, prompts, *sampling, seeds, stop=STOP):
    """Each alone, in the lanes of CPUs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode, "use_fixed_lanes", lambda device: False)
        return [
            decode.generate(llm, [p], *sampling, stop, [seed], 1)[0]
            for p, seed in zip(prompts, seeds)
        ]


@pytest.mark.parametrize(
    "temperature, top_p, start",
    [(0.0, 1.0, ()), (1.0, 1.0, (5, 6, 7, 8, 9, 10)), (0.8, 0.7, (5, 6))],
)
def test_fixed_lanes_give_the_tokens_of_growing_ones(like_gpus, pair, temperature, top_p, start):
    """17 ragged prompts, with and without a shared start, through 4 lanes and all at once; then
    others through the lanes that were kept.
    """
    llm, seeds = pair[1], list(range(100, 117))
    expected = one_by_one(llm, prompts(start=start), 40, temperature, top_p, seeds=seeds)
    assert len({len(answer) for answer in expected}) > 5, (
        "the test needs answers of different lengths"
    )
    run = lambda prompts, n: decode.generate(
        llm, prompts, 40, temperature, top_p, STOP, seeds[: len(prompts)], batch_size=n
    )
    assert run(prompts(start=start), 4) == expected
    assert run(prompts(start=start), 64) == expected
    lanes = llm.lanes
    fewer = prompts(9, 20, start, seed=1)
    assert run(fewer, 5) == one_by_one(llm, fewer, 40, temperature, top_p, seeds=seeds)
    assert llm.lanes is lanes


def test_fixed_lanes_give_the_tokens_of_transformers(like_gpus, pair):
    reference, llm = pair
    for prompt, answer in zip(prompts(6), decode.generate(llm, prompts(6), 30, batch_size=3)):
        ids = torch.tensor([prompt])
        expected = reference.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=30,
            do_sample=False,
            eos_token_id=None,
        )
        assert expected[0, len(prompt) :].tolist() == answer


def test_embeddings_as_prompts(like_gpus, pair):
    llm = pair[1]
    for start in ((), (5, 6, 7, 8, 9)):
        ids = prompts(6, start=start)
        embedded = [llm.embed(torch.tensor(p)) for p in ids]
        assert decode.generate(llm, embedded, 12, batch_size=2) == one_by_one(
            llm, ids, 12, 0.0, 1.0, stop=(), seeds=range(6)
        )


def test_a_free_lane_does_not_write_to_the_shared_start(like_gpus, pair):
    """25 rows and groups of three: one lane of 25 stays free at first, and is used when the lanes
    around it are.
    """
    llm, ids = pair[1], prompts(60, 30, start=[11] * 40)
    assert decode.generate(llm, ids, 20, stop_ids=STOP, batch_size=25) == one_by_one(
        llm, ids, 20, 0.0, 1.0, seeds=range(60)
    )


# -- what a step costs -----------------------------------------------------------------------------


@pytest.fixture
def waits(monkeypatch):
    """Counts everything that would make the host wait for a GPU."""
    counted = []
    for name in ("tolist", "item", "__bool__", "__int__", "__float__", "__index__", "nonzero"):
        plain = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor,
            name,
            lambda tensor, *args, name=name, plain=plain: (
                counted.append(name) or plain(tensor, *args)
            ),
        )
    return counted


@pytest.mark.parametrize("like_gpus", ["fixed"], indirect=True)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_llm_waits_once_a_step(like_gpus, pair, waits, monkeypatch, temperature):
    llm, calls = pair[1], []
    for name in ("admit", "step"):
        plain = getattr(decode.FixedLanes, name)
        monkeypatch.setattr(
            decode.FixedLanes,
            name,
            lambda lanes, *args, plain=plain: calls.append(1) or plain(lanes, *args),
        )
    decode.generate(llm, prompts(start=[7] * 9), 40, temperature, stop_ids=STOP, batch_size=4)
    assert len(calls) > 40 and len(waits) == len(calls) + 1, (
        "one for the shared start, one for each pass"
    )


def test_whisper_waits_once_a_token(tiny_world, waits, monkeypatch):
    hearing = whisper.Whisper.from_pretrained(tiny_world.whisper)
    steps = []
    plain = whisper.Decoder.forward
    monkeypatch.setattr(
        whisper.Decoder, "forward", lambda *args: steps.append(len(args[1])) or plain(*args)
    )
    torch.manual_seed(0)
    texts = hearing.transcribe_encoded(torch.randn(5, 150, 64), 30, no_speech_threshold=2)
    assert len(set(map(len, texts))) > 1
    assert len(steps) > 10
    # three steps have nothing to read but whether anybody speaks (English: start, no timestamps),
    # the last token needs no step
    assert len(waits) <= len(steps)
    assert set(waits) == {"tolist"}


@pytest.mark.parametrize("like_gpus", ["compiled"], indirect=True)
def test_cuda_graphs_find_everything_where_it_was(like_gpus, pair, monkeypatch):
    """A tensor that is not known to stay in place is copied before each replay; one that is written
    to besides makes torch give the graph up.
    """
    graphs = []

    def compiler(graph, inputs):
        found = torch._guards.TracingContext.get().fw_metadata
        moving = set(range(len(inputs))) - set(found.static_input_indices)
        graphs.append((moving, sum(info.mutates_data for info in found.input_info)))
        return graph.forward

    monkeypatch.setattr(
        decode,
        "COMPILE",
        dict(backend=torch._dynamo.backends.common.aot_autograd(fw_compiler=compiler)),
    )
    decode.generate(pair[1], prompts(6, start=[1, 2]), 20, temperature=1.0, batch_size=3)
    assert graphs and all(graph == (set(), 2 + 2 * 2) for graph in graphs), (
        "written: token, place, keys and values of two layers"
    )
