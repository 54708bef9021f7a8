"""Where the tensor that a rank updates lies in the whole parameter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import numpy as np
import paddle
from paddle import Tensor

from pypkg.parallel.mesh import Mesh

Range = tuple[int, int]  # start, stop


@dataclass(frozen=True)
class MatrixLayout:
    """The matrices that a parameter holds, and how tensor parallelism divides it.

    Attributes:
        shape: of the whole parameter.
        axis: along which matrices lie side by side, and along which TP shards are cut.
        widths: lengths along ``axis`` of the matrices, such as query, key and value.
        shards: of each tensor rank, the ranges of ``axis`` that its TP shard joins. Empty: every
            rank holds the whole parameter.
        length: of a TP shard along ``axis``; zeros follow the ranges.
    """

    shape: tuple[int, ...]
    axis: int = 0
    widths: tuple[int, ...] = ()
    shards: tuple[tuple[Range, ...], ...] = ()
    length: int = 0

    @property
    def shard_shape(self) -> tuple[int, ...]:
        if not self.shards:
            return self.shape
        return (*self.shape[: self.axis], self.length, *self.shape[self.axis + 1 :])


@dataclass(frozen=True)
class Piece:
    """What a rank updates of a parameter: its TP shard, or a flat slice of that.

    Attributes:
        layout: of the parameter.
        mesh: of this rank.
        bounds: start and stop of this rank's slice of the flattened TP shard; the last slice may
            reach beyond the end. None: the rank updates the whole shard.
    """

    layout: MatrixLayout
    mesh: Mesh
    bounds: Range | None = None

    @property
    def is_divided(self) -> bool:
        """Whether the ranks of the tensor group hold different pieces."""
        return bool(self.layout.shards)

    @property
    def is_sliced(self) -> bool:
        """Whether the ranks of the sharding group hold different pieces."""
        return self.bounds is not None

    def counts(self, over_sharding: bool) -> bool:
        """Whether this rank adds its piece to a sum over the tensor group.

        Args:
            over_sharding: the sum is one over the sharding group as well.
        """
        is_first = self.is_sliced or not over_sharding or self.mesh.sharding_rank == 0
        return is_first and (self.is_divided or self.mesh.tensor_rank == 0)

    @cached_property
    def places(self) -> np.ndarray:
        """Index in the whole parameter of each index of the shard along ``axis``; -1: padding."""
        layout = self.layout
        if not self.is_divided:
            return np.arange(layout.shape[layout.axis])
        found = np.concatenate([np.arange(*r) for r in layout.shards[self.mesh.tensor_rank]])
        return np.pad(found, (0, layout.length - len(found)), constant_values=-1)

    @cached_property
    def owned(self) -> np.ndarray:
        """Which of ``places`` no lower tensor rank holds as well: bool, of the shard's length."""
        lower = [
            np.arange(*each)
            for shard in self.layout.shards[: self.mesh.tensor_rank]
            for each in shard
        ]
        return (self.places >= 0) & ~np.isin(self.places, np.concatenate([[-1], *lower]))

    def along_axis(self, values: np.ndarray) -> Tensor:
        """The value of each element of the piece, float32 that broadcasts to it.

        Args:
            values: one for each index of the shard along ``axis``.
        """
        shape = self.layout.shard_shape
        if self.bounds is None:
            spread = [1] * len(shape)
            spread[self.layout.axis] = shape[self.layout.axis]
            return paddle.to_tensor(values.reshape(spread), dtype="float32")
        inner = prod(shape[self.layout.axis + 1 :])
        index = np.arange(*self.bounds) // inner % shape[self.layout.axis]
        return paddle.to_tensor(values[index], dtype="float32")

    def rows(self) -> Range:
        """The rows of the shard, a matrix, that hold the piece or a part of it."""
        rows, width = self.layout.shard_shape
        if self.bounds is None:
            return 0, rows
        start, stop = (min(each, rows * width) for each in self.bounds)
        return start // width, -(-stop // width)

    def to_block(self, piece: Tensor) -> Tensor:
        """``rows`` of the shard, float32, with zeros where they are not of the piece."""
        piece = piece.astype("float32")
        if self.bounds is None:
            return piece
        first, last, width = *self.rows(), self.layout.shard_shape[1]
        before = self.bounds[0] - first * width if last > first else 0
        held = piece[: max(0, prod(self.layout.shard_shape) - self.bounds[0])]
        after = (last - first) * width - before - held.shape[0]
        return paddle.concat([paddle.zeros([before]), held, paddle.zeros([after])]).reshape(
            [last - first, width]
        )

    def from_block(self, block: Tensor) -> Tensor:
        """The inverse of ``to_block``, with zeros beyond the end of the shard."""
        if self.bounds is None:
            return block
        first, last, width = *self.rows(), self.layout.shard_shape[1]
        start, stop = self.bounds
        at = start - first * width if last > first else 0
        held = block.reshape([-1])[at : at + stop - start]
        return paddle.concat([held, paddle.zeros([stop - start - held.shape[0]])])


def joined(piece: Piece, parts: Sequence[Tensor]) -> Tensor:
    """The whole parameter of which ``piece`` is one.

    Args:
        parts: of all ranks that hold one, by tensor rank and sharding rank.
    """
    layout = piece.layout
    count = max(1, len(layout.shards))
    each, size = len(parts) // count, prod(layout.shard_shape)
    shards = []
    for first in range(0, len(parts), each):
        own = parts[first : first + each]
        flat = paddle.concat(list(own))[:size] if piece.is_sliced else own[0]
        shards.append(flat.reshape(layout.shard_shape))
    if not layout.shards:
        return shards[0]
    held: dict[int, Tensor] = {}  # by start; ranks may hold copies
    for shard, ranges in zip(shards, layout.shards, strict=True):
        at = 0
        for start, stop in ranges:
            if stop > start:
                held[start] = paddle.slice(shard, [layout.axis], [at], [at + stop - start])
            at += stop - start
    return paddle.concat([held[start] for start in sorted(held)], layout.axis)


def divided(piece: Piece, whole: Tensor, count: int) -> list[Tensor]:
    """The inverse of ``joined``: ``count`` pieces by tensor rank and sharding rank."""
    layout = piece.layout
    shards = []
    for ranges in layout.shards:
        held = [paddle.slice(whole, [layout.axis], [a], [b]) for a, b in ranges]
        missing = layout.length - sum(b - a for a, b in ranges)
        if missing:
            shape = list(layout.shape)
            shape[layout.axis] = missing
            held.append(paddle.zeros(shape, whole.dtype))
        shards.append(paddle.concat(held, layout.axis))
    shards = shards or [whole]
    if piece.bounds is None:
        return shards
    slices, length = count // len(shards), piece.bounds[1] - piece.bounds[0]
    parts = []
    for shard in shards:
        padding = paddle.zeros([slices * length - shard.size], shard.dtype)
        parts += paddle.concat([shard.reshape([-1]), padding]).split(slices)
    return parts
