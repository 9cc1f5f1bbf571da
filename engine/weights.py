"""
weights.py: the official safetensors files of a Hugging Face folder into a module that was built
on the meta device.
"""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import nn

# The weights come from a file. To initialize them first, even on the meta device, would import 800
# modules (sympy …): 1.3 s.
Linear, Embedding, Conv1d, LayerNorm = (
    type(c.__name__, (c,), {"reset_parameters": lambda self: None})
    for c in (nn.Linear, nn.Embedding, nn.Conv1d, nn.LayerNorm)
)

# Byte-level BPE files write each byte as one visible character: itself if printable in Latin-1,
# else the next one from U+0100 on.
VISIBLE = [
    *range(ord("!"), ord("~") + 1),
    *range(ord("¡"), ord("¬") + 1),
    *range(ord("®"), ord("ÿ") + 1),
]
BYTE_OF = {chr(byte): byte for byte in VISIBLE}
BYTE_OF |= {chr(256 + i): byte for i, byte in enumerate(b for b in range(256) if b not in VISIBLE)}

MAKE_OR_FETCH = "make the demo's with `python demo/prepare.py`, or download a Hugging Face folder"


def read_json(path):
    """One JSON file. Errors name it: FileNotFoundError with the remedy, ValueError when it is
    broken.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: {MAKE_OR_FETCH}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not readable JSON ({error}): download it again") from None


def check_fit(what, found, wanted):
    """ValueError that lists every missing, unknown and misshapen tensor. found, wanted: {name:
    shape}
    """
    shapes = [
        f"{n} {list(s)}, expected {list(wanted[n])}"
        for n, s in found.items()
        if list(wanted.get(n, s)) != list(s)
    ]
    problems = {
        "missing": sorted(wanted.keys() - found),
        "unknown": sorted(found.keys() - wanted),
        "wrong shape": shapes,
    }
    if any(problems.values()):
        lists = "; ".join(
            f"{kind}: {', '.join(names)}" for kind, names in problems.items() if names
        )
        raise ValueError(f"{what}. {lists}")


def load_weights(
    module, folder, dtype, device, prefix="", tied=(), place=lambda parameter, tensor: tensor
):
    """Fill `module`, which is on the meta device, from folder/model*.safetensors, tensor by tensor:
    nothing exists twice.

    prefix: what the files put before the module's names. tied: names in the files of tensors that
    repeat another one. place(parameter, tensor): what becomes the parameter, by default the whole
    tensor.
    Errors: FileNotFoundError; ValueError that names a damaged file, or all tensors that do not fit.
    """
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    files = (
        sorted(set(read_json(index)["weight_map"].values()))
        if index.exists()
        else ["model.safetensors"]
    )
    parameters = {prefix + name: p for name, p in module.named_parameters(remove_duplicate=False)}
    wanted = {name: p.shape for name, p in parameters.items() if name not in tied}
    found, loaded = {}, {}
    for file in (folder / name for name in files):
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing: {MAKE_OR_FETCH}")
        try:
            with safe_open(file, framework="pt", device=str(device)) as tensors:
                for name in set(tensors.keys()) - set(tied):
                    found[name] = tensors.get_slice(name).get_shape()
                    if list(wanted.get(name, ())) == found[name]:
                        tensor = tensors.get_tensor(name).to(dtype)
                        loaded[name.removeprefix(prefix)] = place(parameters[name], tensor)
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged ({error}): download or make it again") from None
    check_fit(f"{folder}: the weights do not fit config.json", found, wanted)
    module.load_state_dict(loaded, strict=False, assign=True)
