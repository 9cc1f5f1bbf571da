"""
checkpoint.py: files that are whole or absent and know whether they are damaged; a run's state.
"""

import contextlib
import hashlib
import json
import os
import shutil
import sys
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


# -- a run's state ---------------------------------------------------------------------------------


def save(out, model, optimizer, step, record, keep):
    """OUT/checkpoints/step_N/ with the adapter and all that resuming needs; OUT/adapter is the
    newest adapter.

    record: settings, and hashes and sizes of what resuming must find unchanged. keep: checkpoints
    that stay.
    """
    folder = Path(out) / "checkpoints" / f"step_{step:08d}"
    temporary = folder.with_name("writing.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_adapter(temporary / "adapter")
    state = {f"buffer.{name}": buffer for name, buffer in model.adapter.named_buffers()}
    for name, parameter in model.trained().items():
        state[f"weight.{name}"] = parameter.detach()
        state |= {f"{key}.{name}": value for key, value in optimizer.state[parameter].items()}
    save_tensors(temporary / "trainer.safetensors", state)
    write_record(temporary / "trainer.json", {"step": step} | record)
    # Before the checkpoint counts: who finds the last step's has nothing left to do.
    model.save_adapter(Path(out) / "adapter")
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    drop_old(out, keep)


def drop_old(out, keep):
    """All but the newest checkpoints; when a run goes on, also what a kill left half deleted."""
    for old in sorted((Path(out) / "checkpoints").glob("step_*"))[:-keep]:
        shutil.rmtree(old)


def load(out, model, optimizer, record, defaults, free):
    """Continue from the newest checkpoint under OUT that is whole, if there is one. -> the step to
    go on with

    record: as in save. defaults: of settings that are newer than the checkpoint. free: settings
    that may differ.
    """
    place = Path(out) / "checkpoints"
    folders = sorted(place.glob("step_*"))
    if not folders and not any(place.glob("damaged_*")):
        return 0
    while folders:
        try:
            state = load_tensors(folders[-1] / "trainer.safetensors")
            saved = read_record(folders[-1] / "trainer.json")
            break
        except (FileNotFoundError, ValueError) as error:
            damaged = folders.pop()
            print(f"{damaged} is damaged and set aside ({error})", file=sys.stderr)
            with contextlib.suppress(OSError):  # another rank was first
                damaged.rename(damaged.with_name(f"damaged_{damaged.name}"))
    else:
        raise ValueError(f"no checkpoint in {place} is whole: delete {out} to begin anew")
    before = defaults | saved["settings"]
    changed = [k for k, v in record["settings"].items() if k not in free and before[k] != v]
    if changed:
        other = f"{folders[-1]} was made with another {', '.join(changed)}"
        raise ValueError(f"{other}: give the same settings, or another --out")
    now, then = record["made_from"] or {}, saved.get("made_from") or {}
    if changed := [key for key in then if key in now and now[key] != then[key]]:
        other = f"{folders[-1]} was made with another {', '.join(changed)}"
        raise ValueError(f"{other}: put back what was there, or give another --out")
    for name, buffer in model.adapter.named_buffers():
        buffer.copy_(state[f"buffer.{name}"])
    for name, parameter in model.trained().items():
        parameter.data.copy_(state[f"weight.{name}"])
        if f"step.{name}" in state:  # not so before the first step that was not skipped
            # All on the parameter's device: the fused AdamW refuses a step count that is elsewhere.
            kept = {key: state[f"{key}.{name}"] for key in ("step", "exp_avg", "exp_avg_sq")}
            moments = {key: tensor.to(parameter.device) for key, tensor in kept.items()}
            optimizer.state[parameter] = moments
    return saved["step"]
