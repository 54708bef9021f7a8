"""matmul of float32 tensors under bfloat16 products, at the layers of a model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import paddle

from pypkg import _native, ops
from pypkg.bench.ops import work
from pypkg.bench.ops.case import (
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

# A product takes rows x weight operations: beyond so many weights a layer is left out, and from
# so many on fewer rows are timed.
_LARGEST_WEIGHT, _LARGE_WEIGHT = 2**25, 2**24
_FEW_ROWS = 256


def _ours(x: paddle.Tensor, y: paddle.Tensor) -> paddle.Tensor:
    ops.set_matmul_precision("bfloat16")
    try:
        return ops.matmul(x, y)
    finally:
        ops.set_matmul_precision("float32")


def _torch(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return x @ y


def _torch_autocast(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    import torch

    with torch.autocast("cpu", torch.bfloat16):
        return x @ y


def _layers(workload: Workload) -> dict[str, tuple[int, int]]:
    """The products of a decoder layer: name, and inputs and outputs of the weight."""
    config = workload.config
    hidden, ffn = config.hidden_size, config.intermediate_size
    heads = config.num_attention_heads, config.num_key_value_heads
    attention = heads[0] * config.head_dim
    return {
        "qkv_proj": (hidden, attention + 2 * heads[1] * config.head_dim),
        "o_proj": (attention, hidden),
        "gate_up_proj": (hidden, 2 * ffn),
        "down_proj": (ffn, hidden),
    }


def _shapes(workload: Workload) -> list[Shape]:
    found = []
    for layer, (width, out) in _layers(workload).items():
        if width * out > _LARGEST_WEIGHT:
            continue
        few = width * out >= _LARGE_WEIGHT
        rows = min(workload.tokens, _FEW_ROWS) if few else workload.tokens

        found.append(
            Shape(
                f"{workload.name}, {layer}: [{rows}, {width}] x [{width}, {out}]",
                partial(_inputs, rows, width, out),
                work.matmul(rows, width, out),
            )
        )
    return found


def _inputs(rows: int, width: int, out: int, rng: np.random.Generator) -> Inputs:
    return {"x": normal(rng, rows, width), "y": normal(rng, width, out, scale=width**-0.5)}


def operators(workloads: Sequence[Workload]) -> list[Operator]:
    supported = _native.matmul_bfloat16_supported() and ops.backend() == "compiled"
    return [
        Operator(
            name="matmul",
            counted="forward one product of 2 x rows x inputs x outputs, backward two. Tensors "
            "are float32; pypkg and torch's autocast round both operands to bfloat16 within the "
            "time, `torch, bfloat16` is given bfloat16 tensors, weight gradient included. With "
            "float32 products pypkg's matmul is Paddle's. The limit is that of float32 products",
            bound="compute",
            gradients=("x", "y"),
            reference=paddle.matmul,
            baselines=(
                Baseline(
                    *(OURS, "paddle", _ours, ("float32",) if supported else ()),
                    precision="bfloat16",
                ),
                Baseline("pypkg, float32 products", "paddle", ops.matmul, ("float32",)),
                Baseline(PADDLE, "paddle", paddle.matmul, ("float32",)),
                Baseline(TORCH, "torch", _torch, ("float32",)),
                Baseline(
                    "torch, bfloat16 autocast", "torch", _torch_autocast, ("float32",), "bfloat16"
                ),
                Baseline("torch, bfloat16", "torch", _torch, ("float32",), "bfloat16", "bfloat16"),
            ),
            shapes=tuple(shape for workload in workloads for shape in _shapes(workload)),
            notes=()
            if supported
            else (
                "matmul was left out: products in bfloat16 need a processor with AVX512_BF16 and "
                "the compiled operators",
            ),
        )
    ]
