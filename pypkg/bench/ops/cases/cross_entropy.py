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
    Inputs,
    Operator,
    Shape,
    Workload,
    normal,
)

if TYPE_CHECKING:
    import torch

# A weight of this many values makes the products slow enough: fewer rows are timed then.
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


def _shape(workload: Workload) -> Shape:
    rows, vocab = workload.tokens, workload.config.vocab_size

    def inputs(rng: np.random.Generator) -> Inputs:
        return {"logits": normal(rng, rows, vocab), "labels": rng.integers(0, vocab, rows)}

    return Shape(
        f"{workload.name}: [{rows}, {vocab}]",
        inputs,
        work.cross_entropy(rows, vocab),
    )


def _linear_shape(workload: Workload) -> Shape:
    vocab, width = workload.config.vocab_size, workload.config.hidden_size
    rows = workload.tokens if vocab * width < _LARGE_WEIGHT else min(workload.tokens, _FEW_ROWS)

    def inputs(rng: np.random.Generator) -> Inputs:
        return {
            "hidden": normal(rng, rows, width),
            "weight": normal(rng, vocab, width, scale=width**-0.5),
            "labels": rng.integers(0, vocab, rows),
        }

    return Shape(
        f"{workload.name}: [{rows}, {width}] x [{width}, {vocab}]",
        inputs,
        work.matmul(rows, width, vocab),
    )


def operators(workloads: Sequence[Workload]) -> list[Operator]:
    return [
        Operator(
            name="cross_entropy",
            counted=work.COUNTED["cross_entropy"],
            bound="memory",
            gradients=("logits",),
            reference=ops.cross_entropy_reference,
            baselines=(
                Baseline(OURS, "paddle", ops.cross_entropy),
                Baseline(COMPOSITION, "paddle", ops.cross_entropy_reference),
                Baseline(PADDLE, "paddle", _paddle, dtypes=("float32",)),
                Baseline(TORCH, "torch", _torch),
            ),
            shapes=tuple(_shape(workload) for workload in workloads),
            overwritten=("logits",),
        ),
        Operator(
            name="linear_cross_entropy",
            counted="forward one product of 2 x rows x hidden x vocabulary, backward two. pypkg "
            "computes the gradients during forward, so the two passes are only compared together",
            bound="compute",
            gradients=("hidden", "weight"),
            reference=ops.linear_cross_entropy_reference,
            baselines=(
                Baseline(OURS, "paddle", ops.linear_cross_entropy, dtypes=("float32",)),
                Baseline(PADDLE, "paddle", _paddle_linear, dtypes=("float32",)),
                Baseline(TORCH, "torch", _torch_linear),
            ),
            shapes=tuple(_linear_shape(workload) for workload in workloads),
            passes=("forward+backward",),
        ),
    ]
