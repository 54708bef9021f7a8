"""The benchmark of the kernels as a result for ``python -m pypkg.bench report``."""

from __future__ import annotations

import importlib.metadata
import shlex
import subprocess
from collections.abc import Sequence
from typing import Any

import torch

from pypkg.bench.environment import describe_run
from pypkg.bench.ops.gpu import timers
from pypkg.bench.ops.work import COUNTED
from pypkg.device.threads import available_cores


def ops_result(
    arguments: Sequence[str],
    limits: dict[str, float],
    products: list[dict[str, float]],
    rows: list[dict[str, Any]],
    notes: list[str],
    device: str,
) -> dict[str, Any]:
    """The result as the report reads it.

    Args:
        arguments: arguments of gpu_check.py; ``--output`` is left out of the recorded command.
        limits: operations or bytes per second, by unit.
        products: rates of matrix products by shape.
        rows: of ``measure``.
        notes: lines for the report.
        device: "cuda" or "cpu".
    """
    described = describe_run([], available_cores())
    described["command"] = shlex.join(["python", "tests/gpu/tools/gpu_check.py", *_told(arguments)])
    described["machine"] |= gpu_facts() if device == "cuda" else {}
    for package in ("triton", "liger_kernel"):
        try:
            described["versions"][package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    size = timers.matmul_size(device)
    return {
        **described,
        "kind": "ops",
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "backend": "the kernels themselves, without Paddle",
        "limits": {
            "copy_bytes_per_second": limits["GB/s"],
            "copy_bytes": 2 * timers.copy_size(device),
            "matmul_flops_per_second": limits["TFLOP/s"],
            "matmul_source": f"torch, bfloat16, {size} x {size}",
        },
        "products": products,
        "counted": {row["op"]: COUNTED[row["op"]] for row in rows},
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
    """The properties of the GPU that determine its speed."""
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
