"""Another adapter in place of the Q-Former: one class and one line. And adapters that are gone on
from, or that know how to be asked.
"""

import json
import types

import pytest
import torch
from conftest import flags, in_float32, read_jsonl, script
from safetensors.torch import load_file
from test_train import command, steps

import model as model_module
from model import DeSTA, DeSTAConfig, inherit
from qformer import Linear


class MLP(torch.nn.Module):
    """A linear map of the mean of each part of the clip: what somebody's first other adapter may
    look like.
    """

    def __init__(self, config):
        super().__init__()
        self.config, self.n_vectors = config, 3
        self.map = torch.nn.Sequential(
            Linear(config.d_model, 32), torch.nn.GELU(), Linear(32, config.d_llm)
        )

    def forward(self, taps):  # (B, n_taps, T, d_model)
        parts = taps[:, -1].unflatten(1, (3, -1)).mean(2)  # (B, 3, d_model)
        return self.map(parts)

    def fit(self, mean, std, table):
        self.map[2].bias.data.copy_(table.float().mean(0))

    def flops(self, n_frames):
        return 6 * sum(p.numel() for p in self.parameters()) * self.n_vectors

    def state_to_save(self):
        return {name: tensor.detach() for name, tensor in self.state_dict().items()}


def test_an_mlp_in_place_of_the_qformer(tiny_world, tmp_path, monkeypatch):
    monkeypatch.setattr(
        model_module, "QFormer", MLP
    )  # the one line: which class from_pretrained makes
    done = script(*command(tiny_world, tmp_path, max_steps=12, lr=0.01, eval_every=100))
    assert done.status == 0, done.err
    losses = [record["loss"] for record in steps(tmp_path)]
    assert sum(losses[-4:]) < sum(losses[:4]), losses
    assert load_file(tmp_path / "adapter/model.safetensors").keys() == {
        f"perception.connector.map.{n}" for n in ("0.weight", "0.bias", "2.weight", "2.bias")
    }
    again = DeSTA.from_pretrained(tiny_world.llm, tiny_world.whisper, tmp_path / "adapter")
    assert isinstance(
        again.generate(tiny_world.rows[0]["messages"][:2], 4, root=tiny_world.data), list
    )


# -- going on from an adapter ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tiny_world, tmp_path_factory):
    """A run of three steps, in float32, with its last held-out loss."""
    out = tmp_path_factory.mktemp("trained")
    with in_float32():
        assert script(*command(tiny_world, out, eval_rows=-1)).status == 0
    return out


def go_on(world, trained, out, **changes):
    """train.py --init_from, told nothing of the adapter's size, window and models."""
    settings = dict(
        data=world.data / "train.jsonl", eval_data=world.data / "test.jsonl", audio_root=world.data,
        out=out, init_from=trained / "adapter",
        max_steps=1, global_batch=8, micro_batch=2, warmup=1, eval_every=1, eval_rows=-1,
        max_answer_tokens=300,
    )  # fmt: skip
    return script("train.py", *flags(**settings | changes))


@pytest.mark.parametrize("lora", [0, 4])
def test_the_first_loss_is_the_sources(tiny_world, trained, tmp_path, float32, lora):
    """Nothing is standardized or spread again; LoRA that is added starts at nothing."""
    done = go_on(tiny_world, trained, tmp_path, lora_rank=lora)
    assert done.status == 0, done.err
    before = [r for r in read_jsonl(trained / "log.jsonl") if "eval_loss" in r][-1]
    after = [r for r in read_jsonl(tmp_path / "log.jsonl") if "eval_loss" in r][0]
    assert after["step"] == 0
    assert after["eval_loss"] == pytest.approx(before["eval_loss"], rel=1e-5)
    saved = DeSTAConfig.from_adapter(tmp_path / "adapter")
    assert (saved.n_layers, saved.n_queries, saved.audio_seconds, saved.lora_rank) == (
        1,
        4,
        3,
        lora,
    )
    a, b = (load_file(folder / "adapter/model.safetensors") for folder in (trained, tmp_path))
    assert any(not torch.equal(a[name], b[name]) for name in a), "nothing was learned"


def test_lora_is_gone_on_from_as_well(tiny_world, trained, tmp_path, float32):
    assert go_on(tiny_world, trained, tmp_path / "a", lora_rank=4, max_steps=2).status == 0
    assert go_on(tiny_world, tmp_path / "a", tmp_path / "b").status == 0
    last, first = (
        [r["eval_loss"] for r in read_jsonl(tmp_path / n / "log.jsonl") if "eval_loss" in r]
        for n in "ab"
    )
    assert first[0] == pytest.approx(last[-1], rel=1e-5)
    assert DeSTAConfig.from_adapter(tmp_path / "b/adapter").lora_rank == 4


def test_flags_that_contradict_the_adapter_are_refused(tiny_world, trained, tmp_path):
    done = go_on(tiny_world, trained, tmp_path, n_queries=5)
    assert done.status == 1
    assert "--n_queries 5" in done.err
    assert f"{trained}/adapter has 4" in done.err


def test_flag_then_adapter_then_recipe(trained):
    settings = types.SimpleNamespace(
        given={"audio_seconds"}, audio_seconds=2, n_layers=6, llm="elsewhere", lora_rank=8
    )
    inherit(settings, trained / "adapter", ("audio_seconds", "n_layers", "llm"))
    saved = DeSTAConfig.from_adapter(trained / "adapter")
    assert settings.audio_seconds == 2
    assert settings.n_layers == 1
    assert settings.llm == saved.llm


# -- asking ----------------------------------------------------------------------------------------


def test_the_adapter_knows_how_to_be_asked(tiny_world, trained):
    """What stood before the question in the training rows, the limit, the models: model.py needs
    the adapter's folder alone.
    """
    saved = DeSTAConfig.from_adapter(trained / "adapter")
    assert saved.context == [{"role": "system", "content": "You hear a clip."}]
    assert saved.max_answer_tokens == 300
    assert saved.llm == str(tiny_world.llm)
    assert saved.whisper == str(tiny_world.whisper)
    clip = tiny_world.data / "clips/03.wav"
    done = script(
        "model.py", clip, "--prompt", "Who?", "--adapter", trained / "adapter", "--verbose"
    )
    assert done.status == 0
    assert "system\nYou hear a clip." in done.out
    assert "transcript of" in done.out
    same = DeSTA.from_pretrained(tiny_world.llm, tiny_world.whisper, trained / "adapter")
    question = {
        "role": "user",
        "content": "<|AUDIO|>\n\nWho?",
        "audios": [{"audio": str(clip), "text": None}],
    }
    assert done.out.endswith(same.generate([*saved.context, question], 300)[0] + "\n")


def test_conversation(tiny_world, trained, monkeypatch):
    """Two turns and a second clip; a wrong path does not end it, Ctrl-D does."""
    said = iter(
        ["Who?", "/audio nowhere.wav", f"/audio {tiny_world.data}/clips/04.wav", "And now?"]
    )

    def type_in(prompt):
        try:
            return next(said)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", type_in)
    asked, generate = [], DeSTA.generate
    monkeypatch.setattr(
        DeSTA,
        "generate",
        lambda self, messages, *args: asked.append(messages) or generate(self, messages, *args),
    )
    monkeypatch.setattr("sys.modules", dict(__import__("sys").modules))
    done = script(
        "model.py",
        tiny_world.data / "clips/03.wav",
        "--adapter",
        trained / "adapter",
        "--max_new_tokens",
        4,
    )
    assert done.status == 0 and "nowhere.wav" in done.err, done.err


def test_official_fields_stand_where_the_official_code_reads_them(trained):
    config = json.loads((trained / "adapter/config.json").read_text())
    official = (
        "llm_model_id",
        "encoder_model_id",
        "connector_mode",
        "qformer_num_hidden_layers",
        "prompt_size",
        "audio_locator",
        "placeholder_token",
    )
    assert all(name in config for name in official)
    assert config["connector_mode"] == "qformer_1"


def test_the_released_adapters_config_is_read(tmp_path):
    """Without our fields: 30 s, no context, no limit known."""
    config = dict(
        llm_model_id="meta/Llama",
        encoder_model_id="openai/whisper",
        connector_mode="qformer_1",
        qformer_num_hidden_layers=6,
        prompt_size=64,
        use_lora=True,
    )
    (tmp_path / "config.json").write_text(json.dumps(config))
    saved = DeSTAConfig.from_adapter(tmp_path)
    assert (saved.n_layers, saved.n_queries, saved.audio_seconds, saved.long_audio) == (
        6,
        64,
        30,
        "cut",
    )
    assert (saved.context, saved.max_answer_tokens, saved.lora_rank) == (None, -1, 16)
