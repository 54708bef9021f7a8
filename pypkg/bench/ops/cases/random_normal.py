"""random_normal_, which fills a matrix of a model, beside other generators."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import paddle

from pypkg import ops
from pypkg.bench.ops import work
from pypkg.bench.ops.case import OURS, TORCH, Baseline, BenchmarkCase, Workload
from pypkg.bench.ops.fill_run import NormalFill
from pypkg.parallel.host_memory import to_host

if TYPE_CHECKING:
    import torch

_DEVIATION = 0.02
_SEED = 1


def _ours(out: paddle.Tensor) -> None:
    ops.random_normal_(out, key=_SEED, stream=0, cols=out.size, deviation=_DEVIATION)


def _paddle(out: paddle.Tensor) -> None:
    out.normal_(0.0, _DEVIATION)


def _numpy() -> Callable[[paddle.Tensor], None]:
    generator = np.random.default_rng(_SEED)

    def fill(out: paddle.Tensor) -> None:
        values: Any = to_host(out)  # the memory of the tensor
        generator.standard_normal(dtype=np.float32, out=values)
        values *= np.float32(_DEVIATION)

    return fill


def _torch(out: torch.Tensor) -> None:
    out.normal_(0.0, _DEVIATION)


def _case(workload: Workload) -> BenchmarkCase[NormalFill]:
    config = workload.config
    shape = (config.intermediate_size, config.hidden_size)
    baselines = [
        Baseline(OURS, "paddle", _ours),
        Baseline("Paddle", "paddle", _paddle, dtypes=("float32",)),
        Baseline(TORCH, "torch", _torch),
    ]
    if paddle.device.get_device() == "cpu":
        baselines.insert(1, Baseline("NumPy, one thread", "paddle", _numpy(), dtypes=("float32",)))
    return BenchmarkCase(
        "random_normal",
        f"{workload.name}: [{shape[0]}, {shape[1]}]",
        work.random_normal(math.prod(shape)),
        tuple(baselines),
        NormalFill(shape, _DEVIATION),
    )


def cases(workloads: Sequence[Workload]) -> list[BenchmarkCase[NormalFill]]:
    return [_case(workload) for workload in workloads]
