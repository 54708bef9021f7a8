"""A micro batch, and the workspace of attention to it."""

from __future__ import annotations

from dataclasses import dataclass

from pypkg.planner.operators import Operators
from pypkg.planner.tape import Tensor


@dataclass(frozen=True)
class Batch:
    """A micro batch.

    Attributes:
        rows, sequence: its shape in tokens.
        context: ranks that divide the tokens of each row.
        has_dropout: whether hidden states are dropped out.
        positions: what rotations keep of its positions.
    """

    rows: int
    sequence: int
    context: int = 1
    has_dropout: bool = False
    positions: Tensor | None = None

    @property
    def tokens(self) -> int:
        """Of this rank."""
        return self.rows * self.sequence // self.context


def attention_workspace(
    heads: int, key_value_heads: int, head_dim: int, batch: Batch, ops: Operators
) -> int:
    """Floats that the backward pass of attention takes (csrc/kernels/attention).

    Args:
        batch: whose rows and sequence are attended.
    """
    if ops.is_gpu:  # a number for each row, and the gradient of queries in float32
        sums, is_wide = 0, ops.dtype_bytes > 2
        if 32 < head_dim <= 128 and not is_wide:
            padded = 64 if head_dim <= 64 else -(-head_dim // 32) * 32
            tiles = batch.rows * heads * -(-batch.sequence // 64)
            sums = tiles * (64 * padded + 1) + 1
        return batch.rows * batch.sequence * heads + sums
    queries, keys, width = 96, 96, 32
    blocks = -(-batch.sequence // queries)
    chunks = max(1, min(-(-16 // (batch.rows * key_value_heads)), 4, -(-batch.sequence // keys)))
    padded = -(-head_dim // width) * width
    return chunks * batch.rows * heads * blocks * queries * padded
