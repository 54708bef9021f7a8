"""Position of the tensor that a rank updates in the whole parameter."""

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
    """The matrices packed in a parameter, and how tensor parallelism divides it.

    Attributes:
        shape: of the whole parameter.
        axis: the axis along which matrices are packed and TP shards are cut.
        widths: lengths of the packed matrices along ``axis``, such as those of query, key and
            value.
        shards: for each tensor rank, the ranges of ``axis`` of which its TP shard consists. Empty:
            every rank holds the whole parameter.
        length: of a TP shard along ``axis``; it is padded with zeros after the ranges.
    """

    shape: tuple[int, ...]
    axis: int = 0
    widths: tuple[int, ...] = ()
    shards: tuple[tuple[Range, ...], ...] = ()
    length: int = 0

    @property
    def shard_shape(self) -> tuple[int, ...]:
        """Shape of a TP shard; ``shape`` if every rank holds the whole parameter."""
        if not self.shards:
            return self.shape
        return (*self.shape[: self.axis], self.length, *self.shape[self.axis + 1 :])


@dataclass(frozen=True)
class Piece:
    """The part of a parameter that a rank updates: its TP shard, or a flat slice of its shard.

    Attributes:
        layout: of the parameter.
        mesh: of this rank.
        bounds: (start, stop) of this rank's slice of the flattened TP shard; the last slice may
            extend beyond the end. None: the rank updates the whole shard.
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
            over_sharding: whether the sum goes over the sharding group too.
        """
        is_first = self.is_sliced or not over_sharding or self.mesh.sharding_rank == 0
        return is_first and (self.is_divided or self.mesh.tensor_rank == 0)

    @cached_property
    def places(self) -> np.ndarray:
        """Maps indices of the shard along ``axis`` to those of the whole parameter; -1: padding."""
        layout = self.layout
        if not self.is_divided:
            return np.arange(layout.shape[layout.axis])
        found = np.concatenate([np.arange(*r) for r in layout.shards[self.mesh.tensor_rank]])
        return np.pad(found, (0, layout.length - len(found)), constant_values=-1)

    @cached_property
    def owned(self) -> np.ndarray:
        """Bool, of the shard's length along ``axis``: whether no lower tensor rank holds a copy."""
        lower = [
            np.arange(*each)
            for shard in self.layout.shards[: self.mesh.tensor_rank]
            for each in shard
        ]
        return (self.places >= 0) & ~np.isin(self.places, np.concatenate([[-1], *lower]))

    def along_axis(self, values: np.ndarray) -> Tensor:
        """A float32 tensor that broadcasts ``values`` to the elements of the piece.

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
        """(first, last + 1) of the rows of the shard that the piece covers, if only in part.

        The shard must be a matrix.
        """
        rows, width = self.layout.shard_shape
        if self.bounds is None:
            return 0, rows
        start, stop = (min(each, rows * width) for each in self.bounds)
        return start // width, -(-stop // width)

    def to_block(self, piece: Tensor) -> Tensor:
        """The rows of the shard that the piece covers, float32 [rows, width].

        Elements outside the piece are zero.
        """
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
    """Joins the pieces of all ranks to the whole parameter.

    Args:
        piece: the piece of any of the ranks.
        parts: the pieces by tensor rank, then sharding rank.
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
    held: dict[int, Tensor] = {}  # by start of the range; ranks may hold copies of one range
    for shard, ranges in zip(shards, layout.shards, strict=True):
        at = 0
        for start, stop in ranges:
            if stop > start:
                held[start] = paddle.slice(shard, [layout.axis], [at], [at + stop - start])
            at += stop - start
    return paddle.concat([held[start] for start in sorted(held)], layout.axis)


def divided(piece: Piece, whole: Tensor, count: int) -> list[Tensor]:
    """The inverse of ``joined``: ``count`` pieces by tensor rank, then sharding rank."""
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
