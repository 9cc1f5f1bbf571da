"""
publish.py: an adapter as it goes into a repository: in bf16, half the size of what train.py wrote.

    python tools/publish.py out/real/adapter adapters/real

The result is an adapter folder like any other. It is trained on from float32 again.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parent.parent))
from engine import run
from engine.checkpoint import load_tensors, read_record, save_tensors, write_record
from engine.run import argument


@dataclass
class Settings:
    adapter: str = argument("folder written by train.py")
    out: str = argument("folder to write: model.safetensors, config.json")


def main():
    s = run.parse_settings(Settings, __doc__)
    tensors = load_tensors(Path(s.adapter) / "model.safetensors")
    smaller = {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}
    save_tensors(Path(s.out) / "model.safetensors", smaller)
    write_record(Path(s.out) / "config.json", read_record(Path(s.adapter) / "config.json"))
    size = (Path(s.out) / "model.safetensors").stat().st_size
    print(f"{s.out}: {len(tensors)} tensors, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    run.main(main)
