"""What GPUs run, checked without one: training and generation on a device whose tensors have shapes
and no memory.

torch's own tools make it: a backend in Python gives the device "gpu", FakeTensorMode its tensors.
CPU tensors stay real. The backend is registered for a whole process, so the checks run in one of
their own:

    python tests/test_gpu.py           # the tables of docs/scale.md, at full depth: two minutes
    python tests/test_gpu.py json      # what the tests read
"""

import collections
import contextlib
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import ROOT, torchrun
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import train
from engine import attention, checkpoint, fast, run, weights
from engine.rows import split_long
from llama import LlamaConfig, add_lora
from model import AUDIO_ID, DeSTA
from whisper import WhisperConfig

spec = importlib.util.spec_from_file_location("memory", ROOT / "tools/memory.py")
memory = importlib.util.module_from_spec(spec)
spec.loader.exec_module(memory)

aten = torch.ops.aten
TINY = (
    LlamaConfig(300, 64, 3, 4, 2, 16, 96, 1e-5, 1e4, None, False),
    WhisperConfig(80, 64, 4, 4, 96, 2, 4, 96, 300, 50),
)
NO_KERNEL = {
    "empty",
    "empty_strided",
    "empty_like",
    "new_empty",
    "new_empty_strided",
    "detach",
    "_unsafe_view",
    "lift_fresh",
}

# Where the host waits for the device: (function, what for). The test fails when a read comes from
# anywhere else.
READS = {
    "training": {
        "batches": "counts of the global batch",
        "update": "loss and norm",
        "asked": "a signal to any rank",
    },
    "evaluation": {"evaluate": "losses, and how many rows the ranks have"},
    "saving": {"save": "the checkpoint", "save_adapter": "the adapter"},
    "fitting": {"fit": "torch.cov looks at its input"},
    "generation": {"common_prefix": "what all prompts begin with", "to_host": "the tokens"},
    "transcription": {"to_host": "the tokens, and where nobody speaks"},
}


# -- the device ------------------------------------------------------------------------------------


class Device(TorchDispatchMode):
    """Every operator on a tensor of the device goes through here: counted, and refused where a
    tensor has been left on the CPU.
    """

    def __init__(self):
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.parts, self.may_read = ["head and loss"], None
        self.operators, self.shapes, self.reads, self.passes = (
            collections.Counter() for _ in range(4)
        )

    @contextlib.contextmanager
    def during(self, part):
        self.parts.append(part)
        try:
            yield
        finally:
            self.parts.pop()

    def forget(self):
        for counter in (self.operators, self.shapes, self.reads, self.passes):
            counter.clear()

    def count(self, name):
        self.operators[self.parts[-1], name] += 1

    def named(self, owner, method, part):
        """From now on what a method runs counts as a part: its name, or a function of the first
        argument.
        """
        original = getattr(owner, method)

        def counted(*args, **options):
            name = part(*args) if callable(part) else part
            self.passes[name] += 1
            with self.during(name):
                return original(*args, **options)

        setattr(owner, method, counted)

    def read(self, value):
        """The host asks for a number. It gets a plausible one, if the function that asks may."""
        ours = {
            str(file) for file in [*ROOT.glob("*.py"), *(ROOT / "engine").glob("*.py")]
        }  # a .venv may lie in ROOT
        frame = sys._getframe()
        while frame.f_code.co_filename not in ours:
            frame = frame.f_back
            assert frame, "a read from outside the repository"
        name = frame.f_code.co_name
        assert name in self.may_read, (
            f"{name} waits for the device ({frame.f_code.co_filename}:{frame.f_lineno})"
        )
        self.reads[name] += 1
        return value

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.prim.device.default:
            return args[0].fake_device
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        made_on = kwargs.get("device")
        if not any(isinstance(t, FakeTensor) for t in tensors) and (
            made_on is None or torch.device(made_on).type != "gpu"
        ):
            return func(*args, **kwargs)
        if (
            torch.is_inference_mode_enabled() and func._can_decompose()
        ):  # otherwise autograd has done so
            with self:
                return func.decompose(*args, **kwargs)
        if func is aten.equal.default:
            return self.read(False)
        if func is aten._local_scalar_dense.default:
            return self.read(
                1.0
                if tensors[0].is_floating_point()
                else False
                if tensors[0].dtype == torch.bool
                else 20
            )
        copies = func in (aten._to_copy.default, aten.copy_.default)
        where = {t.device.type for t in tensors}
        assert copies or len(where) <= 1, (
            f"{func} of tensors on {where}: {[(t.device.type, tuple(t.shape)) for t in tensors]}"
        )
        if (
            copies
            and made_on is not None
            and torch.device(made_on).type == "cpu"
            and "gpu" in where
        ):
            self.read(None)
        if (
            func.namespace == "aten"
            and not func.is_view
            and func.overloadpacket.__name__ not in NO_KERNEL
            and where != {"cpu"}
        ):
            self.count(func.overloadpacket.__name__)
        as_fake = lambda t: (
            self.fake.from_tensor(t)
            if isinstance(t, torch.Tensor) and not isinstance(t, FakeTensor)
            else t
        )
        args, kwargs = tree_map(as_fake, (args, kwargs))
        with self.fake:
            return func(*args, **kwargs)

    # what stands in for kernels that the device does not have

    def attend(self, q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, enable_gqa=False):
        """What FlashAttention asks for; in decoding, one query a row and a mask for the
        memory-efficient kernel.
        """
        part, T, S = self.parts[-1], q.shape[2], k.shape[2]
        assert {t.device.type for t in (q, k, v)} == {"gpu"}
        assert {t.dtype for t in (q, k, v)} == {torch.bfloat16}
        assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
        assert q.shape[-1] % 8 == 0
        assert q.shape[-1] <= 256
        assert k.shape[1] == q.shape[1] or enable_gqa
        assert not is_causal or T == S, (
            "causal attention of a part of the keys starts at the first one"
        )
        if attn_mask is not None:
            assert part == "decoding", f"a mask in {part}: FlashAttention has none"
            assert attn_mask.device == q.device
            assert attn_mask.dtype == q.dtype
        mask = "mask" if attn_mask is not None else "causal" if is_causal else "all"
        self.shapes[part, tuple(q.shape), tuple(k.shape), mask] += 1
        return Attention.apply(self, q, k, v)

    def rms_norm(self, x, shape, weight=None, eps=None):
        return aten._fused_rms_norm(x, shape, weight, eps)[0]  # as torch does it on CUDA


class Attention(memory.FusedAttention):
    @staticmethod
    def forward(ctx, device, q, k, v):
        device.count("attention")
        ctx.device = device
        return memory.FusedAttention.forward(ctx, q, k, v)

    @staticmethod
    def backward(ctx, gradient):
        ctx.device.count("attention_backward")
        return None, *(torch.empty_like(t) for t in ctx.saved_tensors[:3])


@contextlib.contextmanager
def device():
    """Runs the body with the device; the tensors that checkpoints hold are kept in memory."""
    if not hasattr(torch, "gpu"):
        from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

        _setup_privateuseone_for_python_backend("gpu")
    d, files = Device(), {}

    def save_tensors(path, tensors):
        files[Path(path).name] = {name: tensor.detach().cpu() for name, tensor in tensors.items()}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", d.attend)
        patch.setattr(F, "rms_norm", d.rms_norm)
        patch.setattr(
            FakeTensor, "tolist", lambda t: [t[(0,) * t.dim()].item()] * t.numel()
        )  # one read, not one per element
        patch.setattr(checkpoint, "save_tensors", save_tensors)
        patch.setattr("model.save_tensors", save_tensors)
        patch.setattr(checkpoint, "load_tensors", lambda path: files[Path(path).name])
        torch._C._set_only_lift_cpu_tensors(
            True
        )  # torch.tensor(…, device="gpu") is made on the CPU, then copied
        with (
            d,
            torch.autograd.set_multithreading_enabled(False),
        ):  # backward in this thread: errors keep their place
            yield d
        torch._C._set_only_lift_cpu_tensors(False)


# -- what runs on it -------------------------------------------------------------------------------


def build(d, sizes, **changes):
    model = memory.build(*sizes, device="gpu", **changes).train()
    d.named(model.whisper, "encode", "encoder")
    d.named(model.adapter, "forward", "adapter")
    d.named(
        model.llm,
        "hidden_states",
        lambda x, cache=None, positions=None: (
            "LLM" if cache is None else "prefill" if x.shape[1] > 1 else "decoding"
        ),
    )
    return model


def rows_of(model, lengths):
    """Prepared rows, on the CPU: (tokens, targets among them), one silent clip each."""
    w, n = model.whisper.config, model.adapter.n_vectors
    mel = torch.zeros(w.num_mel_bins, 2 * w.max_source_positions)
    return [
        {"ids": [5] * (a - b - n) + [AUDIO_ID] * n, "target": [6] * b, "mels": [mel], "name": "row"}
        for a, b in lengths
    ]


class Training:
    """One rank's training, made of train.py's functions."""

    def __init__(self, d, model, rows, max_tokens):
        self.d, self.model, self.rows, self.max_tokens = d, model, rows, max_tokens
        self.weights = list(model.trained().values())
        self.gradients = train.flat_gradients(self.weights)
        self.optimizer = torch.optim.AdamW(
            self.weights, betas=(0.9, 0.98), weight_decay=0.01, fused=True
        )
        backward = torch.Tensor.backward
        self.loss = model.loss

        def loss(rows, n_target_tokens=None):
            value = self.loss(rows, n_target_tokens)
            value.backward = lambda: self.backward(backward, value)
            return value

        model.loss = loss

    def backward(self, backward, value):
        with self.d.during("backward"):
            backward(value)

    def step(self):
        d = self.d
        d.may_read = READS["training"]
        run.Stop.asked([], torch.device("gpu"))
        batch = next(train.batches(iter([self.rows]), 1, self.model, None, None))
        self.gradients.zero_()
        loss = train.accumulate(self.model, batch, lambda m: m, self.max_tokens)
        with d.during("clipping and AdamW"):
            train.update(self.optimizer, self.weights, self.gradients, 1e-4, 1.0, loss)
        self.check()

    def check(self):
        """All that FakeTensorMode would let pass: AdamW's step is a tensor without dimensions."""
        storage = self.gradients.untyped_storage()._cdata
        for name, parameter in self.model.trained().items():
            assert parameter.dtype == torch.float32 and parameter.device.type == "gpu", name
            assert parameter.grad.untyped_storage()._cdata == storage, (
                f"the gradient of {name} has left the buffer"
            )
            state = self.optimizer.state[parameter]
            assert state.keys() == {"step", "exp_avg", "exp_avg_sq"}, name
            for key, tensor in state.items():
                assert tensor.device == parameter.device and tensor.dtype == torch.float32, (
                    f"{key} of {name} is on {tensor.device}"
                )
        frozen = [p for part in (self.model.llm, self.model.whisper) for p in part.parameters()]
        assert not any(p.grad is not None for p in frozen if not p.requires_grad)

    def resume(self, folder):
        """Save, and go on with an optimizer that knows nothing yet."""
        self.d.may_read = READS["saving"]
        checkpoint.save(
            folder, self.model, self.optimizer, 1, {"settings": {}, "made_from": None}, keep=1
        )
        self.optimizer = torch.optim.AdamW(
            self.weights, betas=(0.9, 0.98), weight_decay=0.01, fused=True
        )
        assert (
            checkpoint.load(
                folder, self.model, self.optimizer, {"settings": {}, "made_from": None}, {}, set()
            )
            == 1
        )
        self.check()


def generate(d, model, lengths, new_tokens, batch_size):
    """model.DeSTA.generate of prompts of these lengths, which begin alike."""
    d.may_read = READS["generation"]
    rows = iter(rows_of(model, [(n, 0) for n in lengths]))
    model.eval()
    model.tokenizer = types.SimpleNamespace(stop_ids=(), decode=lambda ids: " ".join(map(str, ids)))
    model.reader.read = lambda *args: (lambda row: (row["ids"], row["mels"]))(next(rows))
    conversations = [[{"role": "user", "content": ""}]] * len(lengths)
    answers = model.generate(conversations, new_tokens, batch_size=batch_size)
    assert answers == [" ".join(["20"] * new_tokens)] * len(lengths)


def transcribe(d, model):
    d.may_read = READS["transcription"]
    no_ids = dict(
        suppress=[1, 2],
        begin_suppress=[3],
        multilingual=True,
        transcribe=4,
        no_timestamps=5,
        start=6,
        end=7,
        no_speech=8,
    )
    model.whisper.vocabulary = types.SimpleNamespace(
        **no_ids, languages=slice(9, 12), decode=lambda ids: " ".join(map(str, ids))
    )
    with d.during("transcription"):
        assert (
            model.whisper.transcribe([torch.zeros(16000)] * 2, max_new_tokens=4)
            == ["20 20 20 20"] * 2
        )


def check_tiny(folder):
    """Everything that a run does on its device, with small shapes and rows of unequal length. ->
    {what: reads}
    """
    found = {}
    with device() as d:
        model = build(d, TINY, n_layers=1)
        # Not --checkpoint_activations: torch 2.13 aborts when it computes a block again on such a
        # device.
        add_lora(model.llm, 2, 0.1)
        model.config.lora_rank = 2
        rows = rows_of(model, [(80, 9), (90, 5), (99, 12)])
        training = Training(d, model.train(), rows, max_tokens=200)
        training.step()
        assert d.passes["LLM"] == 2, "three rows of up to 99 tokens, 200 a pass"
        training.resume(folder)
        d.reads.clear()
        training.step()
        found["step"] = dict(d.reads)
        d.may_read = READS["evaluation"]
        train.evaluate(model, [rows[0] | {"wrong_mels": rows[1]["mels"]}], 2)
        d.may_read = READS["fitting"]
        model.adapter.fit(
            *train.measure_taps(model, rows[:1], 2), model.llm.model.embed_tokens.weight
        )
        assert weights.sum_of_bits(model.llm.lm_head.weight).device.type == "gpu"
        d.reads.clear()
        generate(d, model, [90, 95, 80], 3, batch_size=2)
        found["generation"] = dict(d.reads)
        d.reads.clear()
        transcribe(d, model)
        found["transcription"] = dict(d.reads)
    return found


def broken(what):
    """The same, with one mistake. -> the complaint"""
    with device() as d:
        model = build(d, TINY, n_layers=1)
        training = Training(d, model, rows_of(model, [(80, 9), (90, 5)]), 10_000)
        try:
            if what == "step count":
                training.step()
                state = training.optimizer.state[training.weights[0]]
                state["step"] = torch.tensor(1.0)
            if what == "buffer":
                model.adapter.tap_mean = torch.zeros(64)
            if what == "mask":
                attend = attention.attend
                bias = lambda q: torch.zeros(
                    1, 1, q.shape[2], q.shape[2], dtype=q.dtype, device=q.device
                )
                sys.modules["llama"].attend = lambda q, k, v, causal: attend(q, k, v, bias=bias(q))
            if what == "read":
                forward = model.adapter.proj.forward
                model.adapter.proj.forward = lambda x: forward(x) * x.abs().max().item()
            training.step()
        except (AssertionError, RuntimeError) as error:
            return str(error)
        finally:
            if what == "mask":
                sys.modules["llama"].attend = attend


def check_official(folder, n_layers, n_rows=12):
    """Llama-3.1-8B and Whisper-large-v3, of n_layers blocks each, with the 131.5M adapter: a step,
    its resume, a generation. -> figures
    """
    llm, whisper = memory.LLAMA_31_8B, memory.LARGE_V3
    sizes = (
        replace(llm, n_layers=n_layers),
        replace(whisper, encoder_layers=n_layers, decoder_layers=1),
    )
    with device() as d:
        model = build(d, sizes)
        assert sum(p.numel() for p in model.trained().values()) == 131_540_224
        rows = rows_of(model, [(memory.TOKENS, memory.TARGETS)] * n_rows)
        training = Training(d, model, rows, max_tokens=6144)
        found = (
            {"kept": memory.kept_bytes(model, lambda: training.loss(rows))}
            if n_layers == 32
            else {}
        )
        training.step()
        training.resume(folder)
        d.forget()
        training.step()
        parts = "encoder", "adapter", "LLM", "head and loss", "backward", "clipping and AdamW"
        found["step"] = {part: by_part(d, part) for part in parts}
        found |= {"shapes of a step": shapes(d), "reads of a step": dict(d.reads)}
        d.forget()
        generate(d, model, [300, 290, 280], 3, batch_size=4)
        found["pass"] = {
            part: by_part(d, part) // d.passes[part] for part in ("prefill", "decoding")
        }
        return found | {"shapes of a generation": shapes(d), "reads of a generation": dict(d.reads)}


def by_part(d, part):
    return sum(n for (where, _), n in d.operators.items() if where == part)


def shapes(d):
    return [[part, list(q), list(k), mask, n] for (part, q, k, mask), n in d.shapes.items()]


def print_tables():
    with tempfile.TemporaryDirectory() as folder:
        found = check_official(Path(folder), 32)
    print("| part | operators |\n| --- | --- |")
    for part, n in found["step"].items():
        print(f"| a training step of 12 rows: {part} | {n:,} |")
    print(f"| in all | {sum(found['step'].values()):,} |")
    for part, n in found["pass"].items():
        print(f"| a pass of {part}, without head and sampling | {n:,} |")
    print(f"\nKept for the backward pass: {found['kept'] / 1e9:.1f} GB\n")
    print("| where | queries | keys | keys seen | calls |\n| --- | --- | --- | --- | --- |")
    for part, q, k, mask, n in found["shapes of a step"] + found["shapes of a generation"][3:]:
        print(f"| {part} | {' × '.join(map(str, q))} | {' × '.join(map(str, k))} | {mask} | {n} |")
    print(
        f"\nReads from the device: a step {found['reads of a step']}, "
        f"a generation {found['reads of a generation']}"
    )


# -- tests -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found():
    done = subprocess.run([sys.executable, __file__, "json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_training_and_generation_stay_on_the_device(found):
    """Any tensor that is not would have ended the process; this is what it counted."""
    for sizes in ("tiny", "official"):
        step = found[sizes]["step" if sizes == "tiny" else "reads of a step"]
        assert step == {"asked": 1, "batches": 1, "update": 2}, (
            "the host waits for the device elsewhere, or more often"
        )
    reads = found["official"]["reads of a generation"]
    assert reads == {"common_prefix": 1, "to_host": 5}, (
        "three prompts are admitted one by one, then two steps"
    )
    assert found["tiny"]["transcription"] == {"to_host": 5}, (
        "where nobody speaks, then each of four tokens"
    )


def test_flash_attention_can_run_in_training_and_prefill(found):
    shapes = found["official"]["shapes of a step"] + found["official"]["shapes of a generation"]
    kinds = {(part, mask) for part, _, _, mask, _ in shapes}
    assert {
        ("encoder", "all"),
        ("adapter", "all"),
        ("LLM", "causal"),
        ("prefill", "causal"),
    } <= kinds
    assert {part for part, mask in kinds if mask == "mask"} == {"decoding"}
    assert not torch.backends.cuda.cudnn_sdp_enabled(), "cuDNN's attention would come first on H100"


@pytest.mark.parametrize("mistake, complaint", [
    ("step count", "aten._foreach_add_.Scalar of tensors on"),
    ("buffer", "aten.sub.Tensor of tensors on"),
    ("mask", "a mask in LLM: FlashAttention has none"),
    ("read", "forward waits for the device .*qformer.py"),
])  # fmt: skip
def test_one_mistake_is_found(found, mistake, complaint):
    assert re.match(complaint, found["broken"][mistake])


def small_model():
    torch.manual_seed(0)
    model = memory.build(*TINY, device="cpu", dtype=torch.float32, n_layers=1).train()
    for dropout in (m for m in model.adapter.modules() if hasattr(m, "dropout")):
        dropout.dropout = 0.0
    return model


def gradients_of(model, rows, max_tokens):
    """Of two micro-batches, through train.accumulate. -> loss, the flat buffer"""
    batch = train.Batch([rows[:3], rows[3:]], 4, 4, 0, sum(len(row["target"]) for row in rows))
    flat = train.flat_gradients(list(model.trained().values()))
    return train.accumulate(model, batch, lambda m: m, max_tokens), flat


ROWS = [(80, 9), (120, 5), (75, 1), (99, 12)]


@pytest.mark.parametrize("textbook", [True, False])
def test_long_micro_batches_take_several_passes_with_the_same_gradient(monkeypatch, textbook):
    monkeypatch.setattr(fast, "textbook", textbook)
    model = small_model()
    rows, passes, real = rows_of(model, ROWS), [], model.loss
    monkeypatch.setattr(
        model,
        "loss",
        lambda rows, n_target_tokens: passes.append(len(rows)) or real(rows, n_target_tokens),
    )
    one, flat = gradients_of(model, rows, 10_000)
    assert passes == [3, 1]
    assert flat.abs().max() > 1e-4
    several, again = gradients_of(model, rows, 200)
    assert passes == [3, 1, 1, 1, 1, 1]
    torch.testing.assert_close(several, one)
    torch.testing.assert_close(again, flat, atol=1e-6, rtol=1e-5)


def test_passes_are_no_longer_than_asked():
    row = lambda n: {"ids": [0] * (n - 1), "target": [0]}
    parts = lambda lengths, most: [
        [len(r["ids"]) + 1 for r in part] for part in split_long([row(n) for n in lengths], most)
    ]
    assert parts([], 100) == []
    assert parts([10] * 4, 40) == [[10] * 4]
    assert parts([10] * 5, 40) == [[10] * 4, [10]]
    assert parts([10, 10, 30, 10], 40) == [[10, 10], [30], [10]], "padding counts"
    assert parts([99, 10], 40) == [[99], [10]], "one row is computed whatever its length"


def test_gradients_are_parts_of_one_buffer_and_summed_at_once(monkeypatch):
    model = small_model()
    parameters, rows = list(model.trained().values()), rows_of(model, ROWS)
    loss, flat = gradients_of(model, rows, 10_000)
    expected = torch.autograd.grad(
        model.loss(rows), parameters, allow_unused=True, materialize_grads=True
    )  # a key's bias does nothing
    torch.testing.assert_close(
        flat, torch.cat([gradient.flatten() for gradient in expected]), atol=1e-6, rtol=1e-5
    )
    sums, inside = (
        [],
        lambda: all(p.grad.untyped_storage().data_ptr() == flat.data_ptr() for p in parameters),
    )
    assert inside()
    monkeypatch.setattr(train, "sum_over_ranks", lambda tensor: sums.append(tensor) or tensor)
    optimizer = torch.optim.AdamW(parameters, fused=True)
    train.update(optimizer, parameters, flat, 1e-3, 0.5, loss)
    assert [tensor.numel() for tensor in sums] == [flat.numel(), 1], "one message for all gradients"
    assert inside() and flat.norm() == pytest.approx(min(0.5, float(sums[0].norm())), rel=1e-4), (
        "clipped where they are"
    )


def test_whispers_decoder_leaves_the_gpu(monkeypatch):
    model, moved = small_model(), []
    monkeypatch.setattr(DeSTA, "from_pretrained", lambda *args, **options: model)
    model.whisper.decoder.cpu = lambda: moved.append("decoder")
    train.build(train.Settings(recipe="demo", audio_seconds=1), torch.device("cpu"))
    assert moved == ["decoder"]


def test_log_mels_are_pinned_for_gpus_only(monkeypatch):
    options = []
    monkeypatch.setattr(
        torch.utils.data, "DataLoader", lambda data, **given: options.append(given) or []
    )
    for name in ("cuda", "cpu"):
        train.start_loader([], [], 0, torch.device(name))
    assert [given["pin_memory"] for given in options] == [True, False]


# -- several ranks ---------------------------------------------------------------------------------


def ranks(folder, world_folder):
    """Runs on four processes that are two nodes: the sharded LLM gives the gradients of the whole
    one, with unequal passes.
    """
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    dist.init_process_group("gloo")
    rank, _ = dist.get_rank(), torch.manual_seed(0)
    load = lambda **options: DeSTA.from_pretrained(f"{world_folder}/llm", f"{world_folder}/whisper",
        None, torch.float32, "cpu", n_layers=1, n_queries=4,
                                                   audio_seconds=3, dropout=0.0,
                                                   **options).train()  # fmt: skip
    whole = load()
    torch.manual_seed(0)
    model = load(shard_llm=True)
    shard = model.llm.model.layers[0].mlp.up_proj.weight
    assert tuple(shard.device_mesh.shape) == (2, 2)
    assert shard.to_local().numel() == shard.numel() // 2
    group = dist.get_process_group_ranks(shard.device_mesh["processes"].get_group())
    assert group == [rank // 2 * 2, rank // 2 * 2 + 1], "a block is gathered within its node"

    rows = [rows_of(model, [(40, 5)] * n) for n in (1, 4, 0, 2)]  # each rank its own
    everyone = train.Batch(rows, 7, 7, 0, 35)
    flat = train.flat_gradients(list(model.trained().values()))
    train.accumulate(model, train.Batch([rows[rank]], 7, 7, 0, 35), lambda m: m, 80)
    dist.all_reduce(flat)
    expected = train.flat_gradients(list(whole.trained().values()))
    train.accumulate(whole, everyone, lambda m: m, 10_000)
    torch.testing.assert_close(flat, expected, atol=1e-5, rtol=1e-4)
    assert flat.abs().max() > 1e-3

    weights.check_same_weights(model)
    if rank == 3:
        bias = model.adapter.proj[1].bias.data
        bias[5] = torch.nextafter(bias[5], torch.tensor(9.0))
    with pytest.raises(
        ValueError,
        match="1 weights are not the same on all ranks: adapter.proj.1.bias: all nodes need the same files",
    ):
        weights.check_same_weights(model)
    run.copy_from_rank_0([*model.adapter.parameters(), *model.adapter.buffers()])
    weights.check_same_weights(model)
    (Path(folder) / f"{rank}.fine").touch()
    dist.destroy_process_group()


def test_two_nodes_of_two_processes(tiny_world, tmp_path):
    """Shards within a node, copies between nodes; the same weights on all ranks, to the bit."""
    torchrun(4, "tests/test_gpu.py", "ranks", tmp_path, tiny_world.folder)
    assert len(list(tmp_path.glob("*.fine"))) == 4


# -- with a GPU ------------------------------------------------------------------------------------

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@needs_gpu
def test_flash_attention_runs():
    """Nothing but FlashAttention is allowed: a real training step, and a prefill."""
    model = memory.build(*TINY, device="cuda", n_layers=2).train()
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        model.loss(rows_of(model, ROWS)).backward()
        model.llm.hidden_states(torch.randn(2, 50, 64, device="cuda", dtype=torch.bfloat16))
    assert all(p.grad.isfinite().all() for p in model.adapter.parameters())


@needs_gpu
def test_resume_on_a_gpu(tmp_path):
    model = memory.build(*TINY, device="cuda", n_layers=2).train()
    parameters, record = list(model.trained().values()), {"settings": {}, "made_from": None}
    batch = train.Batch([rows_of(model, ROWS)], 4, 4, 0, 27)
    for step in (1, 2):
        optimizer, flat = (
            torch.optim.AdamW(parameters, fused=True),
            train.flat_gradients(parameters),
        )
        assert checkpoint.load(tmp_path, model, optimizer, record, {}, set()) == step - 1
        loss = train.accumulate(model, batch, lambda m: m, 10_000)
        assert math.isfinite(sum(train.update(optimizer, parameters, flat, 1e-4, 1.0, loss)))
        checkpoint.save(tmp_path, model, optimizer, step, record, keep=2)


if __name__ == "__main__":
    if sys.argv[1:2] == ["ranks"]:
        ranks(*sys.argv[2:])
    elif sys.argv[1:] == ["json"]:
        with tempfile.TemporaryDirectory() as folder:
            found = {
                "tiny": check_tiny(Path(folder) / "tiny"),
                "official": check_official(Path(folder) / "official", 4),
            }
        print(
            json.dumps(
                found
                | {
                    "broken": {
                        what: broken(what) for what in ("step count", "buffer", "mask", "read")
                    }
                }
            )
        )
    else:
        print_tables()
