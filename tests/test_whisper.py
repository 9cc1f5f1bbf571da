"""whisper.py against transformers on tiny random checkpoints (fp32, 1e-5) and on the real tiny.en;
loading, resampling, errors.
"""

import json
import math
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import transformers
from conftest import script
from safetensors.torch import load_file, save_file
from transformers.convert_slow_tokenizer import bytes_to_unicode

import whisper
from whisper import SAMPLE_RATE, Vocabulary, Whisper, load_audio, log_mel, resample, tap_layers

transformers.logging.set_verbosity_error()
SECONDS = 2  # the random checkpoints hear 2 s: 100 positions
SPECIAL = [
    "<|endoftext|>",
    "<|startoftranscript|>",
    "<|en|>",
    "<|zh|>",
    "<|de|>",
    "<|es|>",
    "<|translate|>",
    "<|transcribe|>",
    "<|startoflm|>",
    "<|startofprev|>",
    "<|nospeech|>",
    "<|notimestamps|>",
    "<|0.00|>",
    "<|0.02|>",
]
N_WORDS = 200
ID = {name: N_WORDS + i for i, name in enumerate(SPECIAL)}


def make_checkpoint(
    folder, multilingual=False, suppress=(), begin_suppress=(), seed=0, n_mels=80, babbles=False
):
    """A random Whisper in the Hugging Face layout; token i reads " wi". Returns transformers'
    model.

    Untrained decoders hardly listen and, with a tied embedding, repeat their last word for ever;
    one that babbles says different things about different clips, at the price of larger rounding
    errors.
    """
    torch.manual_seed(seed)
    config = transformers.WhisperConfig(
        num_mel_bins=n_mels,
        d_model=64,
        encoder_layers=4,
        encoder_attention_heads=4,
        encoder_ffn_dim=96,
        decoder_layers=3,
        decoder_attention_heads=2,
        decoder_ffn_dim=112,
        vocab_size=N_WORDS + len(SPECIAL),
        max_source_positions=50 * SECONDS,
        max_target_positions=40,
        init_std=0.15,
        bos_token_id=ID["<|endoftext|>"],
        eos_token_id=ID["<|endoftext|>"],
        pad_token_id=ID["<|endoftext|>"],
        decoder_start_token_id=ID["<|startoftranscript|>"],
    )
    model = transformers.WhisperForConditionalGeneration(config).eval()
    for (
        name,
        parameter,
    ) in (
        model.named_parameters()
    ):  # transformers starts biases at 0 and norms at 1, which would hide a forgotten one
        if name.endswith("bias") or "layer_norm" in name:
            torch.nn.init.normal_(parameter, mean=float("norm.weight" in name), std=0.1)
    if babbles:
        model.model.decoder.embed_positions.weight.data *= 8
        for layer in model.model.decoder.layers:
            layer.encoder_attn.q_proj.weight.data *= 6
            layer.encoder_attn.out_proj.weight.data *= 8
    generation = model.generation_config
    generation.suppress_tokens, generation.begin_suppress_tokens = (
        list(suppress) or None,
        [*begin_suppress, ID["<|endoftext|>"]],
    )
    generation.is_multilingual, generation.no_timestamps_token_id = (
        multilingual,
        ID["<|notimestamps|>"],
    )
    generation.return_timestamps = False
    if multilingual:
        generation.lang_to_id = {name: ID[name] for name in SPECIAL[2:6]}
        generation.task_to_id = {
            "translate": ID["<|translate|>"],
            "transcribe": ID["<|transcribe|>"],
        }
    model.save_pretrained(folder)
    vocab = {f"Ġw{i}": i for i in range(N_WORDS)}
    tokenizer = {
        "model": {"vocab": vocab},
        "added_tokens": [{"content": name, "id": id} for name, id in ID.items()],
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return model


@pytest.fixture(scope="module")
def random_pair(tmp_path_factory):
    """The same random English-only weights in transformers and in whisper.py, and the folder."""
    folder = tmp_path_factory.mktemp("random-whisper")
    theirs = make_checkpoint(folder)
    return theirs, Whisper.from_pretrained(folder), folder


def synthetic_clips(n=6, seed=0):
    """Chirps with noise, of different lengths, one of them over 2 s."""
    generator = torch.Generator().manual_seed(seed)
    clips = []
    for i in range(n):
        t = torch.arange(int((0.3 + 0.4 * i) * SAMPLE_RATE)) / SAMPLE_RATE
        clips.append(
            0.3 * torch.sin(2 * math.pi * (200 + 150 * i) * t * (1 + i * t))
            + 0.02 * torch.randn(len(t), generator=generator)
        )
    return clips


def sine(hertz, rate, seconds=1.0):
    return torch.sin(
        2 * math.pi * hertz * torch.arange(int(rate * seconds), dtype=torch.float64) / rate
    ).float()


def text_of(ids):
    return "".join(f" w{id}" for id in ids.tolist() if id < N_WORDS).strip() or " "


# -- parity with transformers ----------------------------------------------------------------------


@pytest.mark.parametrize("n_mels", [80, 128])
@pytest.mark.parametrize("source", ["synthetic", "real"])
def test_log_mel_equals_transformers(n_mels, source, request):
    clips = synthetic_clips() + [
        torch.zeros(1000),
        torch.randn(31 * SAMPLE_RATE),
    ]  # silence; longer than 30 s
    if source == "real":
        clips = [load_audio(path) for path in request.getfixturevalue("real_speech_clips")]
    extractor = transformers.WhisperFeatureExtractor(feature_size=n_mels)
    theirs = extractor(
        [clip.numpy() for clip in clips], sampling_rate=SAMPLE_RATE, return_tensors="pt"
    ).input_features
    torch.testing.assert_close(log_mel(clips, n_mels), theirs, atol=1e-5, rtol=0)
    assert np.abs(whisper.mel_filters(n_mels).numpy() - extractor.mel_filters.T).max() < 1e-7


def test_log_mel_of_a_clip_does_not_depend_on_its_neighbours():
    loud, quiet = torch.randn(SAMPLE_RATE), torch.randn(SAMPLE_RATE) * 1e-4
    torch.testing.assert_close(log_mel([loud, quiet], 80, 6)[1], log_mel([quiet], 80, 6)[0])
    assert log_mel([loud, quiet], 80, 6).shape == (2, 80, 600)


def assert_same_taps(ours, encoder, mel):
    """Every block's output against transformers' (by hooks: its `hidden_states` end with the
    normalized one).
    """
    theirs = []
    hooks = [
        layer.register_forward_hook(lambda module, inputs, output: theirs.append(output))
        for layer in encoder.layers
    ]
    with torch.no_grad():
        final = encoder(mel).last_hidden_state
    for hook in hooks:
        hook.remove()
    for n, expected in enumerate(theirs):
        error = ((ours[:, n] - expected).abs() / (1 + expected.abs())).max().item()
        assert error < 1e-5, (
            f"the first difference is in encoder block {n} (relative error {error:.1e}); "
            "the blocks before it agree"
        )
    return final


@pytest.mark.parametrize("n_mels", [80, 128])
def test_encoder_equals_transformers_at_every_block(n_mels, tmp_path):
    theirs = make_checkpoint(tmp_path, n_mels=n_mels)
    ours = Whisper.from_pretrained(tmp_path)
    mel = log_mel(synthetic_clips(), n_mels, SECONDS)
    taps = ours.encode(mel, [0, 1, 2, 3])
    assert taps.shape == (6, 4, 100, 64)
    final = assert_same_taps(taps, theirs.model.encoder, mel)
    torch.testing.assert_close(ours.encoder.layer_norm(taps[:, 3]), final, atol=1e-5, rtol=1e-5)


def test_decoder_logits_equal_transformers_with_and_without_cache(random_pair):
    theirs, ours, _ = random_pair
    hidden = torch.randn(3, 100, 64)
    tokens = torch.randint(0, N_WORDS + len(SPECIAL), (3, 20))
    with torch.no_grad():
        expected = theirs(encoder_outputs=(hidden,), decoder_input_ids=tokens).logits
        cross_kv = ours.decoder.cross_keys_values(hidden)
        torch.testing.assert_close(ours.decoder(tokens, cross_kv), expected, atol=1e-5, rtol=1e-5)
        cache = torch.full(
            (3, 2, 3, 2, 25, 32), torch.nan
        )  # NaN: what was never written must never be read
        first = ours.decoder(tokens[:, :5], cross_kv, cache)
        rest = [ours.decoder(tokens[:, i : i + 1], cross_kv, cache, start=i) for i in range(5, 20)]
        torch.testing.assert_close(torch.cat([first, *rest], 1), expected, atol=1e-5, rtol=1e-5)
        with pytest.raises(AssertionError, match="one by one"):
            ours.decoder(tokens[:, :2], cross_kv, cache, start=3)


@pytest.mark.parametrize("multilingual", [False, True])
def test_transcripts_equal_transformers(multilingual, tmp_path):
    clips = synthetic_clips()
    mel = log_mel(clips, 80, SECONDS)
    options = {"task": "transcribe"} if multilingual else {}

    def both(folder, suppress=(), begin_suppress=()):
        folder.mkdir()
        theirs = make_checkpoint(
            folder, multilingual, suppress, begin_suppress, seed=2, babbles=True
        )
        ours = Whisper.from_pretrained(folder)
        ids = theirs.generate(mel, max_new_tokens=12, do_sample=False, num_beams=1, **options)
        texts = ours.transcribe(clips, max_new_tokens=12, no_speech_threshold=2)
        assert texts == [text_of(row) for row in ids]
        assert len(set(texts)) > 3, (
            "the random model says the same about every clip: this test shows little"
        )
        # ragged batches and single clips must agree
        assert texts == [ours.transcribe([clip], 12, no_speech_threshold=2)[0] for clip in clips]
        assert texts == ours.transcribe(clips, 12, batch_size=4, no_speech_threshold=2)
        assert texts == ours.transcribe_encoded(
            ours.encode(mel, tap_layers(4))[:, -1], 12, no_speech_threshold=2
        )
        return theirs, texts

    theirs, texts = both(tmp_path / "plain")
    if multilingual:
        assert len(set(theirs.detect_language(mel).tolist())) > 1, (
            "one language for all clips: this test shows little"
        )
    first_words = {text.split()[0] for text in texts}
    last_words = {text.split()[-1] for text in texts} - first_words
    numbers = lambda words: [int(word[1:]) for word in words]
    _, suppressed = both(tmp_path / "suppressed", numbers(last_words), numbers(first_words))
    assert last_words
    assert not last_words & set(" ".join(suppressed).split())
    assert not first_words & {text.split()[0] for text in suppressed}
    assert first_words & set(" ".join(suppressed).split())


def test_no_speech_is_one_blank(random_pair):
    theirs, ours, _ = random_pair
    clips = synthetic_clips()
    with torch.no_grad():
        start = torch.full((len(clips), 1), ID["<|startoftranscript|>"])
        logits = theirs(log_mel(clips, 80, SECONDS), decoder_input_ids=start).logits[:, 0]
    probability = logits.softmax(-1)[:, ID["<|nospeech|>"]]
    threshold = probability.sort().values[2:4].mean().item()  # three clips below, three above
    texts = ours.transcribe(clips, 5, no_speech_threshold=threshold)
    assert [text == " " for text in texts] == (probability > threshold).tolist()
    assert texts.count(" ") == 3
    assert ours.transcribe([]) == []


def test_taps():
    expected = {
        32: [7, 15, 23, 31],
        24: [5, 11, 17, 23],
        12: [2, 5, 8, 11],
        6: [1, 2, 4, 5],
        4: [0, 1, 2, 3],
    }
    assert {n: tap_layers(n) for n in expected} == expected


def test_encode_runs_no_block_in_vain_and_keeps_the_asked_order(random_pair):
    _, ours, _ = random_pair
    mel = log_mel(synthetic_clips(2), 80, SECONDS)
    every = ours.encode(mel, [0, 1, 2, 3])
    assert torch.equal(ours.encode(mel, [2, 0]), every[:, [2, 0]])
    ran = []
    hooks = [
        block.register_forward_hook(lambda module, inputs, output, n=n: ran.append(n))
        for n, block in enumerate(ours.encoder.layers)
    ]
    ours.encode(mel[:1], [1])
    for hook in hooks:
        hook.remove()
    assert ran == [0, 1]
    assert ours.encode(log_mel(synthetic_clips(2), 80, 1), [3]).shape == (
        2,
        1,
        50,
        64,
    )  # shorter clips use the first positions
    for bad_mel, layers, message in (
        (mel[:, :79], [0], "mel bins"),
        (log_mel([sine(9, 9)], 80, 3), [0], "mel frames"),
        (mel, [4], "taps"),
    ):
        with pytest.raises(AssertionError, match=message):
            ours.encode(bad_mel, layers)


def test_frozen_yet_its_outputs_can_be_trained_on(random_pair):
    _, ours, _ = random_pair
    assert not ours.training
    assert not any(parameter.requires_grad for parameter in ours.parameters())
    adapter = torch.nn.Linear(64, 1)
    adapter(
        ours.encode(log_mel(synthetic_clips(1), 80, SECONDS), [3])
    ).sum().backward()  # inference_mode tensors would be refused
    assert adapter.weight.grad.abs().sum() > 0


def test_bfloat16(random_pair):
    _, ours, folder = random_pair
    half = Whisper.from_pretrained(folder, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    mel = log_mel(synthetic_clips(), 80, SECONDS)
    expected, taps = ours.encode(mel, [0, 3]), half.encode(mel, [0, 3])
    assert taps.dtype == torch.bfloat16
    assert (taps - expected).norm() / expected.norm() < 0.03
    assert all(
        text.startswith("w")
        for text in half.transcribe(synthetic_clips(), 5, no_speech_threshold=2)
    )


# -- loading weights and vocabulary ----------------------------------------------------------------


def test_shards_load_like_one_file(random_pair, tmp_path):
    theirs, ours, folder = random_pair
    theirs.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    sharded = Whisper.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(sharded[name], tensor) for name, tensor in ours.state_dict().items())


NAME = "model.decoder.layers.1.encoder_attn.v_proj.bias"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda state: state.pop(NAME), f"missing: {NAME}"),
        (
            lambda state: state.update({NAME: torch.zeros(63)}),
            rf"wrong shape: {NAME} \[63\], expected \[64\]",
        ),
        (
            lambda state: state.update({"model.encoder.extra": torch.zeros(1)}),
            "unknown: model.encoder.extra",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(random_pair, tmp_path, change, message):
    folder = random_pair[2]
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    state = load_file(folder / "model.safetensors")
    state["proj_out.weight"] = torch.zeros(1)  # the tied head may or may not be there
    save_file(state, tmp_path / "model.safetensors")
    Whisper.from_pretrained(tmp_path)
    change(state)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        Whisper.from_pretrained(tmp_path)


def test_unusable_folders(random_pair, tmp_path):
    with pytest.raises(FileNotFoundError, match="demo/prepare.py"):
        Whisper.from_pretrained(tmp_path / "nowhere")
    for file in random_pair[2].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="model.safetensors is damaged"):
        Whisper.from_pretrained(tmp_path)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="model.safetensors"):
        Whisper.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match="model_type is 'llama'"):
        Whisper.from_pretrained(tmp_path)


def test_vocabulary_from_the_older_files(random_pair, tmp_path):
    """vocab.json + added_tokens.json, <|nocaptions|> for <|nospeech|>, no generation_config.json."""
    folder = random_pair[2]
    file = json.loads((folder / "tokenizer.json").read_text())
    (tmp_path / "vocab.json").write_text(json.dumps(file["model"]["vocab"]))
    added = {
        token["content"].replace("nospeech", "nocaptions"): token["id"]
        for token in file["added_tokens"]
    }
    (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    (tmp_path / "config.json").write_text(
        json.dumps({"vocab_size": 51865, "suppress_tokens": [7], "begin_suppress_tokens": None})
    )
    new, old = Vocabulary(folder), Vocabulary(tmp_path)
    assert (old.start, old.end, old.no_speech, old.languages, old.text[5]) == (
        new.start,
        new.end,
        ID["<|nospeech|>"],
        slice(202, 206),
        "Ġw5",
    )
    assert (old.multilingual, old.suppress, old.begin_suppress) == (True, [7], [])
    assert not new.multilingual


def test_byte_alphabet():
    assert whisper.BYTE_OF == {char: byte for byte, char in bytes_to_unicode().items()}


# -- audio files -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rate", [6000, 8000, 11025, 22050, 24000, 32000, 44100, 48000, 96000, 44056, 16001]
)
def test_resampling_keeps_what_fits_and_removes_the_rest(rate):
    inside = 0.44 * min(
        rate, SAMPLE_RATE
    )  # close to the lower Nyquist frequency, still in the pass band
    for hertz in (200, inside):
        out = resample(sine(hertz, rate), rate, SAMPLE_RATE)
        assert len(out) == SAMPLE_RATE
        middle = slice(1000, -1000)  # at the ends the filter sees the silence around the clip
        torch.testing.assert_close(
            out[middle], sine(hertz, SAMPLE_RATE)[middle], atol=3e-5, rtol=0
        )  # amplitude and phase
    for hertz in (8100, 11000, 0.49 * rate):
        if 8000 < hertz < rate / 2:
            assert resample(sine(hertz, rate), rate, SAMPLE_RATE)[1000:-1000].abs().max() < 3e-5, (
                f"{hertz} Hz came through"
            )


def test_resampling_lengths_and_short_clips():
    for n in (1, 2, 5, 441, 1000):
        assert len(resample(torch.randn(n), 44100, 16000)) == math.ceil(n * 16000 / 44100)
        assert len(resample(torch.randn(n), 8000, 16000)) == 2 * n
    noise = torch.randn(100)
    assert resample(noise, 16000, 16000) is noise


@pytest.mark.parametrize(
    "extension, tolerance", [("wav", 1e-4), ("flac", 1e-4), ("ogg", 0.05), ("mp3", 0.08)]
)
@pytest.mark.parametrize("rate, channels", [(16000, 1), (44100, 2), (8000, 3)])
def test_formats_rates_and_channels(tmp_path, extension, tolerance, rate, channels):
    if extension == "mp3" and channels == 3:
        channels = 2
    tone = 0.5 * sine(440, rate, 1.5)
    # the channels differ, and their mean is the tone: taking one channel, or the sum, would show
    samples = torch.stack([tone * (1 + 0.4 * (c - (channels - 1) / 2)) for c in range(channels)], 1)
    path = tmp_path / f"clip.{extension}"
    soundfile.write(path, samples.numpy(), rate)
    waveform = load_audio(path)
    assert waveform.dtype == torch.float32
    assert waveform.shape == (24000,)
    expected = 0.5 * sine(440, SAMPLE_RATE, 1.5)
    assert (waveform - expected)[2000:-2000].abs().max() < tolerance
    assert torch.equal(load_audio(str(path), max_seconds=0.3), waveform[:4800])


def test_only_the_asked_seconds_are_read(tmp_path, monkeypatch):
    path = tmp_path / "long.wav"
    soundfile.write(path, np.random.default_rng(0).standard_normal(60 * 8000) * 0.1, 8000)
    read, asked = soundfile.SoundFile.read, []
    monkeypatch.setattr(
        soundfile.SoundFile,
        "read",
        lambda self, frames=-1, **options: asked.append(frames) or read(self, frames, **options),
    )
    assert len(load_audio(path, max_seconds=2)) == 2 * SAMPLE_RATE
    assert asked == [3 * 8000]


def write_wav(path, samples=8000, subtype="PCM_16", value=0.1):
    soundfile.write(path, np.full(samples, value), 16000, subtype=subtype)
    return path


def cut(path, share):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    return path


def load(path, **options):
    """-> waveform, warnings. Whatever the file, its start is the start of the whole."""
    warnings = []
    waveform = load_audio(path, warn=warnings.append, **options)
    for seconds in (0.05, 0.3):
        assert torch.equal(
            load_audio(path, seconds, warn=lambda text: None),
            waveform[: round(seconds * SAMPLE_RATE)],
        )
    assert all(str(path) in text and "\n" not in text for text in warnings)
    return waveform, warnings


def test_unreadable_files_say_which_and_why(tmp_path):
    (tmp_path / "empty.wav").touch()
    (tmp_path / "page.mp3").write_text("<html>not found</html>" * 50)
    (tmp_path / "phone.m4a").write_bytes(b"\0\0\0\x1cftypM4A \0\0\2\0M4A isomiso2" + bytes(2000))
    cases = [
        (tmp_path / "missing.wav", FileNotFoundError, "no such readable file"),
        (tmp_path, ValueError, "is a directory"),
        (tmp_path / "empty.wav", ValueError, "is empty"),
        (tmp_path / "page.mp3", ValueError, "cannot be decoded"),
        (
            tmp_path / "phone.m4a",
            ValueError,
            f"cannot be decoded .*`ffmpeg -i {tmp_path}/phone.m4a new.wav`",
        ),
        (write_wav(tmp_path / "none.wav", samples=0), ValueError, "holds 0 samples"),
        (write_wav(tmp_path / "nan.wav", subtype="FLOAT", value=np.nan), ValueError, "NaN"),
        (
            write_wav(tmp_path / "inf.wav", subtype="DOUBLE", value=np.inf),
            ValueError,
            "NaN, infinite",
        ),
        (
            cut(write_wav(tmp_path / "cut.wav"), 0.4),
            ValueError,
            "is cut off: 0.20 s of 0.50 s can be read; .*ffmpeg",
        ),
    ]
    for path, error, message in cases:
        for seconds in (None, 0.1):
            with pytest.raises(error, match=message) as caught:
                load_audio(path, seconds)
            assert str(path) in str(caught.value)
            assert "\n" not in str(caught.value)


def noise(seconds=2, rate=16000, channels=1):
    return np.random.default_rng(0).standard_normal((round(seconds * rate), channels)) * 0.1


# PCM and FLAC promise a length: with at least half of it there is a warning, with less an error.
@pytest.mark.parametrize(
    "name, subtype",
    [
        ("a.wav", "PCM_16"),
        ("a.wav", "IMA_ADPCM"),
        ("a.aiff", "PCM_24"),
        ("a.au", "ULAW"),
        ("a.w64", "FLOAT"),
        ("a.rf64", "PCM_16"),
        ("a.flac", "PCM_16"),
    ],
)
def test_files_that_were_cut_off(tmp_path, name, subtype):
    path = tmp_path / name
    soundfile.write(
        path, noise(), 16000, subtype=subtype, format="RF64" if "rf64" in name else None
    )
    whole, warnings = load(path)
    assert abs(len(whole) - 32000) < 600
    assert not warnings
    data = path.read_bytes()
    for share in (0.95, 0.8, 0.6):
        cut(path, share)
        part, warnings = load(path)
        assert share - 0.13 < len(part) / 32000 <= share + 0.06, "a flac loses a block of 4096"
        assert len(warnings) == 1
        assert f"is cut off: {len(part) / SAMPLE_RATE:.2f} s of 2." in warnings[0]
        assert torch.equal(part[:-1100], whole[: len(part) - 1100])  # a block of ADPCM
        path.write_bytes(data)
    with pytest.raises(
        ValueError, match=r"is cut off: 0.\d+ s of 2.\d\d s can be read; fetch it again"
    ):
        load_audio(cut(path, 0.45))


def test_a_flac_that_is_damaged_in_the_middle(tmp_path):
    path = tmp_path / "a.flac"
    soundfile.write(path, noise(), 16000)
    whole, data = load_audio(path), bytearray(path.read_bytes())
    at = round(0.7 * len(data))
    data[at : at + 2000] = bytes(2000)
    path.write_bytes(data)
    part, warnings = load(path)
    assert 0.55 < len(part) / len(whole) <= 0.7
    assert torch.equal(part, whole[: len(part)])
    assert len(warnings) == 1
    assert len(load_audio(path, 0.1, warn=pytest.fail)) == 1600  # what is asked for is whole


def test_warnings_are_printed_or_counted(tmp_path, capsys):
    path = cut(write_wav(tmp_path / "cut.wav"), 0.6)
    load_audio(path)
    assert (
        capsys.readouterr().err
        == f"warning: {path} is cut off: 0.30 s of 0.50 s can be read and used\n"
    )
    counted = []
    load_audio(path, warn=counted.append)
    assert len(counted) == 1
    assert capsys.readouterr().err == ""


def without_its_header(path):
    """The same mp3 without its first frame, which counts the others ("Xing", "Info"), as many
    encoders leave it.
    """
    data = path.read_bytes()
    assert b"Xing" in data[:200] or b"Info" in data[:200]
    path.write_bytes(data[data.index(data[:2], 100) :])
    return path


def wav_with_mpeg_inside(path, stream):
    """MPEG layer III in a wav file, with a chunk before the data and one after it."""
    fmt = (
        np.array([0x55, 1], "<u2").tobytes()
        + np.array([16000, 4000], "<u4").tobytes()
        + np.array([1, 0, 12], "<u2").tobytes()
        + bytes(12)
    )
    chunk = lambda name, content: (
        name + np.array(len(content), "<u4").tobytes() + content + bytes(len(content) % 2)
    )
    body = (
        b"WAVE"
        + chunk(b"fmt ", fmt)
        + chunk(b"LIST", b"INFOodd")
        + chunk(b"data", stream)
        + chunk(b"fact", bytes(4))
    )
    path.write_bytes(chunk(b"RIFF", body))
    return path


@pytest.fixture(params=["a.mp3", "headless.mp3", "mpeg.wav", "a.ogg", "a.opus"])
def estimated(request, tmp_path):
    """Files whose length libsndfile estimates, as libsndfile's encoders write them; 3 s of noise,
    then 1 s of silence, where a variable bit rate is low.
    """
    path = tmp_path / request.param
    samples = np.concatenate([noise(3), np.zeros((16000, 1))])
    if path.suffix in (".ogg", ".opus"):
        soundfile.write(
            path,
            samples,
            16000,
            format="OGG",
            subtype="OPUS" if path.suffix == ".opus" else "VORBIS",
        )
    else:
        stream = path.with_suffix(".mp3")
        soundfile.write(stream, samples, 16000, bitrate_mode="VARIABLE", compression_level=0.5)
        if path.name != "a.mp3":
            without_its_header(stream)
        if path.suffix == ".wav":
            wav_with_mpeg_inside(path, stream.read_bytes())
    return path


def test_what_can_be_decoded_is_the_clip(estimated):
    waveform, warnings = load(estimated)
    # without the header an mp3 begins with the encoder's delay, and ends with its filling
    assert 0 <= len(waveform) - 4 * SAMPLE_RATE < 3000
    assert not warnings
    assert waveform[2000:10000].square().mean() > 1e-4
    assert waveform[-12000:].square().mean() < 1e-5
    data = estimated.read_bytes()
    # cut off: shorter, and never refused; MPEG layers without a header warn of their last frame
    part, warnings = load(cut(estimated, 0.45))
    assert 0.2 * len(waveform) < len(part) < len(waveform)
    assert len(warnings) <= 1
    n = len(part) - 2000
    assert torch.equal(part[:n], waveform[:n])
    # damaged in the middle: what comes before, with the seconds that were read, or what comes after
    # too
    middle = round(0.6 * len(data))
    estimated.write_bytes(
        data[:middle] + np.random.default_rng(1).bytes(5000) + data[middle + 5000 :]
    )
    part, warnings = load(estimated)
    assert 0.2 * len(waveform) < len(part) <= len(waveform)
    if estimated.suffix in (".mp3", ".wav"):
        assert len(warnings) == 1
        assert f"decoding stopped after {len(part) / SAMPLE_RATE:.2f} s" in warnings[0]
        n = len(part) - 2000
        assert torch.equal(part[:n], waveform[:n])


def test_streams_of_unknown_length(tmp_path):
    """ffmpeg writing to a pipe cannot go back to fill in sizes: in a wav they read 0xFFFFFFFF, in a
    flac 0. What can be decoded is the clip.
    """
    data = bytearray(write_wav(tmp_path / "stream.wav").read_bytes())
    data[4:8] = data[40:44] = b"\xff" * 4
    (tmp_path / "stream.wav").write_bytes(data)
    assert len(load_audio(tmp_path / "stream.wav", warn=pytest.fail)) == 8000
    soundfile.write(tmp_path / "stream.flac", noise(), 16000)
    whole = load_audio(tmp_path / "stream.flac")
    data = bytearray((tmp_path / "stream.flac").read_bytes())
    data[21] &= 0xF0
    data[22:26] = b"\0" * 4
    (tmp_path / "stream.flac").write_bytes(data)
    waveform, warnings = load(tmp_path / "stream.flac")
    assert torch.equal(waveform, whole)
    assert not warnings
    part, warnings = load(cut(tmp_path / "stream.flac", 0.4))
    assert torch.equal(part, whole[: len(part)])
    assert "decoding stopped after" in warnings[0]


def ffmpeg(*arguments):
    """-> its standard output. Skips the test where there is no ffmpeg."""
    if not shutil.which("ffmpeg"):
        pytest.skip("no ffmpeg (apt-get install ffmpeg)")
    command = ["ffmpeg", "-v", "quiet", "-y", "-threads", "1", *map(str, arguments)]
    return subprocess.run(
        command, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
    ).stdout


def seconds_by_ffmpeg(path):
    return (
        len(ffmpeg("-i", path, "-map", "0:a:0", "-f", "s16le", "-ac", "1", "-ar", SAMPLE_RATE, "-"))
        / 2
        / SAMPLE_RATE
    )


@pytest.mark.parametrize("name, options", {
    "cbr.mp3": "-b:a 128k", "vbr.mp3": "-q:a 4", "cbr_no_header.mp3": "-b:a 96k -write_xing 0",
    "vbr_no_header.mp3": "-q:a 4 -write_xing 0",
    "tagged.mp3": "-b:a 96k -write_xing 0 -write_id3v1 1 -metadata title=Info",
    "layer_2.mp3": "-c:a mp2 -f mp2", "old.mp3": "-ar 11025 -q:a 6",
    "mpeg.wav": "-c:a libmp3lame", "vbr.wav": "-c:a libmp3lame -q:a 6 -ar 11025",
    "a.ogg": "-c:a libvorbis", "a.opus": "-c:a libopus", "voice.opus": "-c:a libopus -b:a 12k -ac 1",
    "piped.flac": "-f flac -", "piped.wav": "-f wav -",
}.items())  # fmt: skip
def test_what_real_encoders_write(tmp_path, name, options):
    soundfile.write(
        tmp_path / "source.wav",
        np.concatenate([noise(1, 44100, 2) * 0.01, noise(2, 44100, 2)]),
        44100,
    )
    path, piped = tmp_path / name, options.endswith(" -")
    written = ffmpeg("-i", tmp_path / "source.wav", *options.split(), *[] if piped else [path])
    if piped:
        path.write_bytes(written)
    waveform, warnings = load(path)
    assert not warnings
    assert abs(len(waveform) / SAMPLE_RATE - seconds_by_ffmpeg(path)) < 0.002
    assert 2.999 < len(waveform) / SAMPLE_RATE < 3.3
    with pytest.raises(
        ValueError, match=r"a.m4a cannot be decoded \(.*`ffmpeg -i .*a.m4a new.wav`"
    ):
        ffmpeg("-i", tmp_path / "source.wav", tmp_path / "a.m4a")
        load_audio(tmp_path / "a.m4a")


@pytest.mark.slow
def test_every_file_of_the_real_corpora_loads(capsys):
    """With the length that ffmpeg decodes, to 50 ms. An empty file is refused by both."""
    if "CORPORA" not in os.environ:
        pytest.skip("the environment variable CORPORA names no folder of real recordings")
    paths = sorted(
        path for path in Path(os.environ["CORPORA"]).rglob("*") if path.suffix in (".wav", ".mp3")
    )
    assert len(paths) > 2000
    warnings, empty, off = [], 0, []
    for path in paths:
        if path.stat().st_size == 0:
            with pytest.raises(ValueError, match="is empty"):
                load_audio(path)
            empty += 1
            continue
        seconds, expected = (
            len(load_audio(path, warn=warnings.append)) / SAMPLE_RATE,
            seconds_by_ffmpeg(path),
        )
        if abs(seconds - expected) > 0.05:
            off.append(f"{path}: {seconds:.3f} s, ffmpeg {expected:.3f} s")
    with capsys.disabled():
        print(
            f"\n{len(paths)} files, {empty} of them empty; {len(warnings)} warnings",
            *warnings,
            sep="\n",
        )
    assert not off, "\n".join(off)
    assert len(warnings) < 5
    assert empty < 5


# -- the real tiny.en on real speech ---------------------------------------------------------------


@pytest.fixture(scope="module")
def real_pair(tiny_en_folder):
    theirs = transformers.WhisperForConditionalGeneration.from_pretrained(
        tiny_en_folder, dtype=torch.float32
    ).eval()
    return theirs, Whisper.from_pretrained(tiny_en_folder)


def test_real_encoder_equals_transformers(real_pair, real_speech_clips):
    theirs, ours = real_pair
    mel = log_mel([load_audio(path) for path in real_speech_clips[:2]], 80)
    assert_same_taps(ours.encode(mel, [0, 1, 2, 3]), theirs.model.encoder, mel)


def test_real_transcripts_equal_transformers(real_pair, real_speech_clips, tiny_en_folder):
    theirs, ours = real_pair
    clips = [load_audio(path) for path in real_speech_clips[1:7]]
    encoded = ours.encode(log_mel(clips, 80), [3])[:, 0]
    texts = ours.transcribe_encoded(encoded, no_speech_threshold=2)
    outputs = transformers.modeling_outputs.BaseModelOutput(
        ours.encoder.layer_norm(encoded)
    )  # the encoders are equal: see above
    ids = theirs.generate(encoder_outputs=outputs, max_new_tokens=128, do_sample=False, num_beams=1)
    tokenizer = transformers.WhisperTokenizer.from_pretrained(tiny_en_folder)
    assert texts == [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]
    assert texts[1] == "Unless to be rather cold-hearted and rather selfish is to be ill-disposed."
    assert len({len(text.split()) for text in texts}) > 3  # they end at different steps
    # each clip alone reads the same as in the batch, and with the default threshold all of this is
    # speech
    assert texts == [ours.transcribe_encoded(one[None])[0] for one in encoded]


def test_real_silence_and_tones_are_no_speech(real_pair):
    _, ours = real_pair
    silence, hum = torch.zeros(SAMPLE_RATE), 0.1 * sine(100, SAMPLE_RATE, 2)
    assert ours.transcribe([silence, hum]) == [" ", " "]


def test_real_vocabulary_decodes_like_transformers(tiny_en_folder):
    vocabulary = Vocabulary(tiny_en_folder)
    tokenizer = transformers.WhisperTokenizer.from_pretrained(tiny_en_folder)
    assert not vocabulary.multilingual
    assert len(vocabulary.suppress) > 80
    for text in (
        "Hello world, it's 3 o'clock.",
        "naïve Ünïcödé — “quotes” …",
        "日本語 и русский 😀🎵",
        "\ttab\nline",
    ):
        ids = tokenizer.encode(text, add_special_tokens=True)
        assert vocabulary.decode(ids) == text
    half_a_character = tokenizer.encode("😀", add_special_tokens=False)[:1]
    assert vocabulary.decode(half_a_character) == "\ufffd"


def test_command_line(tiny_en_folder, real_speech_clips, tmp_path):
    done = script("whisper.py", real_speech_clips[1], "--whisper", tiny_en_folder)
    assert (done.status, done.out) == (
        0,
        "He was not an old-sposed young man.\n",
    )  # tiny.en's own words: "an ill-disposed" is spoken
    done = script("whisper.py", tmp_path / "missing.wav", "--whisper", tiny_en_folder)
    assert done.status == 1
    assert f"error: {tmp_path}/missing.wav: no such readable file" in done.err
    assert "Traceback" not in done.err
