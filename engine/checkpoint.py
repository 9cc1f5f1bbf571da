"""
checkpoint.py: files that are whole or absent, that know whether they are damaged, and a run's
state made of them.
"""

import contextlib
import hashlib
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors

# -- files -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def writing(path):
    """Whatever keeps the body from writing: the error names the file and the remedy."""
    try:
        yield
    except OSError as error:
        reason = (
            f"{path} cannot be written ({error.strerror or error}): free space or mend that folder"
        )
        raise OSError(
            f"{reason}, then the same command continues; what stood there before is whole"
        ) from None


def write_atomically(path, write):
    """Call write(temporary name), flush to the disk, rename: whoever reads sees the old file or the
    whole new one.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)


def write_text(path, text):
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path, value):
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_jsonl(path, rows):
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def tensors_hash(tensors):
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def save_tensors(path, tensors):
    """Write a safetensors file, atomically, that holds the sha256 of its own tensors."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # As bytes: safetensors' own save_file leaves a file of another name behind when it is killed.
    # One entry of metadata: of several, safetensors writes the order at random.
    data = to_safetensors(tensors, {"sha256": tensors_hash(tensors)})
    write_atomically(path, lambda temporary: temporary.write_bytes(data))


def load_tensors(path):
    """What save_tensors wrote, on the CPU; also safetensors files of others, without a sha256.
    ValueError names a damaged file.
    """
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            sha256 = (file.metadata() or {}).get("sha256")
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error})") from None
    if sha256 and sha256 != tensors_hash(tensors):
        raise ValueError(f"{path} is damaged (its tensors are not those whose sha256 it holds)")
    return tensors


def write_record(path, value):
    """A dict as JSON, atomically, with the sha256 of itself."""
    sha256 = hashlib.sha256(json.dumps(value).encode()).hexdigest()
    write_text(path, json.dumps(value | {"sha256": sha256}, indent=2))


def read_record(path):
    """What write_record wrote, or JSON of others without a sha256. ValueError names a damaged
    file.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
        sha256 = value.pop("sha256", None)
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error})") from None
    if sha256 and sha256 != hashlib.sha256(json.dumps(value).encode()).hexdigest():
        reason = (
            "its text does not have the sha256 it holds; if you changed it, take that entry out"
        )
        raise ValueError(f"{path} is damaged ({reason})")
    return value


def file_hash(folder):
    """sha256 over the safetensors files of a model folder, in the order of their names."""
    digest = hashlib.sha256()
    for file in sorted(Path(folder).glob("*.safetensors")):
        with open(file, "rb") as stream:
            while block := stream.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()
