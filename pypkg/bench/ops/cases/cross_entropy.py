"""cross_entropy and linear_cross_entropy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
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
    Inputs,
    Workload,
    normal,
)
from pypkg.bench.ops.run import Differentiated

if TYPE_CHECKING:
    import torch

# With a weight of this many values the products are slow, and fewer rows are timed.
_LARGE_WEIGHT = 2**26
_FEW_ROWS = 128


def _paddle(logits: paddle.Tensor, labels: paddle.Tensor) -> paddle.Tensor:
    return F.cross_entropy(logits, labels, reduction="none")


def _torch(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    from torch.nn.functional import cross_entropy

    return cross_entropy(logits, labels, reduction="none")


def _paddle_linear(
    hidden: paddle.Tensor, weight: paddle.Tensor, labels: paddle.Tensor
) -> paddle.Tensor:
    return F.cross_entropy(paddle.matmul(hidden, weight, transpose_y=True), labels)


def _torch_linear(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    from torch.nn.functional import cross_entropy, linear

    return cross_entropy(linear(hidden, weight), labels)


def _case(workload: Workload) -> BenchmarkCase[Differentiated]:
    rows, vocab = workload.tokens, workload.config.vocab_size

    def inputs(rng: np.random.Generator) -> Inputs:
        return {"logits": normal(rng, rows, vocab), "labels": rng.integers(0, vocab, rows)}

    reference = ops.cross_entropy_reference
    return BenchmarkCase(
        "cross_entropy",
        f"{workload.name}: [{rows}, {vocab}]",
        work.cross_entropy(rows, vocab),
        (
            Baseline(OURS, "paddle", ops.cross_entropy),
            Baseline(COMPOSITION, "paddle", reference),
            Baseline(PADDLE, "paddle", _paddle, dtypes=("float32",)),
            Baseline(TORCH, "torch", _torch),
        ),
        Differentiated(inputs, ("logits",), reference, overwritten=("logits",)),
    )


def _linear_case(workload: Workload) -> BenchmarkCase[Differentiated]:
    vocab, width = workload.config.vocab_size, workload.config.hidden_size
    rows = workload.tokens if vocab * width < _LARGE_WEIGHT else min(workload.tokens, _FEW_ROWS)

    def inputs(rng: np.random.Generator) -> Inputs:
        return {
            "hidden": normal(rng, rows, width),
            "weight": normal(rng, vocab, width, scale=width**-0.5),
            "labels": rng.integers(0, vocab, rows),
        }

    return BenchmarkCase(
        "linear_cross_entropy",
        f"{workload.name}: [{rows}, {width}] x [{width}, {vocab}]",
        work.matmul(rows, width, vocab),
        (
            Baseline(OURS, "paddle", ops.linear_cross_entropy, dtypes=("float32",)),
            Baseline(PADDLE, "paddle", _paddle_linear, dtypes=("float32",)),
            Baseline(TORCH, "torch", _torch_linear),
        ),
        Differentiated(inputs, ("hidden", "weight"), ops.linear_cross_entropy_reference),
        bound="compute",
        passes=("forward+backward",),
    )


def cases(workloads: Sequence[Workload]) -> list[BenchmarkCase[Differentiated]]:
    return [*map(_case, workloads), *map(_linear_case, workloads)]
