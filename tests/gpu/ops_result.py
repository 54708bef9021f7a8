"""The benchmark of the kernels as a result for ``python -m pypkg.bench report``."""

from __future__ import annotations

import importlib.metadata
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timing
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # nothing is installed on a GPU
from pypkg.bench.environment import describe_run
from pypkg.threads import available_cores

_COUNTED = {
    "flash_attention": "products of visible pairs of a query and a key, 4 operations per dimension "
    "forward and 10 backward",
    "rms_norm": "forward reads x and writes y; backward reads x and dy, writes dx",
    "rms_norm+residual": "forward reads x and residual, writes y and x + residual",
    "rotary_embedding": "reads q and k and writes them; backward is the same kernel",
    "swiglu": "forward reads gate and up, writes one matrix; backward reads three, writes two",
    "geglu": "as swiglu",
    "cross_entropy": "forward reads the logits; backward reads them and writes their gradient",
    "adamw": "28 bytes per parameter, in float32 and with master weights",
}


def ops_result(
    arguments: Sequence[str],
    limits: dict[str, float],
    rows: list[dict[str, Any]],
    notes: list[str],
    device: str,
) -> dict[str, Any]:
    """
    Args:
        arguments: of gpu_check.py; where its file goes is not told.
        limits: operations or bytes per second, by unit.
    """
    described = describe_run([], available_cores())
    described["command"] = shlex.join(["python", "tests/gpu/gpu_check.py", *_told(arguments)])
    described["machine"] |= gpu_facts() if device == "cuda" else {}
    for package in ("triton", "liger_kernel"):
        try:
            described["versions"][package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    size = timing.matmul_size(device)
    return {
        **described,
        "kind": "ops",
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "backend": "the kernels themselves, without Paddle",
        "limits": {
            "copy_bytes_per_second": limits["GB/s"],
            "copy_bytes": 2 * timing.copy_size(device),
            "matmul_flops_per_second": limits["TFLOP/s"],
            "matmul_source": f"torch, bfloat16, {size} x {size}",
        },
        "counted": {row["op"]: _COUNTED[row["op"]] for row in rows},
        "notes": notes,
        "rows": rows,
    }


def _told(arguments: Sequence[str]) -> list[str]:
    words = list(arguments)
    if "--output" in words:
        start = words.index("--output")
        del words[start : start + 2]
    return words


def gpu_facts() -> dict[str, str]:
    """What decides how fast a GPU is."""
    nvcc = _output(["nvcc", "--version"]).splitlines()
    query = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"
    return {
        "gpu": torch.cuda.get_device_name(),
        "gpu_state": _output(["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]),
        "gpu_state_fields": query,
        "torch_cuda": str(torch.version.cuda),
        "nvcc": nvcc[-1] if nvcc else "unknown",
    }


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"
    except FileNotFoundError:
        return "unknown"
