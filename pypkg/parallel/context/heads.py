"""Exchange of heads for tokens around attention (Jacobs et al., 2023, "DeepSpeed Ulysses").

Outside attention a rank of the context group has all heads of its own tokens. In attention it has
all tokens of its own heads. One all-to-all exchanges packed queries, keys and values before
attention, and a second one exchanges the outputs after it. A backward pass exchanges the gradients
in the opposite direction.
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
    """The numbers of query heads and of key-value heads that this rank has in attention.

    Args:
        heads_q, heads_k: the numbers that it has outside attention.
    """
    degree = context_degree() if exchanges_heads() else 1
    return heads_q // degree, max(heads_k // degree, 1)


def own_heads(values: Sequence[T]) -> Sequence[T]:
    """The values that belong to the query heads that this rank has in attention.

    Args:
        values: one for each query head that this rank has outside attention.
    """
    if not exchanges_heads():
        return values
    count = len(values) // context_degree()
    return values[mesh.current().context_rank * count :][:count]


def tokens_for_heads(qkv: Tensor, batch: int, heads_q: int, heads_k: int) -> Tensor:
    """Exchanges packed queries, keys and values: all tokens of the heads of ``attended_heads``.

    If there are fewer key-value heads than ranks, consecutive ranks get the same head. Every rank
    of the context group must call this.

    Args:
        qkv: [..., (heads_q + 2 * heads_k) * head_dim], packed query | key | value of this rank's
            tokens; the tokens of ``batch`` rows follow one another.
        heads_q: a multiple of the number of ranks.
        heads_k: a multiple or a divisor of the number of ranks.

    Returns:
        [batch, sequence, width / ranks], packed query | key | value. ``width`` is that of ``qkv``,
        with key-value heads repeated for the ranks that share them.
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
    """The inverse exchange for outputs of attention: all heads of this rank's tokens.

    Every rank of the context group must call this.

    Args:
        out: [batch, sequence, width], of all tokens and this rank's heads.

    Returns:
        [batch, sequence / ranks, ranks * width].
    """
    degree = context_degree()
    batch, sequence, width = out.shape
    by_owner = out.reshape([batch, degree, sequence // degree, width]).transpose([1, 0, 2, 3])
    return _Exchange.apply(by_owner).transpose([1, 2, 0, 3]).reshape([batch, -1, degree * width])


class _Exchange(PyLayer):
    """An all-to-all: row i goes to rank i of the context group. Its backward pass is the same."""

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
