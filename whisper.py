"""Whisper, read top to bottom: audio file → log-mel → encoder (with a tap at every block) → decoder → transcript.

DeSTA2.5-Audio (https://arxiv.org/abs/2507.02768) uses a frozen Whisper twice: the Q-Former listens to four blocks of its encoder, and
its transcript is put into the prompt as text. Nothing in this file is trained. Weights keep their official Hugging Face names.

    python whisper.py clip.wav                                  # weights/whisper-tiny.en, made by `python demo/prepare.py`
    python whisper.py clip.wav --whisper whisper-large-v3       # or any other Whisper in the Hugging Face layout

References: Radford et al. 2022 (https://arxiv.org/abs/2212.04356); openai/whisper audio.py, model.py, decoding.py.
"""
import argparse
import functools
import json
import math
import os
import re
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import soundfile
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open

# All of Whisper's fixed audio numbers.
SAMPLE_RATE = 16_000
N_FFT = 400                                     # 25 ms window → 201 frequency bins
HOP = 160                                       # 10 ms step
FRAMES_PER_SECOND = SAMPLE_RATE // HOP          # 100 mel frames
POSITIONS_PER_SECOND = FRAMES_PER_SECOND // 2   # 50 encoder positions: the second convolution has stride 2
CLIP_SECONDS = 30                               # → 480,000 samples → 3,000 frames → 1,500 positions


# ---------------------------------------------------------------------------------------------------------------- audio

def load_audio(path, max_seconds=None, warn=None):
    """Read a sound file (wav, flac, ogg, mp3, …; any rate, any number of channels) as mono at 16 kHz.
    max_seconds: read no more than this much from the start of the file; the result is the start of the full result, to the sample.
    Returns float32, shape = (n_samples,). Raises FileNotFoundError or ValueError in one line that names the file and the remedy."""
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a directory: give the path of one audio file")
    if not (path.is_file() and os.access(path, os.R_OK)):
        raise FileNotFoundError(f"{path}: no such readable file; check the path, and the audio root if it is relative to one")
    remedy = f"fetch it again, or rewrite it with `ffmpeg -i {path} new.wav`"
    try:
        with soundfile.SoundFile(path) as file:
            rate, expected, pieces = file.samplerate, file.frames, []
            if file.format == "RAW":  # libsndfile takes whatever is called .au, .vox or .gsm for headerless samples
                raise ValueError(f"{path} cannot be decoded (no known header): {remedy}")
            if not 1000 <= rate <= 1_000_000:
                raise ValueError(f"{path} claims {rate} samples a second: {remedy}")
            if expected > 2 ** 60:
                raise ValueError(f"{path} does not say how long it is (a streamed flac?): {remedy}")
            if max_seconds is not None:  # one second more, so that the resampling filter does not see the cut
                expected = min(expected, math.ceil((max_seconds + 1) * rate))
            # Piece by piece: a broken header can claim terabytes.
            while (left := expected - sum(map(len, pieces))) and len(piece := file.read(min(left, 1 << 20), dtype="float32", always_2d=True)):
                pieces.append(piece)
            samples = np.concatenate(pieces or [np.zeros((0, 1), np.float32)])          # [n, channels]
            # libsndfile shortens a truncated wav or aiff silently; only its log tells. (Streamed wavs claim 2³¹ or 2³² bytes: no error.)
            claimed = re.search(r"^ *(?:data|SSND) *: *(\d+) \(should be", file.extra_info, re.MULTILINE)
    except (soundfile.LibsndfileError, TypeError, OSError) as error:  # TypeError: the name ends in .raw, which says nothing of what is inside
        raise ValueError(f"{path} cannot be decoded ({str(getattr(error, 'error_string', error)).strip(' .')}): {remedy}") from None
    if len(samples) < expected or (claimed and int(claimed[1]) < 0x7FFF0000):
        raise ValueError(f"{path} is truncated: {remedy}")
    if len(samples) == 0:
        raise ValueError(f"{path} holds 0 samples: {remedy}")
    waveform = resample(torch.from_numpy(samples).mean(1), rate, SAMPLE_RATE)
    if not (waveform.abs() < 1e12).all():  # not so for NaN; beyond, the spectrum's squares overflow
        raise ValueError(f"{path} holds NaN, infinite or absurdly large samples: make it anew from its source")
    return waveform if max_seconds is None else waveform[:round(max_seconds * SAMPLE_RATE)]


def resample(waveform, rate_in, rate_out):
    """Band-limited resampling between any two integer rates: windowed-sinc, exact rational ratio, zero phase.
    The pass band ends at 0.9 of the lower Nyquist frequency and the stop band (−100 dB) begins at it.
    waveform: float32, shape = (n,). Returns shape = (ceil(n · rate_out / rate_in),)."""
    if rate_in == rate_out:
        return waveform
    # Output sample i lies at i · down/up input samples. Positions relative to the input grid repeat every `up` outputs = `down` inputs.
    divisor = math.gcd(rate_in, rate_out)
    up, down = rate_out // divisor, rate_in // divisor
    n_out = math.ceil(len(waveform) * up / down)
    repeat = math.ceil(64 / up)             # 48 → 16 kHz has a period of one output: take 64 periods as one
    up, down = up * repeat, down * repeat
    periods = math.ceil(n_out / up)
    half, kernels = resampling_kernels(up, down)
    padded = F.pad(waveform, (half, half + 2 * down + 1))
    out = waveform.new_empty(periods, up)
    for start, first, kernel in kernels:
        # Row p is what the outputs of period p see. Neighbouring rows overlap, so a strided view and no copy.
        windows = padded.as_strided((periods, kernel.shape[1]), (down, 1), first + half)
        out[:, start:start + len(kernel)] = windows @ kernel.T
    return out.flatten()[:n_out]


@functools.lru_cache(maxsize=4)             # making them takes longer than using them: 1 s where the rates have no common divisor
def resampling_kernels(up, down):
    """The filters behind `resample` -> (half their width, [(first output, first input seen, float32 [at most 64 outputs, inputs seen])])."""
    cutoff = 0.95 * min(1.0, up / down)     # of the input's Nyquist frequency: when downsampling, nothing above the new one may pass
    half = math.ceil(64 / cutoff)           # 64 zero crossings of the sinc on either side
    beta = 0.1102 * (100 - 8.7)             # Kaiser's rule: this window's stop band is 100 dB down
    i0_beta = torch.special.i0(torch.tensor(beta, dtype=torch.float64))
    kernels = []
    for start in range(0, up, 64):          # one matrix product makes 64 outputs of every period
        centre = torch.arange(start, min(start + 64, up), dtype=torch.float64) * down / up      # float64: long periods need it
        first, last = int(centre[0]) - half, int(centre[-1]) + half + 1
        t = torch.arange(first, last + 1) - centre[:, None]                                     # [outputs, inputs seen] in input samples
        window = torch.special.i0(beta * (1 - (t / half) ** 2).clamp(min=0).sqrt()) / i0_beta * (t.abs() <= half)
        kernels.append((start, first, (cutoff * torch.sinc(cutoff * t) * window).float()))
    return half, kernels


def log_mel(waveforms, n_mels, seconds=CLIP_SECONDS, device=None):
    """Log-mel spectrograms as Whisper was trained on; each clip is padded with silence or cut to `seconds` (30 in every official checkpoint).
    waveforms: list of float tensors, shape = (n,), 16 kHz. n_mels: 80, or 128 for large-v3.
    Returns float32, shape = (batch, n_mels, 100 · seconds)."""
    n_samples = int(seconds * SAMPLE_RATE)
    batch = torch.stack([F.pad(w, (0, n_samples - len(w))) for w in waveforms]).to(device)  # a negative padding cuts
    window = torch.hann_window(N_FFT, device=batch.device)
    # What torch.stft and abs() compute; the whole function takes 1.6× less time on CPUs this way.
    padded = F.pad(batch, (N_FFT // 2, N_FFT // 2), mode="reflect")
    spectrum = torch.fft.rfft(padded.unfold(1, N_FFT, HOP)[:, :-1] * window)    # [B, frames, 201]: Whisper drops the last frame
    power = spectrum.real.square() + spectrum.imag.square()
    mel = mel_filters(n_mels).to(batch) @ power.transpose(1, 2)                 # [B, n_mels, frames]
    log = mel.clamp(min=1e-10).log10()
    # The floor is 80 dB under the clip's own maximum. A floor per batch would make a clip depend on its neighbours.
    log = torch.maximum(log, log.amax((1, 2), keepdim=True) - 8)
    return (log + 4) / 4


@functools.lru_cache
def mel_filters(n_mels):
    """Slaney's triangular filters (librosa.filters.mel), each of unit area. Returns float32, shape = (n_mels, 201)."""
    # Slaney's scale: 3 mels per 200 Hz up to 1 kHz (= 15 mels), then 27 mels for each factor of 6.4.
    top = 15 + 27 * math.log(SAMPLE_RATE / 2 / 1000) / math.log(6.4)
    mels = torch.linspace(0, top, n_mels + 2, dtype=torch.float64)
    hertz = torch.where(mels < 15, mels * 200 / 3, 1000 * 6.4 ** ((mels - 15) / 27))
    left, centre, right = hertz[:-2, None], hertz[1:-1, None], hertz[2:, None]
    bins = torch.linspace(0, SAMPLE_RATE / 2, N_FFT // 2 + 1, dtype=torch.float64)
    rising, falling = (bins - left) / (centre - left), (right - bins) / (right - centre)
    return (torch.minimum(rising, falling).clamp(min=0) * 2 / (right - left)).float()


# ---------------------------------------------------------------------------------------------------------------- model

@dataclass
class WhisperConfig:
    """The fields of a Hugging Face config.json that matter here, under their official names (defaults: tiny.en)."""
    num_mel_bins: int = 80
    d_model: int = 384
    encoder_layers: int = 4
    encoder_attention_heads: int = 6
    encoder_ffn_dim: int = 1536
    decoder_layers: int = 4
    decoder_attention_heads: int = 6
    decoder_ffn_dim: int = 1536
    vocab_size: int = 51864
    max_source_positions: int = 1500
    max_target_positions: int = 448


def tap_layers(n_layers):
    """The quarters of an encoder stack, 0-based: 32 → 7, 15, 23, 31. The blocks whose outputs the Q-Former listens to."""
    assert n_layers >= 4, f"four different taps need at least 4 encoder blocks, not {n_layers}"
    return [math.ceil(quarter * n_layers / 4) - 1 for quarter in (1, 2, 3, 4)]


# The weights come from a file. To initialize them first, even on the meta device, would import 800 modules (sympy …): 1.3 s.
Linear, Embedding, Conv1d, LayerNorm = (type(c.__name__, (c,), {"reset_parameters": lambda self: None})
                                        for c in (nn.Linear, nn.Embedding, nn.Conv1d, nn.LayerNorm))


def attend(q, k, v, is_causal=False):
    """q [B, heads, T, d_head] looks at k and v [B, heads, S, d_head]. On CPUs in bf16 plain products are faster than the fused kernel,
    1.6× in the encoder and 5× for a single query: 500 queries at a time, so that their scores stay in cache."""
    if q.device.type != "cpu" or q.dtype != torch.bfloat16 or is_causal:
        return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
    q, k, v = q * q.shape[-1] ** -0.5, k.contiguous().transpose(2, 3), v.contiguous()
    return torch.cat([(part @ k).softmax(-1) @ v for part in q.split(500, dim=2)], dim=2)


class Attention(nn.Module):
    def __init__(self, d_model, n_heads):
        super().__init__()
        self.n_heads = n_heads
        self.q_proj = Linear(d_model, d_model)
        self.k_proj = Linear(d_model, d_model, bias=False)  # softmax over keys cannot see a key bias, so Whisper has none
        self.v_proj = Linear(d_model, d_model)
        self.out_proj = Linear(d_model, d_model)

    def split_heads(self, x):
        B, T, D = x.shape
        return x.view(B, T, self.n_heads, D // self.n_heads).transpose(1, 2)    # [B, heads, T, d_head], a view

    def keys_values(self, x):
        return self.split_heads(self.k_proj(x)), self.split_heads(self.v_proj(x))

    def forward(self, x, k, v, is_causal=False):
        """x asks, k and v answer: they come from x itself, from a cache, or from the encoder."""
        q = self.split_heads(self.q_proj(x))
        y = attend(q, k, v, is_causal)                                          # [B, heads, T, d_head]
        return self.out_proj(y.transpose(1, 2).reshape(x.shape))


class Block(nn.Module):
    """Pre-norm transformer block. In the decoder (cross=True) it is causal and also attends to the encoder's output."""

    def __init__(self, d_model, n_heads, d_ffn, cross=False):
        super().__init__()
        self.self_attn_layer_norm = LayerNorm(d_model)
        self.self_attn = Attention(d_model, n_heads)
        if cross:
            self.encoder_attn_layer_norm = LayerNorm(d_model)
            self.encoder_attn = Attention(d_model, n_heads)
        self.final_layer_norm = LayerNorm(d_model)
        self.fc1 = Linear(d_model, d_ffn)
        self.fc2 = Linear(d_ffn, d_model)

    def forward(self, x, cross_kv=None, cache=None, start=0):
        T = x.shape[1]
        y = self.self_attn_layer_norm(x)
        k, v = self.self_attn.keys_values(y)                                    # [B, heads, T, d_head]
        if cache is not None:                                                   # [2, B, heads, max_len, d_head]
            cache[0, :, :, start:start + T], cache[1, :, :, start:start + T] = k, v
            k, v = cache[:, :, :, :start + T]
        x = x + self.self_attn(y, k, v, is_causal=cross_kv is not None and T > 1)
        if cross_kv is not None:
            x = x + self.encoder_attn(self.encoder_attn_layer_norm(x), *cross_kv)
        return x + self.fc2(F.gelu(self.fc1(self.final_layer_norm(x))))


class Encoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.conv1 = Conv1d(config.num_mel_bins, config.d_model, kernel_size=3, padding=1)
        self.conv2 = Conv1d(config.d_model, config.d_model, kernel_size=3, stride=2, padding=1)
        self.embed_positions = Embedding(config.max_source_positions, config.d_model)  # sinusoids, stored in the file
        self.layers = nn.ModuleList(Block(config.d_model, config.encoder_attention_heads, config.encoder_ffn_dim)
                                    for _ in range(config.encoder_layers))
        self.layer_norm = LayerNorm(config.d_model)

    def embed(self, mel):
        x = F.gelu(self.conv1(mel))
        x = F.gelu(self.conv2(x)).transpose(1, 2).contiguous()  # [B, T, d_model]; sums inherit strides, so every block would pay for a view
        return x + self.embed_positions.weight[:x.shape[1]]


class Decoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.d_model)
        self.embed_positions = Embedding(config.max_target_positions, config.d_model)
        self.layers = nn.ModuleList(Block(config.d_model, config.decoder_attention_heads, config.decoder_ffn_dim, cross=True)
                                    for _ in range(config.decoder_layers))
        self.layer_norm = LayerNorm(config.d_model)

    def cross_keys_values(self, hidden):
        """Keys and values of the encoder's final output [B, T, d_model], one pair per block: computed once per clip, not per token."""
        return [tuple(t.contiguous() for t in block.encoder_attn.keys_values(hidden)) for block in self.layers]

    def forward(self, tokens, cross_kv, cache=None, start=0):
        """tokens [B, T] at positions start … start + T - 1; cross_kv from cross_keys_values; cache, if there is a past or a future:
        shape = (n_layers, 2, B, n_heads, max_len, d_head), written in place. Returns float32 logits, shape = (B, T, vocab_size)."""
        T = tokens.shape[1]
        # is_causal aligns its triangle with the first key, so several new tokens after a past would look into the future.
        assert T == 1 or start == 0, "feed several tokens only at the start, and one by one after that"
        x = self.embed_tokens(tokens) + self.embed_positions.weight[start:start + T]    # [B, T, d_model]
        for n, block in enumerate(self.layers):
            x = block(x, cross_kv[n], None if cache is None else cache[n], start)
        return F.linear(self.layer_norm(x), self.embed_tokens.weight).float()           # the head is tied to the embedding


class Whisper(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    @classmethod
    def from_pretrained(cls, folder, dtype=torch.float32, device="cpu"):
        """A frozen Whisper from a folder in the Hugging Face layout. Errors say what is missing or does not fit."""
        folder = Path(folder)
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"no Whisper model in {folder}: `python demo/prepare.py` makes weights/whisper-tiny.en, "
                                    "`hf download openai/whisper-large-v3 --local-dir DIR` fetches the paper's")
        settings = read_json(folder / "config.json")
        for name, value in {"model_type": "whisper", "activation_function": "gelu", "scale_embedding": False}.items():
            if settings.get(name, value) != value:
                raise ValueError(f"{folder / 'config.json'}: {name} is {settings[name]!r}; only {value!r} is implemented")
        with torch.device("meta"):  # shapes without memory: the weights exist once, where the file loader puts them
            model = cls(WhisperConfig(**{field.name: settings[field.name] for field in fields(WhisperConfig)}))
        model.load_weights(folder, dtype, device)
        model.vocabulary = Vocabulary(folder)
        return model.requires_grad_(False).eval()

    def load_weights(self, folder, dtype, device):
        index = folder / "model.safetensors.index.json"
        files = sorted(set(read_json(index)["weight_map"].values())) if index.is_file() else ["model.safetensors"]
        missing = {"model." + name: list(tensor.shape) for name, tensor in self.state_dict().items()}  # the official names
        state, problems = {}, []
        for path in [folder / file for file in files]:
            try:
                shard = safe_open(path, "pt", device=str(device))
            except SafetensorError as error:
                raise ValueError(f"{path} is damaged, fetch it again ({error})") from None
            for name in sorted(set(shard.keys()) - {"proj_out.weight"}):  # the output head: some files repeat the tied embedding
                shape, expected = shard.get_slice(name).get_shape(), missing.pop(name, None)
                if shape == expected:
                    state[name.removeprefix("model.")] = shard.get_tensor(name).to(dtype)
                else:
                    problems.append(f"{name} in {path}: " + (f"shape {shape} instead of {expected}" if expected else "not part of Whisper"))
        problems += [f"{name}: missing from {folder}" for name in missing]
        if problems:
            raise ValueError(f"{len(problems)} tensors do not fit {folder / 'config.json'}:\n  " + "\n  ".join(problems))
        self.load_state_dict(state, assign=True)

    # no_grad, not inference_mode: the Q-Former trains on these outputs, and autograd refuses to save inference tensors.
    @torch.no_grad()
    def encode(self, mel, layers):
        """Outputs of the encoder blocks `layers` (0-based), before the final LayerNorm; blocks after the last one asked for are not run.
        mel: shape = (batch, n_mels, frames), frames even and at most 3000, from log_mel.
        Returns shape = (batch, len(layers), frames / 2, d_model), in the model's dtype."""
        B, n_mels, frames = mel.shape
        T, config = frames // 2, self.config
        assert n_mels == config.num_mel_bins, f"this Whisper wants {config.num_mel_bins} mel bins, not {n_mels}"
        assert T <= config.max_source_positions, f"{frames} mel frames are more than the {2 * config.max_source_positions} this Whisper knows"
        assert all(0 <= n < config.encoder_layers for n in layers), f"taps {layers} are not all in 0…{config.encoder_layers - 1}"
        mel = mel.to(self.encoder.conv1.weight)                                 # dtype and device
        taps = mel.new_empty(B, len(layers), T, config.d_model)
        # One clip keeps every core of a CPU busy, and its activations stay in cache: 1.1× faster than eight clips at once.
        at_once = 1 if mel.device.type == "cpu" else B
        for b in range(0, B, at_once):
            x = self.encoder.embed(mel[b:b + at_once])
            for n, block in enumerate(self.encoder.layers[:max(layers) + 1]):
                x = block(x)                                                    # [at_once, T, d_model]
                if n in layers:
                    taps[b:b + at_once, layers.index(n)] = x
        return taps

    @torch.no_grad()
    def transcribe(self, waveforms, max_new_tokens=128, batch_size=32, no_speech_threshold=0.3, seconds=CLIP_SECONDS):
        """Transcripts of a list of 16 kHz waveforms, each padded or cut to `seconds`. See transcribe_encoded. Returns list[str]."""
        seconds = min(seconds, self.config.max_source_positions // POSITIONS_PER_SECOND)
        texts = [None] * len(waveforms)
        # A batch decodes until its longest transcript is done, so clips of like length go together.
        order = sorted(range(len(waveforms)), key=lambda i: len(waveforms[i]))
        for start in range(0, len(order), batch_size):
            batch = order[start:start + batch_size]
            mel = log_mel([waveforms[i] for i in batch], self.config.num_mel_bins, seconds, self.encoder.conv1.weight.device)
            last_block = self.encode(mel, [self.config.encoder_layers - 1])[:, 0]
            for i, text in zip(batch, self.transcribe_encoded(last_block, max_new_tokens, no_speech_threshold)):
                texts[i] = text
        return texts

    @torch.no_grad()
    def transcribe_encoded(self, last_block, max_new_tokens=128, no_speech_threshold=0.3):
        """Greedy transcripts from the last encoder block's output [B, T, d_model]: whoever has the taps need not encode twice.
        A clip whose no-speech probability is above the threshold gets " " (OpenAI's 0.6 lets most animal sounds be "transcribed")."""
        B, words, device, config = len(last_block), self.vocabulary, last_block.device, self.config
        n_heads, max_len = config.decoder_attention_heads, 4 + max_new_tokens           # the prompt has at most 4 tokens
        assert max_len <= config.max_target_positions, f"max_new_tokens can be {config.max_target_positions - 4} at most"
        cross_kv = self.decoder.cross_keys_values(self.encoder.layer_norm(last_block))
        cache = last_block.new_zeros(config.decoder_layers, 2, B, n_heads, max_len, config.d_model // n_heads)

        # One token a step, the prompt's too: every step has one shape and needs no mask.
        def next_logits(tokens, position):
            return self.decoder(tokens[:, None], cross_kv, cache, position)[:, 0]       # [B, vocab_size]

        # The first decoded position tells whether anybody speaks and, in multilingual checkpoints, which language.
        tokens = torch.full((B,), words.start, device=device)
        logits = next_logits(tokens, 0)
        done = logits.softmax(-1)[:, words.no_speech] > no_speech_threshold             # [B]
        prompt = [torch.full_like(tokens, words.no_timestamps)]
        if words.multilingual:
            language = words.languages.start + logits[:, words.languages].argmax(-1)
            prompt = [language, torch.full_like(tokens, words.transcribe)] + prompt
        for position, tokens in enumerate(prompt, start=1):
            logits = next_logits(tokens, position)

        suppress = torch.tensor(words.suppress, dtype=torch.long, device=device)
        logits[:, words.begin_suppress] = -torch.inf                                    # no empty and no blank transcript
        rows, transcripts = torch.arange(B, device=device), [[] for _ in range(B)]
        for position in range(1 + len(prompt), 1 + len(prompt) + max_new_tokens):
            logits[:, suppress] = -torch.inf
            tokens = logits.argmax(-1)                                                  # [rows still here]
            done |= tokens == words.end
            for row, token, finished in zip(rows.tolist(), tokens.tolist(), done.tolist()):
                if not finished:
                    transcripts[row].append(token)
            if done.all():
                break
            if 2 * done.sum() >= len(done):  # drop the finished clips, so that one long transcript does not carry all of them along
                keep = ~done
                rows, tokens, done = rows[keep], tokens[keep], done[keep]
                cross_kv, cache = [(k[keep], v[keep]) for k, v in cross_kv], cache[:, :, keep]
            logits = next_logits(tokens, position)
        return [words.decode(transcript).strip() or " " for transcript in transcripts]


# ----------------------------------------------------------------------------------------------------------- vocabulary

class Vocabulary:
    """What decoding must know about token ids: their text, the special ones by name, and those never to be written."""

    def __init__(self, folder):
        if (folder / "tokenizer.json").is_file():
            file = read_json(folder / "tokenizer.json")
            ids = file["model"]["vocab"] | {token["content"]: token["id"] for token in file["added_tokens"]}
        else:
            ids = read_json(folder / "vocab.json") | read_json(folder / "added_tokens.json")
        self.text = {id: text for text, id in ids.items()}
        self.start, self.end = ids["<|startoftranscript|>"], ids["<|endoftext|>"]
        self.transcribe, self.no_timestamps = ids["<|transcribe|>"], ids["<|notimestamps|>"]
        self.no_speech = ids["<|nospeech|>" if "<|nospeech|>" in ids else "<|nocaptions|>"]     # renamed in large-v3
        self.languages = slice(self.start + 1, ids["<|translate|>"])    # 99 ids in a row, 100 in large-v3

        settings = read_json(folder / "config.json")
        if (folder / "generation_config.json").is_file():
            settings |= read_json(folder / "generation_config.json")
        # English-only checkpoints have the language tokens too, untrained. Their vocabulary is one entry shorter (no blank token).
        self.multilingual = settings.get("is_multilingual", settings["vocab_size"] >= 51865)
        self.suppress = settings.get("suppress_tokens") or []
        self.begin_suppress = settings.get("begin_suppress_tokens") or []

    def decode(self, ids):
        """Text of the ordinary tokens; all special ones (language, task, timestamps) come from <|endoftext|> on and are left out."""
        return b"".join(bytes(BYTE_OF[char] for char in self.text[id]) for id in ids if id < self.end).decode("utf-8", errors="replace")


# Byte-level BPE files write each byte as one visible character: itself if printable in Latin-1, else the next one from U+0100 on.
VISIBLE = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
BYTE_OF = {chr(byte): byte for byte in VISIBLE}
BYTE_OF |= {chr(256 + i): byte for i, byte in enumerate(byte for byte in range(256) if byte not in VISIBLE)}


def read_json(path):
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not readable JSON ({error}): download it again") from None


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Print the transcript of a sound file's first 30 seconds.")
    parser.add_argument("audio", help="wav, flac, ogg or mp3")
    parser.add_argument("--whisper", default="weights/whisper-tiny.en", help="folder in the Hugging Face layout")
    args = parser.parse_args()
    try:
        waveform = load_audio(args.audio, CLIP_SECONDS)
        whisper = Whisper.from_pretrained(args.whisper, device="cuda" if torch.cuda.is_available() else "cpu")
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(whisper.transcribe([waveform])[0])
