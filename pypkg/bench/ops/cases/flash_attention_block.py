"""A block of ring attention: the second half of a sequence attends to the first half."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import paddle
from paddle.autograd import PyLayer

from pypkg import ops
from pypkg.bench.ops import work
from pypkg.bench.ops.case import (
    COMPOSITION,
    OURS,
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

_MAX_HEADS = 8  # as of flash_attention


class _Block(PyLayer):
    """The two operators on blocks as one function with a gradient."""

    @staticmethod
    def forward(ctx, q, k, v):  # type: ignore[no-untyped-def]
        out, lse = ops.flash_attention_with_lse(q, k, v, query_offset=k.shape[1], key_offset=0)
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx, grad_out):  # type: ignore[no-untyped-def]
        q, k, v, out, lse = ctx.saved_tensor()
        return ops.flash_attention_block_gradients(
            q, k, v, out, lse, grad_out, query_offset=k.shape[1], key_offset=0
        )


def _reference(q: paddle.Tensor, k: paddle.Tensor, v: paddle.Tensor) -> paddle.Tensor:
    return ops.flash_attention_reference(q, k, v, ops.AttentionMask(causal=False))[0]


def _torch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    from torch.nn.functional import scaled_dot_product_attention

    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2)


def _case(workload: Workload) -> BenchmarkCase[Differentiated]:
    config = workload.config
    batch, tokens, dim = workload.batch, workload.sequence // 2, config.head_dim
    heads = min(config.num_attention_heads, _MAX_HEADS)
    heads_kv = heads * config.num_key_value_heads // config.num_attention_heads

    def inputs(rng: np.random.Generator) -> Inputs:
        return {
            "q": normal(rng, batch, tokens, heads, dim),
            "k": normal(rng, batch, tokens, heads_kv, dim),
            "v": normal(rng, batch, tokens, heads_kv, dim),
        }

    return BenchmarkCase(
        "flash_attention_with_lse",
        f"{workload.name}: [{batch}, {tokens}, {heads}, {dim}]",
        work.flash_attention(batch * tokens * tokens, heads, dim),
        (
            Baseline(OURS, "paddle", _Block.apply),
            Baseline(COMPOSITION, "paddle", _reference),
            Baseline(TORCH, "torch", _torch),
        ),
        Differentiated(inputs, ("q", "k", "v"), _reference),
        bound="compute",
        bfloat16_tolerance=2.0**-3,  # as of flash_attention
    )


def cases(workloads: Sequence[Workload]) -> list[BenchmarkCase[Differentiated]]:
    return [_case(workload) for workload in workloads]
