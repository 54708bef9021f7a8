"""The operators that are benchmarked. A new one is a module here and a line below."""

from __future__ import annotations

from collections.abc import Sequence

from pypkg.bench.ops.case import Operator, Update, Workload
from pypkg.bench.ops.cases import (
    adamw,
    cross_entropy,
    flash_attention,
    gated_activation,
    matmul,
    rms_norm,
    rotary_embedding,
)

_MODULES = (
    rms_norm,
    rotary_embedding,
    gated_activation,
    flash_attention,
    cross_entropy,
    matmul,
    adamw,
)


def operators(workloads: Sequence[Workload]) -> list[Operator | Update]:
    """Every operator, at the shapes that the workloads give."""
    return [operator for module in _MODULES for operator in module.operators(workloads)]
