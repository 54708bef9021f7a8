"""Attention whose keys and values go round a ring (Liu et al., 2023, "Ring Attention").

Each rank of the context group keeps its queries. Keys and values go from rank to rank, and the next
ones are in flight while the attention to those at hand is computed. The results are merged by their
log-sum-exp. In the backward pass the gradients of keys and values follow these round the ring, as
float32 sums, and come home with one message more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import paddle
import paddle.distributed as dist
from paddle import Tensor
from paddle.autograd import PyLayer

from pypkg import ops
from pypkg.ops.dispatch.checks import compute_dtype
from pypkg.parallel import mesh
from pypkg.parallel.context.tokens import blocks, whole_length


def ring_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: ops.AttentionMask,
    scale: float | None = None,
    softcap: float = 0.0,
) -> Tensor:
    """``ops.flash_attention`` of this rank's queries to the keys of all ranks of the context group.

    Every rank of the group must call this. Memory beside the output: keys and values of two ranks,
    and in the backward pass their gradients for three, whatever the number of ranks.

    Args:
        query: [batch, tokens, heads_q, head_dim], of this rank's tokens as ``blocks`` orders them.
        key, value: [batch, tokens, heads_k, head_dim].
        mask: by positions in the whole sequence; ``document_starts`` is that of the whole sequence.
        scale, softcap: as of ``ops.flash_attention``.

    Returns:
        Like query.
    """
    return _Ring.apply(query, key, value, mask, scale, softcap)


class _Ring(PyLayer):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: ops.AttentionMask,
        scale: float | None,
        softcap: float,
    ) -> Tensor:
        ring = _Places(query, mask)
        queries = ring.parts(query)
        # Merged in float32, so that 16-bit outputs are rounded once.
        merged: list[tuple[Tensor, Tensor] | None] = [None] * len(queries)
        for source, pair in _round(paddle.stack([key, value])):
            keys, values = ring.parts(pair[0]), ring.parts(pair[1])
            for i, j, of_query, of_key in ring.visible(source):
                out, lse = ops.flash_attention_with_lse(
                    queries[i], keys[j], values[j], mask, scale, softcap,
                    query_offset=of_query, key_offset=of_key,
                )  # fmt: skip
                held = merged[i]
                if held is None:
                    merged[i] = out.astype(compute_dtype(out)), lse
                else:
                    merged[i] = ops.merge_attention((held[0], out), (held[1], lse))
        found = [each for each in merged if each is not None]
        out = paddle.concat([each for each, _ in found], axis=1).astype(query.dtype)
        lse = paddle.concat([each for _, each in found], axis=2)
        ctx.mask, ctx.scale, ctx.softcap = mask, scale, softcap
        ctx.save_for_backward(query, key, value, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, out, lse = ctx.saved_tensor()
        ring = _Places(query, ctx.mask)
        queries, outs, lses = ring.parts(query), ring.parts(out), ring.parts(lse, axis=2)
        gradients = ring.parts(grad_out)
        of_queries = [paddle.zeros(part.shape, compute_dtype(part)) for part in queries]
        on_way = None
        for source, pair in _round(paddle.stack([key, value])):
            keys, values = ring.parts(pair[0]), ring.parts(pair[1])
            own = paddle.zeros(pair.shape, compute_dtype(pair))
            for i, j, of_query, of_key in ring.visible(source):
                dq, dk, dv = ops.flash_attention_block_gradients(
                    queries[i], keys[j], values[j], outs[i], lses[i], gradients[i],
                    ctx.mask, ctx.scale, ctx.softcap, query_offset=of_query, key_offset=of_key,
                )  # fmt: skip
                of_queries[i] += dq.astype(of_queries[i].dtype)
                first = j * ring.size
                own[:, :, first : first + ring.size] += paddle.stack([dk, dv]).astype(own.dtype)
            if on_way is not None:
                own += on_way.wait()
            on_way = _Handover(own)
        assert on_way is not None  # there is a rank at least
        of_keys, of_values = on_way.wait().astype(key.dtype).unbind(0)
        return paddle.concat(of_queries, axis=1).astype(query.dtype), of_keys, of_values


class _Places:
    """Where the blocks of queries and keys of each rank lie in the sequence.

    Attributes:
        size: tokens of a block.
    """

    def __init__(self, query: Tensor, mask: ops.AttentionMask) -> None:
        self._length = whole_length(query.shape[1])
        self._own = blocks(self._length, mesh.current().context_rank)
        # A prefix is seen by the queries before it too.
        self._hides_later = mask.causal and mask.prefix_lengths is None
        self.size = query.shape[1] // len(self._own)

    def parts(self, tensor: Tensor, axis: int = 1) -> Sequence[Tensor]:
        """The blocks of a tensor with a rank's tokens on ``axis``."""
        return tensor.split(len(self._own), axis)

    def visible(self, source: int) -> Iterator[tuple[int, int, int, int]]:
        """Own blocks of queries and blocks of keys of the rank ``source`` that they may see.

        Yields:
            Index of the block of queries, of that of keys, and the positions of their first tokens.
        """
        keys = blocks(self._length, source)
        for i, (of_query, stop) in enumerate(self._own):
            for j, (of_key, _) in enumerate(keys):
                if not self._hides_later or of_key < stop:
                    yield i, j, of_query, of_key


def _round(tensor: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yields the tensors of all ranks of the context group, this rank's first, and whose each is.

    The next one is in flight while the caller works.
    """
    current = mesh.current()
    for step in range(current.context_degree):
        is_last = step == current.context_degree - 1
        coming = None if is_last else _Handover(tensor)
        yield (current.context_rank - step) % current.context_degree, tensor
        if coming is not None:
            tensor = coming.wait()


class _Handover:
    """A message to the next rank of the ring, and one of the same shape from the one before."""

    def __init__(self, tensor: Tensor) -> None:
        group = mesh.current().context
        assert group is not None
        ranks, own = group.ranks, group.rank
        send: Any = dist.isend  # Paddle's annotation of P2POp wants a task without fail
        receive: Any = dist.irecv
        self._sent = tensor  # kept until the message has left
        self._received = paddle.empty(tensor.shape, tensor.dtype)
        self._tasks = dist.batch_isend_irecv(
            [
                dist.P2POp(send, tensor, ranks[(own + 1) % len(ranks)], group),
                dist.P2POp(receive, self._received, ranks[own - 1], group),
            ]
        )

    def wait(self) -> Tensor:
        """The tensor that has come."""
        for task in self._tasks:
            task.wait()
        return self._received
