"""Ring attention (Liu et al., 2023, "Ring Attention with Blockwise Transformers").

Each rank of the context group keeps its queries. Keys and values are passed from rank to rank, and
the next ones are in flight while a rank computes the attention to the present ones. The partial
results are merged by their log-sum-exp. In the backward pass the gradients of keys and values are
passed on with them, as float32 sums. One more message returns them to the rank of their keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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

    Every rank of the group must call this. Besides the output it needs memory for keys and values
    of two ranks, and in the backward pass also for gradients of those of three ranks. This does not
    grow with the number of ranks.

    Args:
        query: [batch, tokens, heads_q, head_dim], of this rank's tokens in the order of ``blocks``.
        key, value: [batch, tokens, heads_k, head_dim], of the same tokens.
        mask: of positions in the whole sequence; ``document_starts`` is that of the whole sequence.
        scale, softcap: as in ``ops.flash_attention``.

    Returns:
        [batch, tokens, heads_q, head_dim] in the dtype of ``query``.
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
        ring = _RingBlocks(query, mask)
        queries = ring.parts(query)
        merged: list[tuple[Tensor, Tensor] | None] = [None] * len(queries)

        def attend(source: int, pairs: Tensor) -> None:
            for i, j, of_query, of_key in ring.visible(source):
                merged[i] = _merged(
                    merged[i],
                    ops.flash_attention_with_lse(
                        queries[i], pairs[2 * j], pairs[2 * j + 1], mask, scale, softcap,
                        query_offset=of_query, key_offset=of_key,
                    ),
                )  # fmt: skip

        _visit_all(ring.pairs(key, value), attend)
        found = [each for each in merged if each is not None]
        out = paddle.concat([each.astype(query.dtype) for each, _ in found], axis=1)
        lse = paddle.concat([each for _, each in found], axis=2)
        ctx.mask, ctx.scale, ctx.softcap = mask, scale, softcap
        ctx.save_for_backward(query, key, value, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, out, lse = ctx.saved_tensor()
        ring = _RingBlocks(query, ctx.mask)
        queries, outs, lses = ring.parts(query), ring.parts(out), ring.parts(lse, axis=2)
        gradients = ring.parts(grad_out)
        of_queries = [paddle.zeros(part.shape, compute_dtype(part)) for part in queries]
        in_flight: _Handover | None = None

        def attend(source: int, pairs: Tensor) -> None:
            nonlocal in_flight
            own = paddle.zeros(pairs.shape, compute_dtype(pairs))
            for i, j, of_query, of_key in ring.visible(source):
                _add(
                    ops.flash_attention_block_gradients(
                        queries[i], pairs[2 * j], pairs[2 * j + 1], outs[i], lses[i], gradients[i],
                        ctx.mask, ctx.scale, ctx.softcap, query_offset=of_query, key_offset=of_key,
                    ),
                    (of_queries[i], own[2 * j], own[2 * j + 1]),
                )  # fmt: skip
            if in_flight is not None:
                own.add_(in_flight.wait())
            in_flight = _Handover(own)

        _visit_all(ring.pairs(key, value), attend)
        assert in_flight is not None  # the group has at least one rank
        of_pairs = in_flight.wait().astype(key.dtype)
        return (
            paddle.concat([each.astype(query.dtype) for each in of_queries], axis=1),
            paddle.concat(of_pairs[0::2].unbind(0), axis=1),
            paddle.concat(of_pairs[1::2].unbind(0), axis=1),
        )


def _merged(
    held: tuple[Tensor, Tensor] | None, block: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp over the keys of both. The output is float32, so that a 16-bit result
    is rounded only once."""
    out, lse = block
    if held is None:
        return out.astype(compute_dtype(out)), lse
    return ops.merge_attention((held[0], out), (held[1], lse))


def _add(gradients: Sequence[Tensor], sums: Sequence[Tensor]) -> None:
    """Adds to ``sums`` in place."""
    for gradient, total in zip(gradients, sums, strict=True):
        total.add_(gradient.astype(total.dtype))


class _RingBlocks:
    """Positions of the blocks of queries and keys of each rank in the sequence.

    Attributes:
        size: tokens of a block.
    """

    def __init__(self, query: Tensor, mask: ops.AttentionMask) -> None:
        self._length = whole_length(query.shape[1])
        self._own = blocks(self._length, mesh.current().context_rank)
        # All queries see all keys of a prefix, also later ones.
        self._hides_later = mask.causal and mask.prefix_lengths is None
        self.size = query.shape[1] // len(self._own)

    def parts(self, tensor: Tensor, axis: int = 1) -> list[Tensor]:
        """The blocks of a tensor that has a rank's tokens on ``axis``, as views."""
        starts = range(0, tensor.shape[axis], self.size)
        found = [tensor.slice([axis], [start], [start + self.size]) for start in starts]
        if tensor.shape[:axis] != [1]:
            return found
        # Paddle marks a slice of a single row as not contiguous, and operators would copy it.
        return [part.flatten(0, 1).unsqueeze(0) for part in found]

    def pairs(self, key: Tensor, value: Tensor) -> Tensor:
        """[2 * blocks, batch, size, heads, head_dim]: keys of a block, its values, the next keys.

        The keys of each block are contiguous, as the operators require.
        """
        blocks_of_both = zip(self.parts(key), self.parts(value), strict=True)
        return paddle.stack([part for pair in blocks_of_both for part in pair])

    def visible(self, source: int) -> Iterator[tuple[int, int, int, int]]:
        """The pairs of this rank's query blocks and key blocks of the rank ``source`` to compute.

        A pair is left out if the causal mask hides all its keys.

        Yields:
            Index of the query block, index of the key block, and the positions of their first
            tokens in the sequence.
        """
        keys = blocks(self._length, source)
        for i, (of_query, stop) in enumerate(self._own):
            for j, (of_key, _) in enumerate(keys):
                if not self._hides_later or of_key < stop:
                    yield i, j, of_query, of_key


def _visit_all(tensor: Tensor, visit: Callable[[int, Tensor], None]) -> None:
    """Calls ``visit`` with the tensor of each rank of the context group, this rank's first.

    The next tensor is in flight during a call. A tensor is released after its call.

    Args:
        visit: takes an index in the group and the tensor of that rank.
    """
    current = mesh.current()
    for step in range(current.context_degree):
        is_last = step == current.context_degree - 1
        in_flight = None if is_last else _Handover(tensor)
        visit((current.context_rank - step) % current.context_degree, tensor)
        if in_flight is not None:
            tensor = in_flight.wait()


class _Handover:
    """Sends a tensor to the next rank of the ring and receives one from the previous rank.

    Both tensors have the same shape and dtype.
    """

    def __init__(self, tensor: Tensor) -> None:
        group = mesh.current().context
        assert group is not None
        ranks, own = group.ranks, group.rank
        send: Any = dist.isend  # may return None, which Paddle's annotation of P2POp excludes
        receive: Any = dist.irecv
        received = paddle.empty(tensor.shape, tensor.dtype)
        self._tasks = dist.batch_isend_irecv(
            [
                dist.P2POp(send, tensor, ranks[(own + 1) % len(ranks)], group),
                dist.P2POp(receive, received, ranks[own - 1], group),
            ]
        )
        # The sent tensor is kept alive until the message has left.
        self._sent_and_received: tuple[Tensor, ...] = tensor, received

    def wait(self) -> Tensor:
        """Waits for both messages, releases both tensors and returns the received one."""
        for task in self._tasks:
            task.wait()
        _, received = self._sent_and_received
        self._sent_and_received, self._tasks = (), []
        return received
