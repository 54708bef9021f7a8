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
    BenchmarkCase,
    Inputs,
    Workload,
    normal,
)
from pypkg.bench.ops.run import Differentiated

if TYPE_CHECKING:
    import torch

# A product takes rows x weight operations. A layer with more weights than the first number is left
# out; from the second number on, fewer rows are timed.
_LARGEST_WEIGHT, _LARGE_WEIGHT = 2**25, 2**24
_FEW_ROWS = 256
_NOT_SUPPORTED = (
    "matmul was left out: products in bfloat16 need a processor with AVX512_BF16 and the compiled "
    "operators"
)


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
    """Names of the products of a decoder layer, with the inputs and outputs of their weights."""
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


def _cases(workload: Workload) -> list[BenchmarkCase[Differentiated]]:
    supported = _native.matmul_bfloat16_supported() and ops.backend() == "compiled"
    found = []
    for layer, (width, out) in _layers(workload).items():
        if width * out > _LARGEST_WEIGHT:
            continue
        few = width * out >= _LARGE_WEIGHT
        rows = min(workload.tokens, _FEW_ROWS) if few else workload.tokens
        found.append(
            BenchmarkCase(
                "matmul",
                f"{workload.name}, {layer}: [{rows}, {width}] x [{width}, {out}]",
                work.matmul(rows, width, out),
                _baselines(supported),
                Differentiated(partial(_inputs, rows, width, out), ("x", "y"), paddle.matmul),
                bound="compute",
                notes=() if supported else (_NOT_SUPPORTED,),
            )
        )
    return found


def _baselines(supported: bool) -> tuple[Baseline, ...]:
    only = ("float32",)
    ours = only if supported else ()
    return (
        Baseline(OURS, "paddle", _ours, ours, precision="bfloat16"),
        Baseline("pypkg, float32 products", "paddle", ops.matmul, only),
        Baseline(PADDLE, "paddle", paddle.matmul, only),
        Baseline(TORCH, "torch", _torch, only),
        Baseline("torch, bfloat16 autocast", "torch", _torch_autocast, only, "bfloat16"),
        Baseline("torch, bfloat16", "torch", _torch, only, "bfloat16", "bfloat16"),
    )


def _inputs(rows: int, width: int, out: int, rng: np.random.Generator) -> Inputs:
    return {"x": normal(rng, rows, width), "y": normal(rng, width, out, scale=width**-0.5)}


def cases(workloads: Sequence[Workload]) -> list[BenchmarkCase[Differentiated]]:
    return [case for workload in workloads for case in _cases(workload)]
