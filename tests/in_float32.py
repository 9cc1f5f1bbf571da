"""python tests/in_float32.py SCRIPT --flags: run a script with float32 wherever it would choose
bf16, so that runs can be compared to rounding error on any machine. Works under torchrun too.
"""

import runpy
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import engine.run  # noqa: E402

engine.run.compute_dtype = lambda device: torch.float32
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
