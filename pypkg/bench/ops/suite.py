"""``python -m pypkg.bench ops``: all cases of the operators, on the device of Paddle."""

from __future__ import annotations

import argparse
import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

from pypkg import _native, ops
from pypkg.bench.environment import cpu_device
from pypkg.bench.ops.bench import DTYPES, Limits, OperatorCase, bench_case
from pypkg.bench.ops.case import TORCH, Workload
from pypkg.bench.ops.cases import operator_cases
from pypkg.bench.ops.frameworks import TorchFramework, available_frameworks
from pypkg.bench.ops.limits import MATMUL_SIZE, ThreadedCopy, best_matmul_rate
from pypkg.bench.ops.work import COUNTED
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
    """Runs the benchmark that the command line requests.

    Raises:
        UserError: --op names an unknown operator.
        BenchmarkError: the result of a baseline differs from the reference.
    """
    frameworks, notes = available_frameworks(options.threads)
    chosen = _choose(operator_cases(default_workloads()), options.op)
    torch = frameworks.get("torch")
    if options.torch_compile and isinstance(torch, TorchFramework):
        chosen = [_with_torch_compile(each, torch) for each in chosen]
    notes += dict.fromkeys(note for each in chosen for note in each.notes)
    backend = ops.backend()
    if backend == "reference":
        notes.append("the compiled operators were not in use: pypkg ran its Paddle composition")
    device = _device()
    on_cpu = backend == "compiled" and device.startswith("cpu")
    rate, source = best_matmul_rate(frameworks)
    limits = Limits(ThreadedCopy(options.threads), frameworks[source])
    rows = []
    for each in chosen:
        for dtype in options.dtype or DTYPES:
            case = dataclasses.replace(each, dtype=dtype)
            logger.info("%s, %s, %s", case.op, case.shape, dtype)
            found = bench_case(case, frameworks, limits, options.seconds)
            if not found:
                logger.info("  left out: pypkg does not support %s tensors here", dtype)
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
        "counted": {each.op: COUNTED[each.op] for each in chosen},
        "notes": notes,
        "rows": rows,
    }


def _choose(known: Sequence[OperatorCase], names: Sequence[str] | None) -> list[OperatorCase]:
    operators = dict.fromkeys(each.op for each in known)
    unknown = sorted(set(names or ()) - operators.keys())
    if unknown:
        raise UserError(
            f"--op {unknown[0]} is not a benchmarked operator; use one of {', '.join(operators)}"
        )
    return [each for each in known if not names or each.op in names]


def _with_torch_compile(case: OperatorCase, torch: TorchFramework) -> OperatorCase:
    twins = [
        dataclasses.replace(each, name="torch.compile", function=torch.compile(each.function))
        for each in case.baselines
        if each.name == TORCH
    ]
    return dataclasses.replace(case, baselines=(*case.baselines, *twins))


def _device() -> str:
    """The name of the GPU, or ``cpu_device``."""
    import paddle

    if paddle.device.get_device().startswith("gpu"):
        return paddle.device.cuda.get_device_name()
    return cpu_device()
