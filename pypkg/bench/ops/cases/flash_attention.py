"""flash_attention, causal."""

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

# Enough to occupy every core; the Paddle baselines store [sequence, sequence] for each head.
_MAX_HEADS = 8


def _reference(q: paddle.Tensor, k: paddle.Tensor, v: paddle.Tensor) -> paddle.Tensor:
    return ops.flash_attention_reference(q, k, v)[0]


def _paddle(q: paddle.Tensor, k: paddle.Tensor, v: paddle.Tensor) -> paddle.Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def _torch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    from torch.nn.functional import scaled_dot_product_attention

    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    return out.transpose(1, 2)


def _case(workload: Workload) -> BenchmarkCase[Differentiated]:
    config = workload.config
    batch, sequence, dim = workload.batch, workload.sequence, config.head_dim
    heads = min(config.num_attention_heads, _MAX_HEADS)
    heads_kv = heads * config.num_key_value_heads // config.num_attention_heads

    def inputs(rng: np.random.Generator) -> Inputs:
        return {
            "q": normal(rng, batch, sequence, heads, dim),
            "k": normal(rng, batch, sequence, heads_kv, dim),
            "v": normal(rng, batch, sequence, heads_kv, dim),
        }

    pairs = batch * work.visible_pairs("causal", sequence)
    return BenchmarkCase(
        "flash_attention",
        f"{workload.name}: [{batch}, {sequence}, {heads}, {dim}]",
        work.flash_attention(pairs, heads, dim),
        (
            Baseline(OURS, "paddle", ops.flash_attention),
            Baseline(COMPOSITION, "paddle", _reference),
            Baseline(PADDLE, "paddle", _paddle, dtypes=("float32",)),
            Baseline(TORCH, "torch", _torch),
        ),
        Differentiated(inputs, ("q", "k", "v"), _reference),
        bound="compute",
        # Backward subtracts sum(dout * out) with the rounded out. For a query whose weight lies on
        # one key, the exact gradient is near 0 and this rounding remains; torch has the same error.
        bfloat16_tolerance=2.0**-3,
    )


def cases(workloads: Sequence[Workload]) -> list[BenchmarkCase[Differentiated]]:
    return [_case(workload) for workload in workloads]
