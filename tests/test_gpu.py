"""What GPUs run, checked without one: training and generation on a device whose tensors have shapes and no memory.

torch's own tools make it: a backend in Python gives the device "gpu", FakeTensorMode its tensors. CPU tensors stay real. What renames a
backend for a whole process needs a process of its own:

    python tests/test_gpu.py           # the checks, and the tables of docs/scale.md
"""

import collections
import contextlib
import importlib.util
import json
import sys
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import train
from engine import attention, checkpoint, decode, run, weights
from llama import LlamaConfig, add_lora
from model import AUDIO_ID
from whisper import WhisperConfig

spec = importlib.util.spec_from_file_location("memory", ROOT / "tools/memory.py")
memory = importlib.util.module_from_spec(spec)
spec.loader.exec_module(memory)

aten = torch.ops.aten
TINY = LlamaConfig(300, 64, 3, 4, 2, 16, 96, 1e-5, 1e4, None, False), WhisperConfig(80, 64, 4, 4, 96, 2, 4, 96, 300, 50)
NO_KERNEL = {"empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "detach", "_unsafe_view", "lift_fresh"}

# engine/decode.py without its form for GPUs: a prompt after what all begin with has a mask, and reads have no name of their own.
FIXED_LANES = hasattr(decode, "FixedLanes")
MASKED = {"decoding"} if FIXED_LANES else {"decoding", "prefill"}
# Where the host waits for the device: (function, what for). The test fails when a read comes from anywhere else.
READS = {
    "training": {"batches": "counts of the global batch", "update": "loss and norm", "asked": "a signal to any rank"},
    "evaluation": {"evaluate": "losses, and how many rows the ranks have"},
    "saving": {"save": "the checkpoint", "save_adapter": "the adapter"},
    "fitting": {"fit": "torch.cov looks at its input"},
    "generation": {"common_prefix": "what all prompts begin with", "to_host" if FIXED_LANES else "generate": "the tokens"},
    "transcription": {"to_host" if FIXED_LANES else "transcribe_encoded": "the tokens, and who has ended"},
}


# -- the device --------------------------------------------------------------------------------------------------------------


class Device(TorchDispatchMode):
    """Every operator on a tensor of the device goes through here: counted, and refused where a tensor has been left on the CPU."""

    def __init__(self):
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.parts, self.may_read, self.reset = ["other"], None, lambda: None
        self.operators, self.shapes, self.reads, self.passes = (collections.Counter() for _ in range(4))

    @contextlib.contextmanager
    def during(self, part):
        self.parts.append(part)
        try:
            yield
        finally:
            self.parts.pop()

    def count(self, name):
        self.operators[self.parts[-1], name] += 1

    def named(self, owner, method, part):
        """From now on what a method runs counts as a part: its name, or a function of the first argument."""
        original = getattr(owner, method)

        def counted(*args, **options):
            name = part(*args) if callable(part) else part
            self.passes[name] += 1
            with self.during(name):
                return original(*args, **options)

        setattr(owner, method, counted)

    def read(self, value):
        """The host asks for a number. It gets a plausible one, if the function that asks may."""
        frame = sys._getframe()
        while not frame.f_code.co_filename.startswith(str(ROOT)) or frame.f_code.co_filename == __file__:
            frame = frame.f_back
            assert frame, "a read from outside the repository"
        name = frame.f_code.co_name
        assert name in self.may_read, f"{name} waits for the device ({frame.f_code.co_filename}:{frame.f_lineno})"
        self.reads[name] += 1
        return value

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.prim.device.default:
            return args[0].fake_device
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        made_on = kwargs.get("device")
        if not any(isinstance(t, FakeTensor) for t in tensors) and (made_on is None or torch.device(made_on).type != "gpu"):
            return func(*args, **kwargs)
        if torch.is_inference_mode_enabled() and func._can_decompose():  # otherwise autograd has done so
            with self:
                return func.decompose(*args, **kwargs)
        if func is aten.equal.default:
            return self.read(False)
        if func is aten._local_scalar_dense.default:
            return self.read(1.0 if tensors[0].is_floating_point() else False if tensors[0].dtype == torch.bool else 20)
        copies = func in (aten._to_copy.default, aten.copy_.default)
        where = {t.device.type for t in tensors}
        assert copies or len(where) <= 1, f"{func} of tensors on {where}: {[(t.device.type, tuple(t.shape)) for t in tensors]}"
        if copies and made_on is not None and torch.device(made_on).type == "cpu" and "gpu" in where:
            self.read(None)
        if func.namespace == "aten" and not func.is_view and func.overloadpacket.__name__ not in NO_KERNEL and where != {"cpu"}:
            self.count(func.overloadpacket.__name__)
        as_fake = lambda t: self.fake.from_tensor(t) if isinstance(t, torch.Tensor) and not isinstance(t, FakeTensor) else t
        args, kwargs = tree_map(as_fake, (args, kwargs))
        with self.fake:
            return func(*args, **kwargs)

    # what stands in for kernels that the device does not have

    def attend(self, q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, enable_gqa=False):
        """What FlashAttention asks for; in decoding, one query a row and a mask for the memory-efficient kernel."""
        part, T, S = self.parts[-1], q.shape[2], k.shape[2]
        assert {t.device.type for t in (q, k, v)} == {"gpu"} and {t.dtype for t in (q, k, v)} == {torch.bfloat16}
        assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1 and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256
        assert k.shape[1] == q.shape[1] or enable_gqa
        assert not is_causal or T == S, "causal attention of a part of the keys starts at the first one"
        if attn_mask is not None:
            assert part in MASKED, f"a mask in {part}: FlashAttention has none"
            assert attn_mask.device == q.device and attn_mask.dtype == q.dtype
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
        patch.setattr(FakeTensor, "tolist", lambda t: [t[(0,) * t.dim()].item()] * t.numel())  # one read, not one per element
        patch.setattr(checkpoint, "save_tensors", save_tensors)
        patch.setattr("model.save_tensors", save_tensors)
        patch.setattr(checkpoint, "load_tensors", lambda path: files[Path(path).name])
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(…, device="gpu") is made on the CPU, then copied
        with d, torch.autograd.set_multithreading_enabled(False):  # backward in this thread: errors keep their place
            yield d
        torch._C._set_only_lift_cpu_tensors(False)


# -- what runs on it ---------------------------------------------------------------------------------------------------------


def build(d, sizes, **changes):
    model = memory.build(*sizes, device="gpu", **changes).train()
    d.named(model.whisper, "encode", "encoder")
    d.named(model.adapter, "forward", "adapter")
    d.named(model.llm, "hidden_states", lambda x, cache=None, positions=None: "LLM" if cache is None else "prefill" if x.shape[1] > 1 else "decoding")
    return model


def rows_of(model, lengths):
    """Prepared rows, on the CPU: (tokens, targets among them), one silent clip each."""
    w, n = model.whisper.config, model.adapter.n_vectors
    mel = torch.zeros(w.num_mel_bins, 2 * w.max_source_positions)
    return [{"ids": [5] * (a - b - n) + [AUDIO_ID] * n, "target": [6] * b, "mels": [mel], "name": "row"} for a, b in lengths]


class Training:
    """One rank's training, made of train.py's functions."""

    def __init__(self, d, model, rows, max_tokens):
        self.d, self.model, self.rows, self.max_tokens = d, model, rows, max_tokens
        self.weights = list(model.trained().values())
        self.gradients = train.flat_gradients(self.weights)
        self.optimizer = torch.optim.AdamW(self.weights, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
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
            assert parameter.grad.untyped_storage()._cdata == storage, f"the gradient of {name} has left the buffer"
            state = self.optimizer.state[parameter]
            assert state.keys() == {"step", "exp_avg", "exp_avg_sq"}, name
            for key, tensor in state.items():
                assert tensor.device == parameter.device and tensor.dtype == torch.float32, f"{key} of {name} is on {tensor.device}"
        frozen = [p for part in (self.model.llm, self.model.whisper) for p in part.parameters()]
        assert not any(p.grad is not None for p in frozen if not p.requires_grad)

    def resume(self, folder):
        """Save, and go on with an optimizer that knows nothing yet."""
        self.d.may_read = READS["saving"]
        checkpoint.save(folder, self.model, self.optimizer, 1, {"settings": {}, "made_from": None}, keep=1)
        self.optimizer = torch.optim.AdamW(self.weights, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
        assert checkpoint.load(folder, self.model, self.optimizer, {"settings": {}, "made_from": None}, {}, set()) == 1
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
    no_ids = dict(suppress=[1, 2], begin_suppress=[3], multilingual=True, transcribe=4, no_timestamps=5, start=6, end=7, no_speech=8)
    model.whisper.vocabulary = types.SimpleNamespace(**no_ids, languages=slice(9, 12), decode=lambda ids: " ".join(map(str, ids)))
    with d.during("transcription"):
        assert model.whisper.transcribe([torch.zeros(16000)] * 2, max_new_tokens=4) == ["20 20 20 20"] * 2


def check_tiny(folder):
    """Everything that a run does on its device, with small shapes and rows of unequal length."""
    with device() as d:
        # Not checkpoint_activations: torch aborts when it computes a block again on such a device.
        for lora_rank in (2, 0):
            model = build(d, TINY, n_layers=2)
            if lora_rank:
                add_lora(model.llm, lora_rank, 0.1)
            rows = rows_of(model, [(80, 9), (90, 5), (75, 1), (99, 12)])
            training = Training(d, model, rows, max_tokens=200)
            training.step()
            training.resume(folder / str(lora_rank))
            training.step()
            d.may_read = READS["evaluation"]
            train.evaluate(model, rows, 2)
            d.may_read = READS["fitting"]
            model.adapter.fit(*train.measure_taps(model, rows, 2), model.llm.model.embed_tokens.weight)
            assert weights.sum_of_bits(model.llm.lm_head.weight).device.type == "gpu"
            training.step()
        d.reads.clear()
        training.step()
        found = {"reads of a step": dict(d.reads)}
        d.reads.clear()
        generate(d, model, [90, 100, 95, 80], 4, batch_size=2)
        found["reads of a generation"] = dict(d.reads)
        if FIXED_LANES:  # without, it makes shapes of what it reads
            transcribe(d, model)
        return found


def broken(what):
    """The same, with one mistake. -> the complaint"""
    with device() as d:
        model = build(d, TINY, n_layers=1)
        training = Training(d, model, rows_of(model, [(80, 9), (90, 5)]), 10_000)
        try:
            training.step()
            if what == "step count":
                state = training.optimizer.state[training.weights[0]]
                state["step"] = torch.tensor(1.0)
            if what == "buffer":
                model.adapter.tap_mean = torch.zeros(64)
            if what == "mask":
                attend = attention.attend
                bias = lambda q: torch.zeros(1, 1, q.shape[2], q.shape[2], dtype=q.dtype, device=q.device)
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


def check_official(folder, n_rows=12):
    """Llama-3.1-8B, Whisper-large-v3, the 131.5M adapter: a step, its resume, a generation. -> figures"""
    with device() as d:
        model = build(d, (memory.LLAMA_31_8B, memory.LARGE_V3))
        assert sum(p.numel() for p in model.trained().values()) == 131_540_224
        rows = rows_of(model, [(memory.TOKENS, memory.TARGETS)] * n_rows)
        training = Training(d, model, rows, max_tokens=6144)
        kept = memory.kept_bytes(model, lambda: training.loss(rows))
        training.step()
        training.resume(folder)
        d.operators.clear(), d.shapes.clear(), d.reads.clear()
        training.step()
        found = {"training": {part: by_part(d, part) for part in ("encoder", "adapter", "LLM", "other", "backward", "clipping and AdamW")}}
        found |= {"kept": kept, "reads of a step": dict(d.reads), "shapes of a step": shapes(d)}
        d.operators.clear(), d.shapes.clear(), d.reads.clear(), d.passes.clear()
        generate(d, model, [300, 290, 280, 260], 4, batch_size=4)
        found["generation"] = {part: by_part(d, part) / d.passes[part] for part in ("prefill", "decoding")}
        found |= {"reads of a generation": dict(d.reads), "shapes of a generation": shapes(d)}
        return found


def by_part(d, part):
    return sum(n for (where, _), n in d.operators.items() if where == part)


def shapes(d):
    return [[part, list(q), list(k), mask, n] for (part, q, k, mask), n in d.shapes.items()]


def everything(folder):
    mistakes = "step count", "buffer", "mask", "read"
    return {
        "tiny": check_tiny(folder / "tiny"),
        "broken": {what: broken(what) for what in mistakes},
        "official": check_official(folder / "official"),
    }


if __name__ == "__main__":
    import tempfile
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(everything(Path(folder)), indent=1))
