"""What attention allocates where ranks divide the tokens: the counterpart of parallel/context."""

from __future__ import annotations

from collections.abc import Sequence

from pypkg.parallel.mesh import Degrees
from pypkg.planner.operators import ACTIVATIONS, COMMUNICATION, GRADIENTS, WORKSPACE, Operators
from pypkg.planner.tape import Gradients, Tensor

_FLOAT = 4


class ContextParallel:
    """Attention of a rank of a context group.

    Args:
        degrees: of the layout.

    Attributes:
        degree: ranks that divide the tokens of a sample.
        is_ring: whether keys and values go round them.
        exchanges_heads: whether they exchange heads for tokens (Ulysses).
    """

    def __init__(self, ops: Operators, degrees: Degrees) -> None:
        self._ops, self.degree = ops, degrees.context
        self.is_ring = degrees.ring and self.degree > 1
        self.exchanges_heads = self.degree > 1 and not self.is_ring

    def attended_heads(self, heads: int, key_value_heads: int) -> tuple[int, int]:
        """Query and key-value heads that a rank has in attention, of those outside of it."""
        degree = self.degree if self.exchanges_heads else 1
        return heads // degree, max(key_value_heads // degree, 1)

    def tokens_for_heads(self, qkv: Tensor, given: Sequence[int], sent: Sequence[int]) -> Tensor:
        """``tokens_for_heads`` of parallel/context/heads.py.

        Args:
            given: elements of query, key and value.
            sent: the same where heads of keys and values are repeated for all ranks.
        """
        ops = self._ops
        parts = [ops.contiguous(part) for part in ops.split(qkv, given)]
        for place, (elements, repeated) in enumerate(zip(given, sent, strict=True)):
            if repeated > elements:
                parts[place] = self._repeated(parts[place], repeated)
        packed = self._joined(parts)
        by_source = self._exchange(packed)
        return ops.contiguous(by_source)  # tokens before ranks again

    def heads_for_tokens(self, out: Tensor) -> Tensor:
        """``heads_for_tokens`` of parallel/context/heads.py."""
        return self._ops.contiguous(self._exchange(out))

    def ring_attention(
        self, q: Tensor, k: Tensor, v: Tensor, rows: int, workspace: int, is_strided: bool
    ) -> Tensor:
        """``ring_attention`` of parallel/context/ring.py.

        Args:
            rows: query heads of this rank's tokens.
            workspace: floats that the backward pass of one block takes.
            is_strided: whether blocks of queries do not lie together, so that operators copy them.
        """
        ops = self._ops
        elements = q.num_bytes // ops.dtype_bytes
        pairs = self._pairs(k, v, is_strided)
        coming = ops.tape.empty(pairs.num_bytes, COMMUNICATION)
        merged, lse = ops.floats(elements), ops.floats(rows)
        # Of half the queries: what a block gives, and what its merging holds.
        block = [ops.new(elements // 2), ops.floats(rows // 2)]
        held = [ops.floats(3 * elements // 2), ops.floats(3 * rows // 2)]
        del block, held, coming, pairs
        narrow = ops.new(elements) if ops.dtype_bytes < _FLOAT else None
        out, lse = ops.new(elements), ops.floats(rows)
        del merged, narrow
        kept = [each.detach() for each in (q, k, v, out)]

        def backward(incoming: list[Tensor | None]) -> Gradients:
            assert lse and kept
            q, k, v, _ = kept
            return self._ring_gradients(q, k, v, rows, workspace, is_strided)

        ops.tape.record([q, k, v], [out], backward)
        return out

    def _ring_gradients(
        self, q: Tensor, k: Tensor, v: Tensor, rows: int, workspace: int, is_strided: bool
    ) -> Gradients:
        """Sums of keys and values, in float32, are of three blocks: own, leaving and coming."""
        ops, item = self._ops, self._ops.dtype_bytes
        elements, pair_elements = q.num_bytes // item, (k.num_bytes + v.num_bytes) // item
        of_queries = ops.floats(elements, GRADIENTS)
        pairs = self._pairs(k, v, is_strided)
        own = ops.floats(pair_elements, GRADIENTS)
        # Of two ranks, the last pair is there before the first sums leave.
        coming = ops.tape.empty((self.degree > 2) * pairs.num_bytes, COMMUNICATION)
        on_way = [ops.floats(pair_elements, COMMUNICATION) for _ in range(2)]
        self._block_gradients(elements // 2, pair_elements // 2, rows // 2, workspace, is_strided)
        del pairs, coming, own
        home = on_way.pop()
        on_way.clear()
        of_pairs = home if item == _FLOAT else ops.new(pair_elements, GRADIENTS)
        del home
        narrow = ops.new(elements, GRADIENTS) if item < _FLOAT else None
        gradients = [ops.like(q)]
        del narrow
        gradients += [ops.like(each) for each in (k, v)]
        del of_pairs, of_queries
        return gradients

    def _block_gradients(
        self, elements: int, pair_elements: int, rows: int, workspace: int, is_strided: bool
    ) -> None:
        """Those of a block of queries, of ``elements``, and of a block of keys and values."""
        ops = self._ops
        copies = [ops.floats(rows), ops.new(3 * elements * is_strided)]  # of log-sum-exp always
        gradients = [ops.new(elements, GRADIENTS), ops.new(pair_elements, GRADIENTS)]
        ops.floats(workspace, WORKSPACE)
        copies.clear()
        if ops.dtype_bytes < _FLOAT:
            ops.floats(max(elements, pair_elements // 2), GRADIENTS)
        del gradients

    def _pairs(self, k: Tensor, v: Tensor, is_strided: bool) -> Tensor:
        """Keys and values by block, which are stacked; strided ones are copied before."""
        copies = self._ops.tape.empty(is_strided * (k.num_bytes + v.num_bytes), ACTIVATIONS)
        pairs = self._ops.tape.empty(k.num_bytes + v.num_bytes, ACTIVATIONS)
        del copies
        return pairs

    def _repeated(self, x: Tensor, elements: int) -> Tensor:
        out, size = self._ops.new(elements), x.num_bytes

        def backward(incoming: list[Tensor | None]) -> Gradients:
            return [self._ops.tape.empty(size, GRADIENTS)]

        self._ops.tape.record([x], [out], backward)
        return out

    def _joined(self, parts: Sequence[Tensor]) -> Tensor:
        ops, sizes = self._ops, [part.num_bytes for part in parts]
        out = ops.tape.empty(sum(sizes), ACTIVATIONS)

        def backward(incoming: list[Tensor | None]) -> Gradients:
            return [ops.tape.empty(size, GRADIENTS) for size in sizes]

        ops.tape.record(list(parts), [out], backward)
        return out

    def _exchange(self, x: Tensor) -> Tensor:
        """All-to-all of a contiguous copy, in both directions."""
        size = x.num_bytes

        def sent(term: str) -> Tensor:
            copy = self._ops.tape.empty(size, COMMUNICATION)
            out = self._ops.tape.empty(size, term)
            if not self._ops.is_gpu:  # all_to_all_single of parallel/gloo gathers from all ranks
                self._ops.tape.empty((self.degree + 1) * size, COMMUNICATION)
            del copy
            return out

        out = sent(ACTIVATIONS)
        self._ops.tape.record([x], [out], lambda incoming: [sent(GRADIENTS)])
        return out
