"""Which tokens of a sample each rank of the context group has.

Where the ranks exchange heads (Ulysses), rank r of n has the r-th of n equal runs. In a ring a
sample is cut into 2 n blocks, and rank r has the blocks r and 2 n - 1 - r. Under a causal mask a
block attends to the blocks before it, so each rank then has the same work (zigzag).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import paddle
from paddle import Tensor

from pypkg.errors import UserError
from pypkg.parallel import mesh

# What a batch holds for each token, and a rank needs of its own tokens alone. Positions and starts
# of documents stay whole, because attention sees all tokens.
_OF_TOKENS = ("input_ids", "labels")


def context_degree() -> int:
    """Number of ranks that divide the tokens of a sample."""
    return mesh.current().context_degree


def is_ring() -> bool:
    """Whether keys and values go round the ranks that divide the tokens."""
    current = mesh.current()
    return current.degrees.ring and current.context_degree > 1


def exchanges_heads() -> bool:
    """Whether the ranks that divide the tokens exchange heads for tokens around attention."""
    return context_degree() > 1 and not is_ring()


def whole_length(tokens: int) -> int:
    """Number of tokens of a sample of which this rank has ``tokens``."""
    return tokens * context_degree()


def blocks(length: int, rank: int) -> list[tuple[int, int]]:
    """First token, and the one after the last, of each run of tokens that a rank has.

    Args:
        length: of the sample.
        rank: in the context group.

    Raises:
        UserError: the ranks cannot have equally many.
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
    """As ``own_tokens``, of the last axis of an array."""
    if context_degree() == 1:
        return values
    own = blocks(values.shape[-1], mesh.current().context_rank)
    return np.concatenate([values[..., slice(*run)] for run in own], axis=-1)


def own_batch(batch: Mapping[str, Any]) -> dict[str, Any]:
    """``batch`` with the inputs and labels of this rank's tokens; what else it holds stays whole.

    Args:
        batch: arguments of the model's loss by name, as arrays.
    """
    return {name: own_part(value) if name in _OF_TOKENS else value for name, value in batch.items()}
