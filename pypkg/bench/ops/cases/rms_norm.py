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
    Inputs,
    Operator,
    Shape,
    Workload,
    normal,
)

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


def _shape(workload: Workload, with_residual: bool) -> Shape:
    rows, hidden = workload.tokens, workload.config.hidden_size

    def inputs(rng: np.random.Generator) -> Inputs:
        arrays = {"x": normal(rng, rows, hidden), "weight": normal(rng, hidden)}
        if with_residual:
            arrays["residual"] = normal(rng, rows, hidden)
        return arrays

    label = f"{workload.name}: [{rows}, {hidden}]"
    return Shape(label, inputs, work.rms_norm(rows, hidden, with_residual))


def operators(workloads: Sequence[Workload]) -> list[Operator]:
    return [
        Operator(
            name="rms_norm",
            counted=work.COUNTED["rms_norm"],
            bound="memory",
            gradients=("x", "weight"),
            reference=_reference,
            baselines=_BASELINES,
            shapes=tuple(_shape(workload, False) for workload in workloads),
        ),
        Operator(
            name="rms_norm+residual",
            counted=work.COUNTED["rms_norm+residual"],
            bound="memory",
            gradients=("x", "weight", "residual"),
            reference=_reference,
            baselines=_BASELINES,
            shapes=tuple(_shape(workload, True) for workload in workloads),
        ),
    ]
