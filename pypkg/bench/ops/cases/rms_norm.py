"""rms_norm, with and without the residual add."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import paddle

from pypkg import ops
from pypkg.bench.ops import work
from pypkg.bench.ops.case import (
    COMPOSITION,
    OURS,
    TORCH,
    Baseline,
    BenchmarkCase,
    Inputs,
    Workload,
    normal,
)
from pypkg.bench.ops.run import Differentiated

if TYPE_CHECKING:
    import torch

_EPSILON = 1e-6


def _ours(
    x: paddle.Tensor, weight: paddle.Tensor, residual: paddle.Tensor | None = None
) -> paddle.Tensor | tuple[paddle.Tensor, paddle.Tensor]:
    if residual is None:
        return ops.rms_norm(x, weight, _EPSILON)
    return ops.rms_norm(x, weight, _EPSILON, residual)


def _reference(
    x: paddle.Tensor, weight: paddle.Tensor, residual: paddle.Tensor | None = None
) -> paddle.Tensor | tuple[paddle.Tensor, paddle.Tensor]:
    return ops.rms_norm_reference(x, weight, _EPSILON, residual)


def _torch(
    x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None = None
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    from torch.nn.functional import rms_norm

    if residual is None:
        return rms_norm(x, weight.shape, weight, _EPSILON)
    h = x + residual
    return rms_norm(h, weight.shape, weight, _EPSILON), h


# Paddle's own F.rms_norm and fused_rms_norm have no kernel with a gradient on CPU.
_BASELINES = (
    Baseline(OURS, "paddle", _ours),
    Baseline(COMPOSITION, "paddle", _reference),
    Baseline(TORCH, "torch", _torch),
)


def _case(workload: Workload, with_residual: bool) -> BenchmarkCase[Differentiated]:
    rows, hidden = workload.tokens, workload.config.hidden_size
    names = ("x", "weight", "residual") if with_residual else ("x", "weight")

    def inputs(rng: np.random.Generator) -> Inputs:
        shapes = {"x": (rows, hidden), "weight": (hidden,), "residual": (rows, hidden)}
        return {name: normal(rng, *shapes[name]) for name in names}

    return BenchmarkCase(
        "rms_norm+residual" if with_residual else "rms_norm",
        f"{workload.name}: [{rows}, {hidden}]",
        work.rms_norm(rows, hidden, with_residual),
        _BASELINES,
        Differentiated(inputs, names, _reference),
    )


def cases(workloads: Sequence[Workload]) -> list[BenchmarkCase[Differentiated]]:
    return [_case(each, residual) for residual in (False, True) for each in workloads]
