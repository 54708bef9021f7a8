"""Joins the parts that ranks hold to a whole tensor.

Nothing here imports Paddle.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from pypkg.models.weights.formats.stored_tensor import Shape
from pypkg.models.weights.tp_shards import TPShard


@dataclass(frozen=True)
class Assembly:
    """The parts of a tensor: TP shards, flat slices of each shard, or flat slices of the whole.

    Attributes:
        shape: shape of the whole tensor.
        shards: the TP shard of each tensor rank; empty if the tensor has no TP shards.
        shard_shape: shape of a TP shard; not used if there are none.
        slices: number of consecutive flat slices of a shard; the last one may end with padding.
    """

    shape: Shape
    shards: tuple[TPShard, ...] = ()
    shard_shape: Shape = ()
    slices: int = 1

    def whole(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        """The tensor, joined from its parts. A single part is not copied.

        Args:
            parts: the slices of the first TP shard, then those of the next; of any shape.
        """
        if not self.shards:
            return _joined(parts, self.shape)
        whole = np.empty(self.shape, parts[0].dtype)
        for number, shard in enumerate(self.shards):
            slices = parts[number * self.slices : (number + 1) * self.slices]
            shard.put(_joined(slices, self.shard_shape), whole)
        return whole


@dataclass(frozen=True)
class Division:
    """The division of a tensor that no rank holds as a whole.

    Attributes:
        holders: takes the rank that writes the tensor; returns the ranks that hold the parts, in
            the order of ``Assembly.whole``.
        part_bytes: size of each part in bytes.
        assembly: joins the parts.
    """

    holders: Callable[[int], tuple[int, ...]]
    part_bytes: int
    assembly: Assembly


def _joined(slices: Sequence[np.ndarray], shape: Shape) -> np.ndarray:
    flat = [each.reshape(-1) for each in slices]
    joined = flat[0] if len(flat) == 1 else np.concatenate(flat)
    return joined[: math.prod(shape)].reshape(shape)
