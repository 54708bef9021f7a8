"""``python -m pypkg.bench ops --device cuda``: the kernels themselves, on a GPU beside torch.

It is the second half of `make gpu-check`, which builds the kernels for itself and needs no Paddle.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
from pathlib import Path

from pypkg.errors import UserError

SCRIPT = Path(__file__).resolve().parents[4] / "tests" / "gpu" / "tools" / "gpu_check.py"


def run_gpu_kernels(options: argparse.Namespace) -> int:
    """Times every CUDA and Triton kernel; returns 1 if one computes something else.

    Raises:
        UserError: no checkout, no torch, no GPU, or an option that is for CPUs.
    """
    for name in ("op", "dtype", "update_docs"):
        if getattr(options, name):
            raise UserError(
                f"--{name.replace('_', '-')} is for CPUs; on a GPU all kernels are timed at sizes "
                "and dtypes of their own, so leave it out"
            )
    if not SCRIPT.is_file():
        raise UserError(f"--device cuda needs a checkout of the project; {SCRIPT} does not exist")
    if importlib.util.find_spec("torch") is None:
        raise UserError("--device cuda times the kernels beside torch, which is not installed")
    import torch

    if not torch.cuda.is_available():
        raise UserError("--device cuda needs a GPU, and torch sees none; leave it out")
    command = [sys.executable, str(SCRIPT), "--no-checks"]
    command += ["--output", str(options.json)] if options.json else []
    command += [] if options.torch_compile else ["--no-compile"]
    return subprocess.run(command).returncode
