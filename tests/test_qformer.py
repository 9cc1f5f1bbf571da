"""qformer.py against transformers' BERT, layer by layer; the official sizes and names; standardized
taps; dtypes and dropout.
"""

import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import randomize
from transformers.models.bert.modeling_bert import BertEncoder

from engine import fast
from engine.attention import attend
from qformer import QFormer, QFormerConfig

TINY = QFormerConfig(d_model=64, n_heads=4, d_llm=48, n_layers=3, n_queries=5, d_ff=96)


class ReferenceQFormer(torch.nn.Module):
    """The official adapter put together from transformers' parts, one call per tap. Its attribute
    names make the official tensor names.
    """

    def __init__(self, c):
        super().__init__()
        bert = transformers.BertConfig(
            hidden_size=c.d_model, num_attention_heads=c.n_heads, num_hidden_layers=c.n_layers,
            intermediate_size=c.d_ff,
            is_decoder=True, add_cross_attention=True, attn_implementation="eager",
            # eager: no mask but the one that is given
        )  # fmt: skip
        self.layer_prompts = torch.nn.ParameterList(
            torch.empty(1, c.n_queries, c.d_model) for _ in range(c.n_taps)
        )
        self.layer_weights = torch.nn.Parameter(torch.empty(c.n_queries, c.n_taps))
        self.qformer = BertEncoder(bert)
        self.proj = torch.nn.Sequential(
            torch.nn.LayerNorm(c.d_model), torch.nn.Linear(c.d_model, c.d_llm)
        )

    def forward(self, taps):
        mix, mixed = self.layer_weights.softmax(-1), 0
        for i, queries in enumerate(self.layer_prompts):
            x, everything_visible = (
                queries.expand(len(taps), -1, -1),
                torch.zeros(1, 1, queries.shape[1], queries.shape[1]),
            )
            seen = self.qformer(
                x, attention_mask=everything_visible, encoder_hidden_states=taps[:, i]
            ).last_hidden_state
            mixed = mixed + mix[:, i, None] * seen
        return self.proj(mixed)


def outputs_by_name(module, names, run):
    """{name of a submodule: its outputs, call by call} while run() runs, which is called once; plus
    run()'s own result as "".
    """
    seen = {name: [] for name in names}
    hooks = [
        module.get_submodule(n).register_forward_hook(
            lambda _, inputs, output, n=n: seen[n].append(output)
        )
        for n in names
    ]
    result = run()
    for hook in hooks:
        hook.remove()
    return seen | {"": [result]}


@pytest.fixture(params=["textbook", "fast"])
def path(request, monkeypatch):
    """Both forms of the cross-attention: the one that GPUs run, and the one that CPUs run."""
    monkeypatch.setattr(fast, "textbook", request.param == "textbook")
    return request.param


@torch.no_grad()
def test_equals_bert_layer_by_layer(path):
    torch.manual_seed(0)
    ours, reference = randomize(QFormer(TINY)), ReferenceQFormer(TINY).eval()
    reference.load_state_dict(ours.state_dict())  # strict: the same names and shapes
    taps = torch.randn(
        2, 4, 30, 64
    )  # at three times the size the reference itself is 2e-5 from its own result in float64
    names = [
        f"qformer.layer.{n}.{part}"
        for n in range(3)
        for part in ("attention.output", "crossattention.output", "output")
    ] + ["proj.0"]
    mine, theirs = (
        outputs_by_name(ours, names, lambda: ours(taps)),
        outputs_by_name(reference, names, lambda: reference(taps)),
    )
    for name in names[:-1]:
        expected = torch.stack(theirs[name], 1).flatten(
            0, 1
        )  # they call once per tap, ours is one batch of 2 * 4
        torch.testing.assert_close(
            mine[name][0],
            expected,
            atol=1e-5,
            rtol=1e-5,
            msg=lambda m, name=name: f"{name} is the first to differ: {m}",
        )
    for name, what in (
        ("proj.0", "mixing of the taps, or the LayerNorm after it,"),
        ("", "last Linear"),
    ):
        torch.testing.assert_close(
            mine[name],
            theirs[name],
            atol=1e-5,
            rtol=1e-5,
            msg=lambda m, what=what: f"the {what} differs: {m}",
        )


def test_official_size():
    with torch.device("meta"):
        adapter = QFormer(
            QFormerConfig(d_model=1280, n_heads=20, d_llm=4096)
        )  # Whisper large-v3, Llama-3.1-8B
    assert sum(p.numel() for p in adapter.parameters()) == 131_540_224
    shapes = {name: tuple(tensor.shape) for name, tensor in adapter.state_dict().items()}
    linears = [
        f"{part}.self.{name}"
        for part in ("attention", "crossattention")
        for name in ("query", "key", "value")
    ]
    linears += ["attention.output.dense", "crossattention.output.dense"]
    d = 1280
    expected = {f"layer_prompts.{i}": (1, 64, d) for i in range(4)} | {"layer_weights": (64, 4)}
    for n in range(6):
        layer = {f"{name}.weight": (d, d) for name in linears} | {
            f"{name}.bias": (d,) for name in linears
        }
        layer |= {"intermediate.dense.weight": (3072, d), "intermediate.dense.bias": (3072,)}
        layer |= {"output.dense.weight": (d, 3072), "output.dense.bias": (d,)}
        layer |= {
            f"{part}output.LayerNorm.{name}": (d,)
            for part in ("attention.", "crossattention.", "")
            for name in ("weight", "bias")
        }
        expected |= {f"qformer.layer.{n}.{name}": shape for name, shape in layer.items()}
    expected |= {
        "proj.0.weight": (d,),
        "proj.0.bias": (d,),
        "proj.1.weight": (4096, d),
        "proj.1.bias": (4096,),
    }
    assert shapes == expected


def test_official_start():
    """Queries N(0, 1), taps mixed evenly, Linear layers with PyTorch's own start and not BERT's
    N(0, 0.02).
    """
    torch.manual_seed(0)
    adapter = QFormer(QFormerConfig(d_model=64, n_heads=4, d_llm=48))
    queries = torch.cat(list(adapter.layer_prompts))
    assert abs(queries.std() - 1) < 0.02
    assert abs(queries.mean()) < 0.02
    assert not adapter.layer_weights.any()
    weight = adapter.qformer.layer[0].attention.self["query"].weight
    assert 0.95 / 8 < weight.abs().max() <= 1 / 8, "uniform within 1 / sqrt(d_model)"


@torch.no_grad()
def test_standardized_taps_are_folded_into_the_official_file():
    torch.manual_seed(0)
    ours, folded = randomize(QFormer(TINY)), QFormer(TINY).eval()
    mean, std = torch.randn(64) * 2, torch.rand(64) * 3 + 0.3
    taps = torch.randn(2, 4, 30, 64) * std + mean
    plain = ours(taps)
    ours.tap_mean.copy_(mean), ours.tap_std.copy_(std)
    expected = ours(taps)
    assert (expected - plain).abs().max() > 0.1, (
        "standardizing made no difference: this test shows nothing"
    )
    folded.load_state_dict(ours.state_to_save())
    torch.testing.assert_close(folded(taps), expected, atol=1e-5, rtol=1e-5)
    ours.tap_mean.zero_(), ours.tap_std.fill_(1)
    assert torch.equal(ours(taps), plain), (
        "state_to_save must leave the weights being trained alone"
    )


def test_bf16_in_bf16_out_with_float32_gradients(path):
    torch.manual_seed(0)
    adapter = randomize(QFormer(TINY))
    taps = torch.randn(2, 4, 30, 64)
    out = adapter(taps.bfloat16())
    out.float().square().sum().backward()
    assert out.dtype == torch.bfloat16
    assert out.shape == (2, 5, 48)
    assert (out.float() - adapter(taps)).norm() / out.float().norm() < 0.05
    for (
        name,
        p,
    ) in (
        adapter.named_parameters()
    ):  # softmax over keys cannot see a key bias: that gradient is rounding noise
        assert p.dtype == torch.float32
        assert "key.bias" in name or p.grad.dtype == torch.float32 and p.grad.any(), name


def test_dropout(path, monkeypatch):
    """In training only: on each of the three outputs of a layer, and on the weights of both
    attentions.
    """
    torch.manual_seed(0)
    adapter = QFormer(QFormerConfig(d_model=64, n_heads=4, d_llm=48, n_layers=2, n_queries=5))
    taps, rates, dropout = torch.randn(1, 4, 10, 64), [], F.dropout

    def seen_dropout(
        x, p, training=True
    ):  # a fast cross-attention drops its own weights, (B, H * N, T)
        rates.append(("weights" if x.shape[-1] == taps.shape[2] else "output", p * training))
        return dropout(x, p, training)

    def seen_attend(q, k, v, dropout=0.0):
        rates.append(("weights", dropout))
        return attend(q, k, v, dropout=dropout)

    monkeypatch.setattr(F, "dropout", seen_dropout)
    monkeypatch.setattr("qformer.attend", seen_attend)
    layer = ["weights", "output", "weights", "output", "output"]
    assert not torch.equal(adapter.train()(taps), adapter(taps))
    assert rates == 4 * [(name, 0.1) for name in layer]
    rates.clear()
    assert torch.equal(adapter.eval()(taps), adapter(taps))
    assert rates == 4 * [(name, 0.0) for name in layer]


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_fast_cross_attention_equals_the_textbook(rate, monkeypatch):
    """With the same weights dropped: the value's bias counts as often as the weights that are left
    sum to.
    """
    torch.manual_seed(0)
    layer = randomize(QFormer(TINY)).qformer.layer[0].crossattention
    layer.dropout = rate
    x, audio = torch.randn(2, 5, 64, requires_grad=True), torch.randn(2, 30, 64)
    kept = (torch.rand(2, 4, 5, 30) >= rate) / (1 - rate)
    monkeypatch.setattr(
        F, "dropout", lambda w, p, training: w * kept.view(w.shape) if w.shape[-1] == 30 else w
    )
    monkeypatch.setattr(
        "qformer.attend",
        lambda q, k, v, dropout: F.dropout((q @ k.mT / 4).softmax(-1), rate, True) @ v,
    )
    results = []
    for textbook in (True, False):
        monkeypatch.setattr(fast, "textbook", textbook)
        out = layer(x, audio)
        weights = [p for name, p in layer.named_parameters() if "key.bias" not in name]
        results.append([out, *torch.autograd.grad(out.square().sum(), [x, *weights])])
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)


def test_taps_of_another_whisper_are_refused():
    with pytest.raises(AssertionError, match=r"taps \(2, 3, 30, 64\)"):
        QFormer(TINY)(torch.randn(2, 3, 30, 64))
