"""What attention allocates where ranks divide the tokens: the counterpart of parallel/context."""

from __future__ import annotations

from collections.abc import Sequence

from pypkg.parallel.mesh import Degrees
from pypkg.planner.operators import ACTIVATIONS, COMMUNICATION, GRADIENTS, Operators
from pypkg.planner.tape import Gradients, Tensor


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

    def ring_attention(self, q: Tensor, k: Tensor, v: Tensor, rows: int) -> Tensor:
        """``ring_attention`` of parallel/context/ring.py.

        Args:
            rows: query heads of this rank's tokens.
        """
        ops = self._ops
        elements = q.num_bytes // ops.dtype_bytes
        pair_bytes = k.num_bytes + v.num_bytes
        pair, coming = ops.tape.empty(pair_bytes, ACTIVATIONS), self._coming(pair_bytes)
        merged, lse = ops.floats(elements), ops.floats(rows)
        # Half of the queries: what a block gives, in float32, its share and both together.
        block = [ops.new(elements // 2), *(ops.floats(elements // 2) for _ in range(3))]
        del block, pair, coming
        out = ops.new(elements)
        del merged
        kept = [each.detach() for each in (q, k, v, out)]

        def backward(incoming: list[Tensor | None]) -> Gradients:
            assert lse
            return self._ring_gradients(*kept[:3])

        ops.tape.record([q, k, v], [out], backward)
        return out

    def _ring_gradients(self, q: Tensor, k: Tensor, v: Tensor) -> Gradients:
        """Sums in float32; those of keys and values are of three blocks: own, left and coming."""
        ops = self._ops
        elements, pair_bytes = q.num_bytes // ops.dtype_bytes, k.num_bytes + v.num_bytes
        pair_elements = pair_bytes // ops.dtype_bytes
        of_queries = ops.floats(elements, GRADIENTS)
        pair, coming = ops.tape.empty(pair_bytes, ACTIVATIONS), self._coming(pair_bytes)
        own, left = (ops.floats(pair_elements, GRADIENTS) for _ in range(2))
        home = ops.floats(pair_elements, COMMUNICATION)
        block = [ops.new(elements // 2, GRADIENTS), ops.new(pair_elements // 2, GRADIENTS)]
        del block, pair, coming, own, left
        narrow = ops.new(pair_elements, GRADIENTS)
        del home
        of_q = ops.like(q)
        del of_queries
        return [of_q, Tensor(k.num_bytes, narrow.memory), Tensor(v.num_bytes, narrow.memory)]

    def _coming(self, size: int) -> Tensor:
        """The next keys and values, in flight."""
        return self._ops.tape.empty(size, COMMUNICATION)

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
            del copy
            return out

        out = sent(ACTIVATIONS)
        self._ops.tape.record([x], [out], lambda incoming: [sent(GRADIENTS)])
        return out
