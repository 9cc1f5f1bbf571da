"""
speech.py: spoken sentences for the demo, by espeak-ng through ctypes (GPL-3.0; library and voices
come in the wheel espeakng-loader).

speech(seed, k, split) -> (waveform float32 (n,) at 16 kHz, text, attributes {key: value}), see
synth.py. Pitch, speaking rate and volume are labelled from what is measured on the waveform, never
from the knob that was turned. Sentences and voices of the test split are never heard in training.
"""

import _ctypes
import ctypes
from pathlib import Path

import espeakng_loader
import numpy as np
from synth import RATE, VOLUMES, add_noise, band_noise, deal, place, set_volume, tone

ESPEAK_RATE = 22050
# Variants with a "breath" line in their file (f2, f3, f5, victor, whisper, …) are left out: they
# never sound the same twice.
VOICES = {
    "train": {
        "male": ("m1", "m3", "m4", "m5", "m7", "travis"),
        "female": ("f1", "Annie", "belinda", "linda", "steph2"),
    },
    "test": {"male": ("m2", "m6", "m8"), "female": ("f4", "aunty")},
}
ENGLISH_VOICES = ["en-us", "en-gb-x-rp", "en-gb-scotland", "en-029"]  # espeak refuses plain en-gb
LANGUAGES = {
    "English": "",
    "German": "de",
    "French": "fr",
    "Spanish": "es",
    "Italian": "it",
    "Polish": "pl",
}
# words per second of speech
SPEAKING_RATES = {"slow": (1.9, 2.5), "moderate": (3.2, 3.9), "fast": (5.0, 6.2)}
PITCHES = {"low": (85, 118), "medium": (140, 175), "high": (205, 280)}  # median fundamental, Hz
# Pitch cannot be independent of gender, but it does not give the gender away either: both share the
# middle.
PITCH_OF = {"male": ("low", "low", "medium"), "female": ("high", "high", "medium")}
NOISES = {"clean": None, "hiss": (8, 14), "hum": (4, 10)}  # signal-to-noise ratio, dB


def read_sentences():
    """sentences.txt -> {split: {language: [sentence]}}

    The last fifth of each language is the test split.
    """
    text = Path(__file__).with_name("sentences.txt").read_text(encoding="utf-8")
    splits = {"train": {}, "test": {}}
    for block in text.split("\n[")[1:]:  # "German]\nDer Zug …\n…"
        name, *lines = block.split("\n")
        name, lines = name.strip("]"), [line for line in lines if line]
        n_test = len(lines) // 5
        splits["train"][name], splits["test"][name] = lines[:-n_test], lines[-n_test:]
    return splits


SENTENCES = read_sentences()


def espeak(text, voice, words_per_minute=175, pitch=50):
    """-> waveform float64 (n,) at 16 kHz without the silence around it

    ValueError where espeak does not know the voice.
    """
    # The library keeps state from one call to the next (echo, flutter), so that a clip would depend
    # on those before it, even after espeak_Terminate. Loading it anew for every clip costs a
    # millisecond and makes each reproducible alone.
    library = ctypes.CDLL(espeakng_loader.get_library_path())
    chunks = []

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
    def collect(samples, n, events):
        if samples and n > 0:
            chunks.append(np.ctypeslib.as_array(samples, (n,)).copy())
        return 0

    synchronous, rate_knob, pitch_knob, utf8 = 2, 1, 3, 1
    folder = espeakng_loader.get_data_path()
    rate = library.espeak_Initialize(synchronous, 0, folder.encode(), 0)
    assert rate == ESPEAK_RATE, f"espeak-ng cannot use {folder} (its limit is 160 characters)"
    library.espeak_SetSynthCallback(collect)
    if library.espeak_SetVoiceByName(voice.encode()) != 0:
        raise ValueError(f"espeak-ng has no voice {voice}")
    library.espeak_SetParameter(rate_knob, words_per_minute, 0)
    library.espeak_SetParameter(pitch_knob, pitch, 0)
    data = text.encode() + b"\0"
    library.espeak_Synth(data, len(data), 0, 0, 0, utf8, None, None)
    library.espeak_Terminate()
    _ctypes.dlclose(library._handle)

    wave = np.concatenate(chunks) / 32768
    loud = np.flatnonzero(np.abs(wave) > 0.02 * np.abs(wave).max())
    wave = wave[loud[0] : loud[-1] + 1]
    # Resample by cutting the spectrum: 22,050 : 16,000 = 441 : 320.
    m = -(-len(wave) // 441)
    return np.fft.irfft(np.fft.rfft(wave, 441 * m)[: 160 * m + 1], 320 * m) * 320 / 441


def median_f0(wave, low=65, high=400):
    """Median fundamental in Hz of the voiced frames of a clean voice (n,) at 16 kHz, by
    autocorrelation.
    """
    frames = np.lib.stride_tricks.sliding_window_view(wave, 1024)[::256] * np.hanning(1024)
    power = np.abs(np.fft.rfft(frames, 2048)) ** 2  # (frames, 1025)
    correlation = np.fft.irfft(power)[:, : RATE // low + 1]  # (frames, lags)
    energy = correlation[:, 0]
    # The window lowers long lags, which is welcome: the peak at one period wins over the one at two.
    lag = RATE // high + correlation[:, RATE // high :].argmax(1)
    peak = correlation[np.arange(len(lag)), lag]
    voiced = (peak > 0.45 * energy) & (energy > 0.05 * energy.max())
    return float(np.median(RATE / lag[voiced])) if voiced.any() else 0.0


def within(value, band):
    return band[0] <= value <= band[1]


def say_as(rng, voice, sentences, variants, pitch, rate):
    """Draw sentence and variant, measure, correct the knobs, until both labels hold.
    -> (wave, text)
    """
    for _ in range(100):
        text, variant = str(rng.choice(sentences)), str(rng.choice(variants))
        target_f0, target_rate = rng.uniform(*PITCHES[pitch]), rng.uniform(*SPEAKING_RATES[rate])
        words_per_minute, pitch_knob = 175, 50
        for _ in range(3):
            wave = espeak(text, f"{voice}+{variant}", words_per_minute, pitch_knob)
            f0, words_per_second = median_f0(wave), len(text.split()) * RATE / len(wave)
            if within(f0, PITCHES[pitch]) and within(words_per_second, SPEAKING_RATES[rate]):
                return wave, text
            faster = words_per_minute * target_rate / words_per_second
            words_per_minute = int(np.clip(faster, 80, 450))
            higher = pitch_knob + 75 * np.log2(target_f0 / max(f0, 50))  # 50 to 100 steps an octave
            pitch_knob = int(np.clip(higher, 0, 99))
    raise RuntimeError(f"none of {voice}+{variants} reaches {pitch} pitch at a {rate} rate")


def speech(seed, k, split):
    rng = np.random.default_rng((*seed, k))
    gender = deal(seed, k, "Gender", ["male", "female"])
    # three English clips in eight
    language = deal(seed, k, "Language", ["English", "English", *LANGUAGES])
    attributes, voice = {"Gender": gender, "Language": language}, LANGUAGES[language]
    if language == "English":
        # Variety, not a label: Whisper tiny hears accents poorly (linear probe 0.57).
        voice = deal(seed, k, "Accent", ENGLISH_VOICES)
    pitch = deal(seed, k // 2, gender + "Pitch", PITCH_OF[gender])
    rate = deal(seed, k, "Speaking rate", list(SPEAKING_RATES))
    volume = deal(seed, k, "Volume", list(VOLUMES))
    noise = deal(seed, k, "Noise", list(NOISES))
    attributes |= {"Pitch": pitch, "Speaking rate": rate, "Volume": volume, "Noise": noise}
    sentences, variants = SENTENCES[split][language], VOICES[split][gender]
    wave, text = say_as(rng, voice, sentences, variants, pitch, rate)
    before, after = rng.uniform(0.1, 0.4, 2)
    wave = place([wave], [before], before + len(wave) / RATE + after)
    if noise != "clean":
        t = np.arange(len(wave)) / RATE
        if noise == "hiss":
            background = band_noise(rng, len(t), 200, 7500)
        else:
            background = tone(rng.uniform(90, 130), t, (1, 0.7, 0.6, 0.4, 0.3))
        wave = add_noise(wave, background, rng.uniform(*NOISES[noise]))
    return set_volume(rng, wave, volume).astype(np.float32), text, attributes
