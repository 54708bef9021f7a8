"""swiglu and geglu on packed input, as the decoder uses them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import paddle
import paddle.nn.functional as F

from pypkg import ops
from pypkg.bench.ops import work
from pypkg.bench.ops.case import (
    COMPOSITION,
    OURS,
    PADDLE,
    TORCH,
    Baseline,
    Operator,
    Shape,
    Workload,
    normal,
)

if TYPE_CHECKING:
    import torch


def _reference(activation: str) -> Callable[[paddle.Tensor], paddle.Tensor]:
    return lambda gate: ops.gated_activation_reference(gate, activation=activation)


def _torch(activation: str) -> Callable[[torch.Tensor], torch.Tensor]:
    def run(gate: torch.Tensor) -> torch.Tensor:
        from torch.nn import functional

        gate, up = gate.chunk(2, dim=-1)
        return getattr(functional, activation)(gate) * up

    return run


def _shape(workload: Workload) -> Shape:
    rows, ffn = workload.tokens, workload.config.intermediate_size
    return Shape(
        f"{workload.name}: [{rows}, 2 x {ffn}]",
        lambda rng: {"gate": normal(rng, rows, 2 * ffn)},
        work.gated_activation(rows, ffn),
    )


def _operator(name: str, activation: str, shapes: tuple[Shape, ...], *others: Baseline) -> Operator:
    return Operator(
        name=name,
        counted=work.COUNTED[name],
        bound="memory",
        gradients=("gate",),
        reference=_reference(activation),
        baselines=(
            Baseline(OURS, "paddle", getattr(ops, name)),
            Baseline(COMPOSITION, "paddle", _reference(activation)),
            *others,
            Baseline(TORCH, "torch", _torch(activation)),
        ),
        shapes=shapes,
    )


def operators(workloads: Sequence[Workload]) -> list[Operator]:
    shapes = tuple(_shape(workload) for workload in workloads)
    theirs = Baseline(PADDLE, "paddle", lambda gate: F.swiglu(gate), dtypes=("float32",))
    return [
        _operator("swiglu", "silu", shapes, theirs),
        _operator("geglu", "gelu", shapes),
    ]
