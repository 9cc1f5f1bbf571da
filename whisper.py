"""
whisper.py: an audio file to log-mel, encoder (with a tap at every block), decoder, transcript.

DeSTA2.5-Audio (https://arxiv.org/abs/2507.02768) uses a frozen Whisper twice: the Q-Former listens
to four blocks of its encoder, and its transcript is put into the prompt as text. Nothing in this
file is trained. Weights keep their official Hugging Face names.

    python whisper.py clip.wav                # weights/whisper-tiny.en, made by demo/prepare.py
    python whisper.py clip.wav --whisper DIR  # or any other Whisper in the Hugging Face layout

References: Radford et al. 2022 (https://arxiv.org/abs/2212.04356); openai/whisper audio.py,
model.py, decoding.py.
"""

import functools
import math
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from engine import run
from engine.attention import attend
from engine.decode import to_host
from engine.run import argument, default_device, setting
from engine.sound import read_sound
from engine.weights import BYTE_OF, Conv1d, Embedding, LayerNorm, Linear, load_weights, read_json

# All of Whisper's fixed audio numbers.
SAMPLE_RATE = 16_000
N_FFT = 400  # a window of 25 ms → 201 frequency bins
HOP = 160  # a step of 10 ms
FRAMES_PER_SECOND = SAMPLE_RATE // HOP  # 100 mel frames
POSITIONS_PER_SECOND = FRAMES_PER_SECOND // 2  # 50: the encoder's second convolution has stride 2
CLIP_SECONDS = 30  # → 480,000 samples → 3,000 frames → 1,500 positions

# --------------------------------------------------------------------------------------------------
# Audio


def load_audio(path, max_seconds=None, warn=run.warn):
    """Read a sound file (wav, flac, ogg, mp3, …; any rate, any number of channels), mono at 16 kHz.

    max_seconds: read no more than this from the start of the file. The result is the start of the
    full result, to the sample. warn(text): called when a damaged file gives less than it should;
    printed by default. -> float32 (n_samples,)
    Errors: FileNotFoundError or ValueError, in one line that names the file and the remedy.
    """
    # One second more, so that the resampling filter does not see the cut.
    samples, rate = read_sound(path, None if max_seconds is None else max_seconds + 1, warn)
    waveform = resample(torch.from_numpy(samples).mean(1), rate, SAMPLE_RATE)
    # Also false for NaN. What is larger would overflow as a square in the spectrum.
    if not (waveform.abs() < 1e12).all():
        problem = "holds NaN, infinite or absurdly large samples"
        raise ValueError(f"{path} {problem}: make it anew from its source")
    return waveform if max_seconds is None else waveform[: round(max_seconds * SAMPLE_RATE)]


def resample(waveform, rate_in, rate_out):
    """Band-limited resampling between any integer rates: windowed sinc, exact ratio, zero phase.

    The pass band ends at 0.9 of the lower Nyquist frequency; the stop band (-100 dB) begins at it.
    waveform: float32 (n,). -> (ceil(n · rate_out / rate_in),)
    """
    if rate_in == rate_out:
        return waveform
    # Output sample i lies at i · down/up input samples. Where it lies between two of them repeats
    # every `up` outputs = `down` inputs: one period.
    divisor = math.gcd(rate_in, rate_out)
    up, down = rate_out // divisor, rate_in // divisor
    n_out = math.ceil(len(waveform) * up / down)
    repeat = math.ceil(64 / up)  # 48 → 16 kHz has a period of one output: take 64 periods as one
    up, down = up * repeat, down * repeat
    n_periods = math.ceil(n_out / up)
    half, kernels = resampling_kernels(up, down)
    padded = F.pad(waveform, (half, half + 2 * down + 1))
    out = waveform.new_empty(n_periods, up)
    for start, first, kernel in kernels:
        # Row p is what the outputs of period p see. Rows overlap, so a strided view and no copy.
        windows = padded.as_strided((n_periods, kernel.shape[1]), (down, 1), first + half)
        out[:, start : start + len(kernel)] = windows @ kernel.T
    return out.flatten()[:n_out]


# Kept: to make them takes longer than to use them, 1 s where the rates have no common divisor.
@functools.lru_cache(maxsize=32)
def resampling_kernels(up, down):
    """The filters behind `resample`. -> half their width, [(first output, first input it sees,
    float32 (at most 64 outputs, inputs they see))]
    """
    # Share of the input's Nyquist frequency. When downsampling, nothing above the new one may pass.
    cutoff = 0.95 * min(1.0, up / down)
    half = math.ceil(64 / cutoff)  # 64 zero crossings of the sinc on either side
    beta = 0.1102 * (100 - 8.7)  # Kaiser's rule: the stop band of this window is 100 dB down
    i0 = torch.special.i0
    i0_beta = i0(torch.tensor(beta, dtype=torch.float64))
    kernels = []
    for start in range(0, up, 64):  # one matrix product makes 64 outputs of every period
        outputs = torch.arange(start, min(start + 64, up), dtype=torch.float64)
        centre = outputs * down / up  # in input samples; long periods need float64
        first, last = int(centre[0]) - half, int(centre[-1]) + half + 1
        t = torch.arange(first, last + 1) - centre[:, None]  # (outputs, inputs they see)
        window = i0(beta * (1 - (t / half) ** 2).clamp(min=0).sqrt()) / i0_beta
        kernel = cutoff * torch.sinc(cutoff * t) * window * (t.abs() <= half)
        kernels.append((start, first, kernel.float()))
    return half, kernels


def log_mel(waveforms, n_mels, seconds=CLIP_SECONDS, device=None):
    """Log-mel spectrograms, as Whisper was trained on.

    waveforms: list of float (n,), 16 kHz; each is padded with silence or cut to `seconds` (30 in
    every official checkpoint). n_mels: 80, or 128 for large-v3.
    -> float32 (B, n_mels, 100 · seconds)
    """
    n_samples = int(seconds * SAMPLE_RATE)
    # A negative padding cuts.
    batch = torch.stack([F.pad(w, (0, n_samples - len(w))) for w in waveforms]).to(device)
    window = torch.hann_window(N_FFT, device=batch.device)
    # What torch.stft and abs() compute; on CPUs this function takes 1.6 times less time so.
    padded = F.pad(batch, (N_FFT // 2, N_FFT // 2), mode="reflect")
    frames = padded.unfold(1, N_FFT, HOP)[:, :-1]  # (B, T, 400); Whisper drops the last frame
    spectrum = torch.fft.rfft(frames * window)  # (B, T, 201)
    power = spectrum.real.square() + spectrum.imag.square()
    mel = mel_filters(n_mels).to(batch) @ power.transpose(1, 2)  # (B, n_mels, T)
    log = mel.clamp(min=1e-10).log10()
    # The floor is 80 dB below the clip's own maximum: a clip must not depend on its neighbours.
    log = torch.maximum(log, log.amax((1, 2), keepdim=True) - 8)
    return (log + 4) / 4


@functools.lru_cache
def mel_filters(n_mels):
    """Slaney's triangular filters of unit area (librosa.filters.mel). -> float32 (n_mels, 201)"""
    # Slaney's scale: 3 mels per 200 Hz up to 1 kHz (15 mels), then 27 mels per factor of 6.4.
    top = 15 + 27 * math.log(SAMPLE_RATE / 2 / 1000) / math.log(6.4)
    mels = torch.linspace(0, top, n_mels + 2, dtype=torch.float64)
    hertz = torch.where(mels < 15, mels * 200 / 3, 1000 * 6.4 ** ((mels - 15) / 27))
    left, centre, right = hertz[:-2, None], hertz[1:-1, None], hertz[2:, None]
    bins = torch.linspace(0, SAMPLE_RATE / 2, N_FFT // 2 + 1, dtype=torch.float64)
    rising, falling = (bins - left) / (centre - left), (right - bins) / (right - centre)
    return (torch.minimum(rising, falling).clamp(min=0) * 2 / (right - left)).float()


# --------------------------------------------------------------------------------------------------
# Model


@dataclass
class WhisperConfig:
    """The fields of config.json that matter here, under their official names. Defaults: tiny.en."""

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

    @classmethod
    def from_json(cls, path):
        settings = read_json(path)
        wanted = dict(model_type="whisper", activation_function="gelu", scale_embedding=False)
        for name, value in wanted.items():
            if settings.get(name, value) != value:
                found = f"{name} is {settings[name]!r}"
                raise ValueError(f"{path}: {found}; only {value!r} is implemented")
        return cls(**{field.name: settings[field.name] for field in fields(cls)})


def tap_layers(n_layers):
    """The blocks that the Q-Former listens to: the quarters of the encoder. 32 → 7, 15, 23, 31"""
    assert n_layers >= 4, f"four different taps need at least 4 encoder blocks, not {n_layers}"
    return [math.ceil(quarter * n_layers / 4) - 1 for quarter in (1, 2, 3, 4)]


class Attention(nn.Module):
    def __init__(self, d_model, n_heads):
        super().__init__()
        self.n_heads = n_heads
        self.q_proj = Linear(d_model, d_model)
        # A bias would add the same to the scores of all keys, which softmax takes out again.
        self.k_proj = Linear(d_model, d_model, bias=False)
        self.v_proj = Linear(d_model, d_model)
        self.out_proj = Linear(d_model, d_model)

    def split_heads(self, x):
        B, T, D = x.shape
        return x.view(B, T, self.n_heads, D // self.n_heads).transpose(1, 2)  # (B, H, T, D/H)

    def keys_values(self, x):
        return self.split_heads(self.k_proj(x)), self.split_heads(self.v_proj(x))

    def forward(self, x, k, v, causal=False):
        """x (B, T, D) looks at k and v (B, H, S, D/H): those of x, a cache, or the encoder."""
        seen = attend(self.split_heads(self.q_proj(x)), k, v, causal=causal)  # (B, H, T, D/H)
        return self.out_proj(seen.transpose(1, 2).reshape(x.shape))


class Block(nn.Module):
    """Pre-norm transformer block. In the decoder (cross) it is causal and attends to the audio."""

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
        k, v = self.self_attn.keys_values(y)  # (B, H, T, D/H)
        if cache is not None:  # (2, B, H, max_len, D/H)
            cache[0, :, :, start : start + T] = k
            cache[1, :, :, start : start + T] = v
            k, v = cache[:, :, :, : start + T]
        x = x + self.self_attn(y, k, v, causal=cross_kv is not None and T > 1)
        if cross_kv is not None:
            x = x + self.encoder_attn(self.encoder_attn_layer_norm(x), *cross_kv)
        return x + self.fc2(F.gelu(self.fc1(self.final_layer_norm(x))))


class Encoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        c, D = config, config.d_model
        self.conv1 = Conv1d(c.num_mel_bins, D, kernel_size=3, padding=1)
        self.conv2 = Conv1d(D, D, kernel_size=3, stride=2, padding=1)
        self.embed_positions = Embedding(c.max_source_positions, D)  # sinusoids, stored in the file
        self.layers = nn.ModuleList(
            Block(D, c.encoder_attention_heads, c.encoder_ffn_dim) for _ in range(c.encoder_layers)
        )
        self.layer_norm = LayerNorm(D)

    def embed(self, mel):
        """What the first block reads. (B, n_mels, 2T) -> (B, T, D)"""
        x = F.gelu(self.conv2(F.gelu(self.conv1(mel))))  # (B, D, T)
        # Contiguous: sums keep the strides of their inputs, so every block would pay for a view.
        x = x.transpose(1, 2).contiguous()
        return x + self.embed_positions.weight[: x.shape[1]]


class Decoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        c, D = config, config.d_model
        self.embed_tokens = Embedding(c.vocab_size, D)
        self.embed_positions = Embedding(c.max_target_positions, D)
        self.layers = nn.ModuleList(
            Block(D, c.decoder_attention_heads, c.decoder_ffn_dim, cross=True)
            for _ in range(c.decoder_layers)
        )
        self.layer_norm = LayerNorm(D)

    def cross_keys_values(self, audio):
        """Keys and values of the encoder's final output (B, T, D): once per clip, not per token.

        -> [(k, v) of each block], (B, H, T, D/H)
        """
        pairs = [block.encoder_attn.keys_values(audio) for block in self.layers]
        return [(k.contiguous(), v.contiguous()) for k, v in pairs]

    def forward(self, tokens, cross_kv, cache=None, start=0):
        """Token ids (B, T) at positions start … start + T - 1 -> float32 logits (B, T, vocab_size)

        cross_kv: from cross_keys_values. cache (n_layers, 2, B, H, max_len, D/H): keys and values
        of past tokens, if there are or will be any; written in place.
        """
        T = tokens.shape[1]
        # Causal attention lets query i see keys 0 … i, so tokens after a past would see too little.
        assert T == 1 or start == 0, "feed several tokens only at the start, later ones one by one"
        x = self.embed_tokens(tokens) + self.embed_positions.weight[start : start + T]  # (B, T, D)
        for n, block in enumerate(self.layers):
            x = block(x, cross_kv[n], None if cache is None else cache[n], start)
        return F.linear(self.layer_norm(x), self.embed_tokens.weight).float()  # the tied head


class Whisper(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    @classmethod
    def from_pretrained(cls, folder, dtype=torch.float32, device="cpu"):
        """A frozen Whisper from a folder in the Hugging Face layout.

        Errors: FileNotFoundError, ValueError; they say what is missing or does not fit.
        """
        folder = Path(folder)
        if not (folder / "config.json").is_file():
            remedy = (
                "`python demo/prepare.py` makes weights/whisper-tiny.en, "
                "`hf download openai/whisper-large-v3 --local-dir DIR` fetches the paper's"
            )
            raise FileNotFoundError(f"no Whisper model in {folder}: {remedy}")
        config = WhisperConfig.from_json(folder / "config.json")
        with torch.device("meta"):  # shapes without memory
            whisper = cls(config)
        head = ("proj_out.weight",)  # some files repeat the tied embedding under this name
        load_weights(whisper, folder, dtype, device, prefix="model.", tied=head)
        whisper.vocabulary = Vocabulary(folder)
        return whisper.requires_grad_(False).eval()

    # no_grad, not inference_mode: the Q-Former trains on these outputs, and autograd refuses to
    # save inference tensors.
    @torch.no_grad()
    def encode(self, mel, layers):
        """Outputs of the encoder blocks `layers` (0-based), before the final LayerNorm.

        Blocks after the last one asked for are not run.
        mel: (B, n_mels, frames) from log_mel, frames even and at most 3000.
        -> (B, len(layers), frames / 2, D), in the model's dtype
        """
        B, n_mels, n_frames = mel.shape
        T, c = n_frames // 2, self.config
        known = 2 * c.max_source_positions
        assert n_mels == c.num_mel_bins, f"this Whisper has {c.num_mel_bins} mel bins, not {n_mels}"
        assert n_frames <= known, f"{n_frames} mel frames, and this Whisper knows {known}"
        in_range = all(0 <= n < c.encoder_layers for n in layers)
        assert in_range, f"taps {layers} are not all in 0…{c.encoder_layers - 1}"
        mel = mel.to(self.encoder.conv1.weight)  # dtype and device
        taps = mel.new_empty(B, len(layers), T, c.d_model)
        # One clip keeps all cores of a CPU busy, and its activations stay in cache: 1.1 times as
        # fast as eight clips at once.
        at_once = 1 if mel.device.type == "cpu" else B
        for b in range(0, B, at_once):
            x = self.encoder.embed(mel[b : b + at_once])  # (at_once, T, D)
            for n, block in enumerate(self.encoder.layers[: max(layers) + 1]):
                x = block(x)
                if n in layers:
                    taps[b : b + at_once, layers.index(n)] = x
        return taps

    @torch.no_grad()
    def transcribe(
        self,
        waveforms,
        max_new_tokens=128,
        batch_size=32,
        no_speech_threshold=0.3,
        seconds=CLIP_SECONDS,
    ):
        """Transcripts of a list of 16 kHz waveforms, each padded or cut to `seconds`. -> list[str]

        See transcribe_encoded.
        """
        c, device = self.config, self.encoder.conv1.weight.device
        seconds = min(seconds, c.max_source_positions // POSITIONS_PER_SECOND)
        texts = [None] * len(waveforms)
        # A batch decodes until its longest transcript ends, so clips of like length go together.
        order = sorted(range(len(waveforms)), key=lambda i: len(waveforms[i]))
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            mel = log_mel([waveforms[i] for i in batch], c.num_mel_bins, seconds, device)
            last_block = self.encode(mel, [c.encoder_layers - 1])[:, 0]  # (B, T, D)
            heard = self.transcribe_encoded(last_block, max_new_tokens, no_speech_threshold)
            for i, text in zip(batch, heard):
                texts[i] = text
        return texts

    @torch.no_grad()
    def transcribe_encoded(self, last_block, max_new_tokens=128, no_speech_threshold=0.3):
        """Greedy transcripts from the output of the last encoder block, (B, T, D). -> list[str]

        Whoever has the taps need not encode twice. A clip whose no-speech probability is above the
        threshold gets " ". OpenAI's 0.6 lets most animal sounds be "transcribed".
        """
        B, T, D = last_block.shape
        words, device, c = self.vocabulary, last_block.device, self.config
        max_len, H = 4 + max_new_tokens, c.decoder_attention_heads  # the prompt is 4 tokens at most
        limit = c.max_target_positions
        assert max_len <= limit, f"max_new_tokens can be {limit - 4} at most"
        cross_kv = self.decoder.cross_keys_values(self.encoder.layer_norm(last_block))
        cache = last_block.new_zeros(c.decoder_layers, 2, B, H, max_len, D // H)

        # One token a step, the prompt's too: every step has one shape and needs no mask.
        def next_logits(tokens, position):
            return self.decoder(tokens[:, None], cross_kv, cache, position)[:, 0]  # (B, vocab_size)

        # The first decoded position tells whether anybody speaks and, in multilingual checkpoints,
        # which language.
        tokens = torch.full((B,), words.start, device=device)
        logits = next_logits(tokens, 0)
        silent = logits.softmax(-1)[:, words.no_speech] > no_speech_threshold  # (B,)
        prompt = [torch.full_like(tokens, words.no_timestamps)]
        if words.multilingual:
            language = words.languages.start + logits[:, words.languages].argmax(-1)
            prompt = [language, torch.full_like(tokens, words.transcribe)] + prompt
        for position, tokens in enumerate(prompt, start=1):
            logits = next_logits(tokens, position)

        suppress = torch.tensor(words.suppress, dtype=torch.long, device=device)
        logits[:, words.begin_suppress] = -torch.inf  # no empty and no blank transcript
        # clips[b]: the clip that row b of the batch decodes. The device is waited for here, and
        # once a token.
        clips, done, transcripts = list(range(B)), to_host(silent), [[] for _ in range(B)]
        first = 1 + len(prompt)
        for position in range(first, first + max_new_tokens):
            logits[:, suppress] = -torch.inf
            tokens = logits.argmax(-1)  # (clips that are still here,)
            for b, token in enumerate(to_host(tokens)):
                done[b] = done[b] or token == words.end
                if not done[b]:
                    transcripts[clips[b]].append(token)
            if all(done):
                break
            # Drop the clips that have ended, so that one long transcript does not carry them along.
            if 2 * sum(done) >= len(done):
                running = [b for b, ended in enumerate(done) if not ended]
                clips, done = [clips[b] for b in running], [False] * len(running)
                running = torch.tensor(running, device=device)
                tokens, cache = tokens[running], cache[:, :, running]
                cross_kv = [(k[running], v[running]) for k, v in cross_kv]
            logits = next_logits(tokens, position)
        return [words.decode(transcript).strip() or " " for transcript in transcripts]


# --------------------------------------------------------------------------------------------------
# Vocabulary


class Vocabulary:
    """What decoding must know of token ids: text, special ones by name, those never written."""

    def __init__(self, folder):
        if (folder / "tokenizer.json").is_file():
            file = read_json(folder / "tokenizer.json")
            special = {token["content"]: token["id"] for token in file["added_tokens"]}
            ids = file["model"]["vocab"] | special
        else:
            ids = read_json(folder / "vocab.json") | read_json(folder / "added_tokens.json")
        self.text = {id: text for text, id in ids.items()}
        self.start, self.end = ids["<|startoftranscript|>"], ids["<|endoftext|>"]
        self.transcribe, self.no_timestamps = ids["<|transcribe|>"], ids["<|notimestamps|>"]
        # renamed in large-v3
        self.no_speech = ids["<|nospeech|>" if "<|nospeech|>" in ids else "<|nocaptions|>"]
        self.languages = slice(self.start + 1, ids["<|translate|>"])  # 99 ids, 100 in large-v3

        settings = read_json(folder / "config.json")
        if (folder / "generation_config.json").is_file():
            settings |= read_json(folder / "generation_config.json")
        # English-only checkpoints have the language tokens too, untrained. Their vocabulary is one
        # entry shorter (no blank token).
        self.multilingual = settings.get("is_multilingual", settings["vocab_size"] >= 51865)
        self.suppress = settings.get("suppress_tokens") or []
        self.begin_suppress = settings.get("begin_suppress_tokens") or []

    def decode(self, ids):
        """Text of the ordinary tokens. The special ones (language, task, timestamps) come from
        <|endoftext|> on and are left out.
        """
        text = "".join(self.text[id] for id in ids if id < self.end)
        return bytes(BYTE_OF[character] for character in text).decode("utf-8", errors="replace")


# --------------------------------------------------------------------------------------------------
# Command line


@dataclass
class Settings:
    audio: str = argument("wav, flac, ogg or mp3")
    whisper: str = setting("weights/whisper-tiny.en", "folder in the Hugging Face layout")


def main():
    s = run.parse_settings(Settings, "Print the transcript of a sound file's first 30 seconds.")
    waveform = load_audio(s.audio, CLIP_SECONDS)
    whisper = Whisper.from_pretrained(s.whisper, device=default_device())
    print(whisper.transcribe([waveform])[0])


if __name__ == "__main__":
    run.main(main)
