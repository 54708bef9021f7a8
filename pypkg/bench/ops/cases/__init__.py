"""The cases of the operators. A new operator is a module here and a line below."""

from __future__ import annotations

from collections.abc import Sequence

from pypkg.bench.ops.bench import OperatorCase
from pypkg.bench.ops.case import Workload
from pypkg.bench.ops.cases import (
    adamw,
    cross_entropy,
    flash_attention,
    flash_attention_block,
    gated_activation,
    matmul,
    random_normal,
    rms_norm,
    rotary_embedding,
)

_MODULES = (
    rms_norm,
    rotary_embedding,
    gated_activation,
    flash_attention,
    flash_attention_block,
    cross_entropy,
    matmul,
    adamw,
    random_normal,
)


def operator_cases(workloads: Sequence[Workload]) -> list[OperatorCase]:
    """The cases of all operators at the shapes of the workloads, with dtype float32."""
    return [case for module in _MODULES for case in module.cases(workloads)]
