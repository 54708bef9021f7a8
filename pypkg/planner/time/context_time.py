"""Seconds that a layer sends and copies where a context group divides the tokens.

The counterpart of parallel/context; docs/parallelism.md has the volumes ("Context axis").
"""

from __future__ import annotations

from dataclasses import dataclass

_FLOAT = 4


@dataclass(frozen=True)
class ContextTime:
    """Messages and copies of attention in one layer on one rank.

    Attributes:
        degree: ranks that divide the tokens.
        is_ring: whether keys and values go round them; else they exchange heads for tokens.
        rate: bytes per second that a rank sends to the group.
        queries, pair: elements of this rank's tokens: of queries, and of keys and values together;
            where heads are exchanged, with heads of keys that are repeated for all ranks.
        element_bytes: of an activation.
    """

    degree: int
    is_ring: bool
    rate: float
    queries: float
    pair: float
    element_bytes: int

    def sent(self, backward: bool, core: float) -> float:
        """Seconds for which a rank waits for messages.

        A message of the ring is hidden by the attention to the block at hand; gradients of keys and
        values follow as float32 sums, and come home by one message more, which nothing hides.

        Args:
            core: seconds of the attention itself, all blocks.
        """
        others, width = self.degree - 1, self.element_bytes
        if not self.is_ring:
            size = (2 * self.queries + self.pair) * width
            return size * others / self.degree / self.rate
        message = self.pair * width / self.rate
        gradients = self.pair * _FLOAT / self.rate if backward else 0.0
        return others * max(0.0, message + gradients - core / self.degree) + gradients

    def moved(self, backward: bool) -> float:
        """Bytes that are read and written beside the attention itself."""
        width, packed = self.element_bytes, self.queries + self.pair
        if not self.is_ring:
            # qkv parted, joined, copied for sending and put in order; the output two times less.
            return 2 * width * (4 * packed + 2 * self.queries)
        merged = self.degree * self.queries * (2 * _FLOAT + width)  # each block adds to the sum
        if backward:  # sums made, added to by each block, and by those that have come
            return merged + self.degree * self.pair * (_FLOAT + 2 * _FLOAT + width + 3 * _FLOAT)
        return merged
