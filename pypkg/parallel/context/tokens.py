"""Which tokens of a sample each rank of the context group has.

If the ranks exchange heads (Ulysses), a sample is cut into n equal blocks, and rank r of n has
block r. In ring attention it is cut into 2 n blocks, and rank r has the blocks r and 2 n - 1 - r
(zigzag). Under a causal mask a block attends to itself and the blocks before it, so this gives all
ranks the same work.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import paddle
from paddle import Tensor

from pypkg.errors import UserError
from pypkg.parallel import mesh

# Entries of a batch that are divided over the context group. Positions and starts of documents stay
# whole, because attention sees all tokens.
_OF_TOKENS = ("input_ids", "labels")


def context_degree() -> int:
    """Number of ranks that divide the tokens of a sample."""
    return mesh.current().context_degree


def is_ring() -> bool:
    """Whether the context group runs ring attention."""
    current = mesh.current()
    return current.degrees.ring and current.context_degree > 1


def exchanges_heads() -> bool:
    """Whether the context group exchanges heads for tokens around attention (Ulysses)."""
    return context_degree() > 1 and not is_ring()


def whole_length(tokens: int) -> int:
    """Number of tokens of a whole sample, given the number that this rank has of it."""
    return tokens * context_degree()


def blocks(length: int, rank: int) -> list[tuple[int, int]]:
    """(start, stop) of each block of consecutive tokens that a rank has of a sample.

    Args:
        length: tokens of the sample.
        rank: index in the context group.

    Raises:
        UserError: ``length`` is not a multiple of the number of blocks.
    """
    degree = context_degree()
    count = 2 * degree if is_ring() else degree
    if length % count:
        raise UserError(
            f"a sequence of {length} tokens cannot be cut into {count} equal blocks for "
            f"{degree} ranks of the context axis; change max_seq_length"
        )
    size = length // count
    own = (rank, count - 1 - rank) if is_ring() else (rank,)
    return [(block * size, (block + 1) * size) for block in own]


def own_tokens(values: Tensor, axis: int = -1) -> Tensor:
    """The part of ``values`` that belongs to this rank's tokens.

    Args:
        values: its axis ``axis`` has an element for each token of a sample.
    """
    if context_degree() == 1:
        return values
    own = blocks(values.shape[axis], mesh.current().context_rank)
    index = paddle.concat([paddle.arange(*run, dtype="int64") for run in own])
    return paddle.index_select(values, index, axis)


def own_part(values: np.ndarray) -> np.ndarray:
    """``own_tokens`` of the last axis of an array."""
    if context_degree() == 1:
        return values
    own = blocks(values.shape[-1], mesh.current().context_rank)
    return np.concatenate([values[..., slice(*run)] for run in own], axis=-1)


def own_batch(batch: Mapping[str, Any]) -> dict[str, Any]:
    """``batch`` with this rank's part of ``input_ids`` and ``labels``; other entries stay whole.

    Args:
        batch: arguments of the model's ``loss`` by name; arrays with tokens on the last axis.
    """
    return {name: own_part(value) if name in _OF_TOKENS else value for name, value in batch.items()}
