"""
synth.py: everyday sounds and instruments for the demo, computed with numpy; nothing is recorded.

sound(seed, k) and music(seed, k) -> (waveform float32 (n,) at 16 kHz, attributes {key: value}) of
clip k of the split that the integers `seed` stand for. The classes take turns and the labels are
dealt like cards, so that all are balanced and independent. Neighbouring labels leave a gap (slow
stays below 1.3 events a second, fast above 2.4): none is a matter of taste.
"""

import zlib

import numpy as np

RATE = 16000
VOLUMES = {  # RMS of the whole clip, dB below full scale
    "quiet": (-38.0, -33.0),
    "normal": (-27.0, -23.0),
    "loud": (-18.0, -14.0),
}
TEMPOS = {"slow": (0.9, 1.3), "fast": (2.4, 3.2)}  # events per second
NOTE_TEMPOS = {"slow": (1.2, 1.7), "fast": (3.6, 5.0)}  # notes or beats per second
COUNTS = {"one": 1, "two": 2, "three": 3, "four": 4}
REGISTERS = {  # fundamental of a single note, Hz
    "low": (100, 150),
    "medium": (250, 370),
    "high": (620, 930),
}
CHORDS = {"major chord": (0, 4, 7), "minor chord": (0, 3, 7)}  # semitones above the root
MELODIES = {"rising": 1, "falling": -1, "repeating": 0}  # sign of the steps


# -- labels, level and noise, shared with speech.py ------------------------------------------------


def deal(seed, k, key, values):
    """The k-th card of ever new shuffles of `values`: each value equally often, independent of what
    other keys get.
    """
    block, i = divmod(k, len(values))
    rng = np.random.default_rng((*seed, zlib.crc32(key.encode()), block))
    return values[rng.permutation(len(values))[i]]


def rms_dbfs(wave):
    """Root mean square in dB below full scale (a full-scale square wave has 0)."""
    return 10 * np.log10(np.mean(np.square(wave, dtype=np.float64)) + 1e-20)


def set_volume(rng, wave, volume):
    """Scale to an RMS inside the band of `volume`. Peaks are rounded off, which costs RMS, hence
    the iterations.
    """
    target, gain = rng.uniform(*VOLUMES[volume]), 1.0
    for _ in range(6):
        gain *= 10 ** ((target - rms_dbfs(np.tanh(gain * wave))) / 20)
    return np.tanh(gain * wave)


def set_peak(rng, wave):
    return wave / np.abs(wave).max() * 10 ** (rng.uniform(-15, -1) / 20)


def add_noise(wave, noise, snr):
    """snr: signal-to-noise ratio, dB"""
    return wave + noise * 10 ** ((rms_dbfs(wave) - snr - rms_dbfs(noise)) / 20)


def band_noise(rng, n, low, high):
    """White noise (n,) of unit RMS between `low` and `high` Hz. The edges are about half an octave
    wide: sharp ones ring.
    """
    f = np.fft.rfftfreq(n, 1 / RATE) + 1e-9
    spectrum = np.fft.rfft(rng.standard_normal(n)) / (1 + (low / f) ** 8) / (1 + (f / high) ** 8)
    noise = np.fft.irfft(spectrum, n)
    return noise / noise.std()


# -- building blocks -------------------------------------------------------------------------------


def seconds(duration):
    # in whole 10 ms: the FFT is slow for prime lengths
    return np.arange(int(duration * 100) * RATE // 100) / RATE


def tone(frequency, t, harmonics=(1.0,)):
    """Harmonics of a fundamental in Hz, constant or changing over time (n,) -> wave (n,)"""
    frequency = np.broadcast_to(frequency, t.shape)
    phase = 2 * np.pi * np.cumsum(frequency) / RATE
    highest = frequency.max()
    audible = [(h, a) for h, a in enumerate(harmonics, 1) if a and h * highest < 7500]
    return sum(a * np.sin(h * phase) for h, a in audible)


def wander(rng, t, rate, low, high):
    """A slow random curve (n,) between low and high, about `rate` turns per second."""
    knots = rng.uniform(low, high, int(t[-1] * rate) + 3)
    return np.interp(t * rate, np.arange(len(knots)), knots)


def fade(t, attack):
    """Ramps (n,) of `attack` seconds at both ends: no clicks."""
    return np.minimum(1, np.minimum(t, t[-1] - t) / attack)


def place(events, times, duration):
    """Add each event (a short wave) at its time to a silence of `duration`; all in seconds."""
    out = np.zeros_like(seconds(duration))
    for event, time in zip(events, times):
        start = int(time * RATE)
        out[start : start + len(event)] += event[: max(0, len(out) - start)]
    return out


# -- lasting sounds: (rng, t (n,)) -> wave (n,) ----------------------------------------------------


def siren(rng, t):
    sweep = np.sin(2 * np.pi * rng.uniform(0.3, 1.2) * t + rng.uniform(0, 6))
    middle = rng.uniform(700, 1000)
    return tone(middle * 2 ** (rng.uniform(0.4, 0.7) * sweep), t, (1, 0.4, 0.3, 0.1))


def rain(rng, t):
    drops = band_noise(rng, len(t), 1500, 7000)
    drops = drops * (rng.random(len(t)) < rng.uniform(0.002, 0.01)) * rng.exponential(4, len(t))
    hiss = band_noise(rng, len(t), rng.uniform(800, 1500), 7500)
    return 0.3 * hiss + np.convolve(drops, np.exp(-np.arange(60) / 12), "same")


def ocean_waves(rng, t):
    swell = np.sin(np.pi * t / rng.uniform(2.0, 3.2) + rng.uniform(0, 3)) ** 2
    roar = band_noise(rng, len(t), 60, rng.uniform(400, 700))
    foam = band_noise(rng, len(t), 600, 4000)
    return (0.05 + swell**2) * (roar + 0.4 * swell * foam)


def wind(rng, t):
    """A narrow band of noise howls up and down over a rumble."""
    pitch = wander(rng, t, 1.0, 300, rng.uniform(500, 800))
    howl = tone(pitch, t) * band_noise(rng, len(t), 1, 40)
    strength = wander(rng, t, 1.5, 0.3, 1.0)
    return strength * (howl + 0.4 * band_noise(rng, len(t), 40, 250))


def engine(rng, t):
    idle = rng.uniform(35, 60)
    speed = wander(rng, t, 0.7, idle, 1.6 * idle)
    harmonics = rng.uniform(0.5, 1, 24) / np.arange(1, 25) ** 0.7
    return tone(speed, t, harmonics) + 0.4 * band_noise(rng, len(t), 80, 900)


def helicopter(rng, t):
    beat = (t * rng.uniform(10, 15)) % 1
    blades = np.exp(-6 * beat) * band_noise(rng, len(t), 60, rng.uniform(700, 1200))
    return blades + 0.08 * tone(rng.uniform(400, 700), t, (1, 0.5))


LASTING = {
    "siren": siren,
    "rain": rain,
    "ocean waves": ocean_waves,
    "wind": wind,
    "engine": engine,
    "helicopter": helicopter,
}


# -- single events, repeated: (rng, times t (n,), pitch f in Hz) -> wave (n,) ----------------------


def tick(rng, t, f):
    return np.exp(-200 * t) * tone(f * rng.choice([0.8, 1]), t, (1, 0, 0.5))


def heartbeat(rng, t, f):  # lub, dub
    beat = t % 0.15
    envelope = np.exp(-30 * beat) * np.minimum(1, 200 * beat)
    return envelope * tone(f * np.where(t < 0.15, 1, 1.3), t, (1, 0.5, 0.2))


def beep(rng, t, f):
    return fade(t, 0.005) * tone(f, t, (1, 0, 0.5, 0, 0.3))


def footstep(rng, t, f):
    heel = np.exp(-40 * t) * band_noise(rng, len(t), f, 400)
    return heel + 0.5 * np.exp(-2000 * (t - 0.09) ** 2) * band_noise(rng, len(t), 600, 16 * f)


def drip(rng, t, f):
    envelope = np.exp(-35 * t) * np.minimum(1, 400 * t)
    return envelope * tone(f * rng.uniform(0.9, 1.1) * (1 + 8 * t), t)


def chirp(rng, t, f):  # two, which bend
    envelope = np.maximum(0, np.sin(2 * np.pi * t / 0.12 - 0.5))
    return envelope * tone(f * 2 ** (rng.uniform(-0.4, 0.4) * np.sin(4 * np.pi * t / 0.12)), t)


def knock(rng, t, f):
    wood = tone(f, t, (1, 0.6, 0.4))
    return np.exp(-50 * t) * (wood + 0.7 * band_noise(rng, len(t), 200, 1800))


BELL = (  # partial, amplitude, decay (1/s)
    (0.5, 1.0, 0.9),
    (1, 1.0, 1.5),
    (1.19, 0.8, 2),
    (1.5, 0.5, 2.5),
    (2, 0.9, 3),
    (2.74, 0.4, 4),
    (3.76, 0.3, 6),
)


def bell(rng, t, f):
    partials = (a * np.exp(-t * d) * np.sin(2 * np.pi * f * r * t) for r, a, d in BELL)
    return fade(t, 0.002) * sum(partials)


def ring(rng, t, f):
    warble = np.where((t * 20) % 1 < 0.5, 1, 1.25)
    return fade(t, 0.01) * tone(f * warble, t, (1, 0.3, 0.2))


def horn(rng, t, f):
    harmonics = np.arange(1, 12) ** -0.5
    return fade(t, 0.02) * sum(tone(f * r, t, harmonics) for r in (0.95, 1.2))


def bark(rng, t, f):
    rise = np.sin(np.pi * t / 0.22)
    breath = 0.5 * band_noise(rng, len(t), 500, 3000)
    rough = 1 + 0.7 * band_noise(rng, len(t), 20, 200)
    voice = tone(f * (0.8 + 0.5 * rise), t, (0.6, 1, 0.8, 0.5, 0.3))
    return rise**0.5 * (breath + rough * voice)


EVENTS = {  # label, seconds, pitch in Hz
    "clock ticking": ("Tempo", 0.03, 2400, tick),
    "heartbeat": ("Tempo", 0.3, 60, heartbeat),
    "alarm beeping": ("Tempo", 0.15, 1600, beep),
    "footsteps": ("Tempo", 0.2, 110, footstep),
    "water dripping": ("Tempo", 0.12, 800, drip),
    "birds chirping": ("Tempo", 0.24, 3200, chirp),
    "door knocking": ("Count", 0.12, 220, knock),
    "church bell": ("Count", 1.8, 400, bell),
    "phone ringing": ("Count", 0.8, 1100, ring),
    "car horn": ("Count", 0.45, 400, horn),
    "dog barking": ("Count", 0.22, 420, bark),
}


def sound(seed, k):
    rng = np.random.default_rng((*seed, k))
    turn, i = divmod(k, len(LASTING) + len(EVENTS))
    name = [*LASTING, *EVENTS][i]
    if name in LASTING:
        label, value = "Volume", deal(seed, turn, name, list(VOLUMES))
        wave = LASTING[name](rng, seconds(rng.uniform(2.5, 5.5)))
    else:  # no volume for these: the RMS of clicks says how sparse they are, not how loud
        label, length, pitch, make = EVENTS[name]
        value = deal(seed, turn, name, list({"Tempo": TEMPOS, "Count": COUNTS}[label]))
        start, pitch = rng.uniform(0.1, 0.4), pitch * rng.uniform(0.75, 1.35)
        if label == "Tempo":
            duration = rng.uniform(3.5, 5.5)
            times = np.arange(start, duration - length, 1 / rng.uniform(*TEMPOS[value]))
        else:  # bell strokes ring into each other
            step = min(length, 0.8) + rng.uniform(0.12, 0.35)
            times = start + step * np.arange(COUNTS[value])
            duration = max(1.0, times[-1] + length + rng.uniform(0.1, 0.3))
        wave = place([make(rng, seconds(length), pitch) for _ in times], times, duration)
    # no room is silent
    wave = add_noise(wave, band_noise(rng, len(wave), 50, 7500), rng.uniform(25, 45))
    wave = set_volume(rng, wave, value) if label == "Volume" else set_peak(rng, wave)
    return wave.astype(np.float32), {"Sound": name, label: value}


# -- music -----------------------------------------------------------------------------------------

H = np.arange(1, 17)  # harmonic numbers
# partials as multiples of the fundamental, their amplitudes, their decays (1/s); attack (s),
# vibrato (relative), breath or bow noise
INSTRUMENTS = {
    "organ": (H[:8], np.array([1, 0.8, 0.6, 0.7, 0, 0.4, 0, 0.5]), 0 * H[:8], 0.01, 0, 0),
    "flute": (H[:3], np.array([1, 0.12, 0.04]), 0 * H[:3], 0.07, 0.004, 0.15),
    "piano": (H * np.sqrt(1 + 5e-4 * H**2), np.exp(-0.35 * H), 1.2 + 0.9 * H, 0.002, 0, 0),
    "violin": (H, H**-0.9, 0 * H, 0.11, 0.012, 0.04),
    "trumpet": (H, H**0.6 * np.exp(-0.35 * H), 0 * H, 0.03, 0, 0.01),
    "xylophone": (
        np.array([1, 3, 6.3]),
        np.array([1, 0.7, 0.5]),
        np.array([12, 25, 50]),
        0.001,
        0,
        0,
    ),
}
KINDS = ["single note", "major chord", "minor chord", "melody", "melody", "melody"]


def play(rng, name, f, t):
    """One note of an instrument: fundamental f Hz, times t (n,) -> wave (n,)"""
    if name == "guitar":
        # Karplus–Strong: a burst of noise circulates through a two-point average, one period at a
        # time.
        periods = [rng.uniform(-1, 1, round(RATE / f))]
        while len(periods) * periods[0].size < len(t):
            periods.append(0.998 * 0.5 * (periods[-1] + np.roll(periods[-1], 1)))
        return np.concatenate(periods)[: len(t)] * fade(t, 0.001)
    ratios, amplitudes, decays, attack, vibrato, noise = INSTRUMENTS[name]
    bend = 1 + vibrato * np.sin(2 * np.pi * rng.uniform(5.5, 6.5) * t)
    phase = 2 * np.pi * np.cumsum(f * bend) / RATE
    keep = f * ratios < 7500
    # (partials, n)
    waves = np.exp(-np.outer(decays[keep], t)) * np.sin(np.outer(ratios[keep], phase))
    breath = noise * band_noise(rng, len(t), 1500, 6000)
    return (amplitudes[keep] @ waves + breath) * fade(t, attack)


def drum_beat(rng, speed, duration):
    """Kick and snare in turn, a hi-hat twice a beat."""
    t = seconds(0.2)
    kick = np.exp(-20 * t) * tone(rng.uniform(45, 60) * (1 + 3 * np.exp(-50 * t)), t)
    skin = band_noise(rng, len(t), 500, 6000) + tone(rng.uniform(170, 220), t)
    snare = 0.35 * np.exp(-25 * t) * skin
    hat = 0.15 * np.exp(-70 * t) * band_noise(rng, len(t), 5000, 7900)
    halves = np.arange(0.02, duration - 0.2, 0.5 / speed)
    beats = place([kick, snare] * len(halves), halves[::2], duration)
    return beats + place([hat] * len(halves), halves, duration)


def music(seed, k):
    rng = np.random.default_rng((*seed, k))
    turn, i = divmod(k, len(INSTRUMENTS) + 2)
    name = [*INSTRUMENTS, "guitar", "drums"][i]
    kind = "drum beat" if name == "drums" else deal(seed, turn, name, KINDS)
    attributes, duration = {"Instrument": name, "Kind": kind}, rng.uniform(1.5, 3)
    if kind == "single note":
        attributes["Pitch"] = str(rng.choice(list(REGISTERS)))
        pitch = rng.uniform(*REGISTERS[attributes["Pitch"]])
        wave = play(rng, name, pitch, seconds(duration))
    elif kind in CHORDS:
        root = rng.uniform(200, 400)
        notes = [root * 2 ** (step / 12) for step in CHORDS[kind]]
        wave = sum(play(rng, name, note, seconds(duration)) for note in notes)
    else:
        attributes["Tempo"] = deal(seed, turn, name + "Tempo", list(NOTE_TEMPOS))
        speed, count = rng.uniform(*NOTE_TEMPOS[attributes["Tempo"]]), rng.integers(5, 8)
        if kind == "drum beat":
            wave = drum_beat(rng, speed, 2 + duration)
        else:
            attributes["Melody"] = deal(seed, turn, name + "Melody", list(MELODIES))
            steps = np.cumsum(rng.integers(1, 5, count)) * MELODIES[attributes["Melody"]]
            # centred, so that no register gives the direction away
            middle = rng.uniform(250, 450) * 2 ** (-steps.mean() / 12)
            t = seconds(0.9 / speed)
            notes = [play(rng, name, middle * 2 ** (step / 12), t) for step in steps]
            wave = place(notes, np.arange(count) / speed, count / speed + 0.1)
    wave = add_noise(wave, band_noise(rng, len(wave), 50, 7500), rng.uniform(30, 50))
    return set_peak(rng, wave).astype(np.float32), attributes
