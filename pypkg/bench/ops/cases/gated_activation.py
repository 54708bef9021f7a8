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
    BenchmarkCase,
    Workload,
    normal,
)
from pypkg.bench.ops.run import Differentiated

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


def _case(
    name: str, activation: str, workload: Workload, *others: Baseline
) -> BenchmarkCase[Differentiated]:
    rows, ffn = workload.tokens, workload.config.intermediate_size
    reference = _reference(activation)
    return BenchmarkCase(
        name,
        f"{workload.name}: [{rows}, 2 x {ffn}]",
        work.gated_activation(rows, ffn),
        (
            Baseline(OURS, "paddle", getattr(ops, name)),
            Baseline(COMPOSITION, "paddle", reference),
            *others,
            Baseline(TORCH, "torch", _torch(activation)),
        ),
        Differentiated(lambda rng: {"gate": normal(rng, rows, 2 * ffn)}, ("gate",), reference),
    )


def cases(workloads: Sequence[Workload]) -> list[BenchmarkCase[Differentiated]]:
    theirs = Baseline(PADDLE, "paddle", lambda gate: F.swiglu(gate), dtypes=("float32",))
    return [
        *(_case("swiglu", "silu", each, theirs) for each in workloads),
        *(_case("geglu", "gelu", each) for each in workloads),
    ]
