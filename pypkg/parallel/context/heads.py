"""Exchange of heads for tokens around attention (Jacobs et al., 2023, "DeepSpeed Ulysses").

Before attention a rank of the context group has all heads of its own tokens; in attention it has
all tokens for its own heads. One all-to-all of packed queries, keys and values leads there, and one
of the outputs back. Backward passes exchange gradients the other way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import paddle
import paddle.distributed as dist
from paddle import Tensor
from paddle.autograd import PyLayer

from pypkg.ops import split_heads
from pypkg.parallel import mesh
from pypkg.parallel.context.tokens import context_degree, exchanges_heads

T = TypeVar("T")


def attended_heads(heads_q: int, heads_k: int) -> tuple[int, int]:
    """Heads of queries, and of keys or values, that this rank has in attention.

    Args:
        heads_q, heads_k: those that it has outside.
    """
    degree = context_degree() if exchanges_heads() else 1
    return heads_q // degree, max(heads_k // degree, 1)


def own_heads(values: Sequence[T]) -> Sequence[T]:
    """Of values for the heads of queries outside attention, those of this rank's in attention."""
    if not exchanges_heads():
        return values
    count = len(values) // context_degree()
    return values[mesh.current().context_rank * count :][:count]


def tokens_for_heads(qkv: Tensor, batch: int, heads_q: int, heads_k: int) -> Tensor:
    """Packed queries, keys and values of all tokens, for the heads of ``attended_heads``.

    With fewer heads of keys than ranks, consecutive ranks get the same one.

    Args:
        qkv: [..., (heads_q + 2 * heads_k) * head_dim] of this rank's tokens, columns query | key |
            value; the tokens of ``batch`` rows one after the other.
        heads_q: a multiple of the number of ranks.
        heads_k: a multiple or a divisor of it.

    Returns:
        [batch, sequence, width / ranks], columns query | key | value; width counts repeated heads.
    """
    degree = context_degree()
    parts = []
    for part in split_heads(qkv, batch, heads_q, heads_k):
        tokens, heads = part.shape[1:3]
        if heads < degree:
            part = part.repeat_interleave(degree // heads, axis=2)
        parts.append(part.reshape([batch, tokens, degree, -1]))
    packed = paddle.concat(parts, axis=-1)
    by_source = _Exchange.apply(packed.transpose([2, 0, 1, 3]))
    return by_source.transpose([1, 0, 2, 3]).reshape([batch, degree * tokens, -1])


def heads_for_tokens(out: Tensor) -> Tensor:
    """All heads of this rank's tokens, [batch, tokens, ranks * width].

    Args:
        out: [batch, sequence, width], of all tokens for this rank's heads.
    """
    degree = context_degree()
    batch, sequence, width = out.shape
    by_owner = out.reshape([batch, degree, sequence // degree, width]).transpose([1, 0, 2, 3])
    return _Exchange.apply(by_owner).transpose([1, 2, 0, 3]).reshape([batch, -1, degree * width])


class _Exchange(PyLayer):
    """The i-th row goes to the i-th rank of the context group; its own inverse and its gradient."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        return _exchanged(rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _exchanged(gradient)


def _exchanged(rows: Tensor) -> Tensor:
    rows = rows.contiguous()
    out = paddle.empty(rows.shape, rows.dtype)
    dist.alltoall_single(out, rows, group=mesh.current().context)
    return out
