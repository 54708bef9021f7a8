"""``python -m pypkg.bench ops``: every operator at every shape, on Paddle's device."""

from __future__ import annotations

import argparse
import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

from pypkg import _native, ops
from pypkg.bench.ops.bench import DTYPES, Limits, bench_operator
from pypkg.bench.ops.case import TORCH, Operator, Update, Workload
from pypkg.bench.ops.cases import operators
from pypkg.bench.ops.frameworks import TorchFramework, available_frameworks
from pypkg.bench.ops.limits import MATMUL_SIZE, ThreadedCopy, best_matmul_rate
from pypkg.errors import UserError
from pypkg.models.architecture.registry import load_config

logger = logging.getLogger("pypkg")

_COPY_CHECK_BYTES = 2**29


def default_workloads() -> list[Workload]:
    """A training batch of the small model, and one sequence in a layer of a 7B model."""
    return [
        Workload("llama-58m", load_config("llama-58m"), batch=4, sequence=512),
        Workload("llama-2-7b", load_config("meta-llama/Llama-2-7b"), batch=1, sequence=1024),
    ]


def run_operators(options: argparse.Namespace) -> dict[str, Any]:
    """The measurements that the command line asks for.

    Raises:
        UserError: an operator that does not exist.
        BenchmarkError: the result of a baseline differs from the reference.
    """
    frameworks, notes = available_frameworks(options.threads)
    chosen = _choose(operators(default_workloads()), options.op)
    torch = frameworks.get("torch")
    if options.torch_compile and isinstance(torch, TorchFramework):
        chosen = [_with_torch_compile(each, torch) for each in chosen]
    notes += [note for each in chosen for note in each.notes]
    backend = ops.backend()
    if backend == "reference":
        notes.append("the compiled operators were not in use: pypkg ran its Paddle composition")
    device = _device()
    on_cpu = backend == "compiled" and device.startswith("cpu")
    rate, source = best_matmul_rate(frameworks)
    limits = Limits(ThreadedCopy(options.threads), frameworks[source])
    rows = []
    for operator in chosen:
        for shape in operator.shapes:
            for dtype in options.dtype or DTYPES:
                logger.info("%s, %s, %s", operator.name, shape.label, dtype)
                found = bench_operator(operator, shape, dtype, frameworks, limits, options.seconds)
                if not found:
                    logger.info("  left out: pypkg has none for %s tensors here", dtype)
                rows += found
    copies = [limits.copy.seconds(_COPY_CHECK_BYTES) for _ in range(5)]
    return {
        "kind": "ops",
        "device": device,
        "backend": f"{backend}, CPU kernels for {_native.cpu_isa()}" if on_cpu else backend,
        "limits": {
            "copy_bytes_per_second": _COPY_CHECK_BYTES / min(copies),
            "copy_bytes": _COPY_CHECK_BYTES,
            "matmul_flops_per_second": rate,
            "matmul_source": f"{source}, float32, {MATMUL_SIZE} x {MATMUL_SIZE}",
        },
        "counted": {each.name: each.counted for each in chosen},
        "notes": notes,
        "rows": rows,
    }


def _choose(
    known: Sequence[Operator | Update], names: Sequence[str] | None
) -> list[Operator | Update]:
    unknown = sorted(set(names or ()) - {each.name for each in known})
    if unknown:
        raise UserError(
            f"--op {unknown[0]} is not a benchmarked operator; use one of "
            f"{', '.join(each.name for each in known)}"
        )
    return [each for each in known if not names or each.name in names]


def _with_torch_compile(operator: Operator | Update, torch: TorchFramework) -> Operator | Update:
    twins = [
        dataclasses.replace(each, name="torch.compile", function=torch.compile(each.function))
        for each in operator.baselines
        if each.name == TORCH
    ]
    return dataclasses.replace(operator, baselines=(*operator.baselines, *twins))


def _device() -> str:
    """What runs: results of a CPU held to a narrower instruction set are results of their own."""
    import paddle

    if paddle.device.get_device().startswith("gpu"):
        return paddle.device.cuda.get_device_name()
    widest = _native.cpu_isas()[-1]
    return "cpu" if _native.cpu_isa() == widest else f"cpu {_native.cpu_isa()}"
