"""Joins the parts that ranks hold to a whole tensor, block by block.

Nothing here imports Paddle.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from pypkg.models.weights.formats.stored_tensor import Shape
from pypkg.models.weights.tp_shards import Range, TPShard

_TILE = 128  # rows and columns of a matrix that are transposed at once, to fit the caches


@dataclass(frozen=True)
class _Piece:
    """A rectangle of a matrix.

    Attributes:
        ranges: (start, stop) of its rows and of its columns in the matrix.
        values: [rows, columns].
    """

    ranges: tuple[Range, Range]
    values: np.ndarray

    def turned(self) -> _Piece:
        """The piece of the transposed matrix."""
        return _Piece(self.ranges[::-1], self.values.T)

    def cut(self, axis: int, bounds: Range) -> _Piece | None:
        """The piece within ``bounds`` of an axis, relative to their start; None if it is empty."""
        (start, stop), other = self.ranges[axis], self.ranges[1 - axis]
        first, last = max(start, bounds[0]), min(stop, bounds[1])
        if first >= last:
            return None
        cut = slice(first - start, last - start)
        values = self.values[cut] if axis == 0 else self.values[:, cut]
        moved = (first - bounds[0], last - bounds[0])
        return _Piece((moved, other) if axis == 0 else (other, moved), values)

    def moved(self, axis: int, by: int) -> _Piece:
        """The piece ``by`` entries further along an axis."""
        start, stop = self.ranges[axis]
        place, other = (start + by, stop + by), self.ranges[1 - axis]
        return replace(self, ranges=(place, other) if axis == 0 else (other, place))


class JoinedTensor:
    """A tensor in pieces that lie in the memory of several ranks; it is copied on request only.

    It has the transpose and the indices along the first axis that an array has.

    Attributes:
        shape: of the tensor.
        dtype: of its elements.
    """

    def __init__(self, shape: Shape, dtype: np.dtype, pieces: Sequence[_Piece]) -> None:
        self.shape, self.dtype, self._pieces = tuple(shape), dtype, list(pieces)

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def T(self) -> JoinedTensor:
        """The transpose of a vector or matrix."""
        if self.ndim < 2:
            return self
        assert self.ndim == 2  # no other tensor is stored transposed
        return JoinedTensor(self.shape[::-1], self.dtype, [each.turned() for each in self._pieces])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | np.ndarray) -> JoinedTensor:
        """Some rows: a slice with step 1, or an array of indices."""
        if isinstance(rows, slice):
            runs = [rows.indices(len(self))[:2]]
        else:  # one range for each run of consecutive indices
            breaks = (0, *(np.flatnonzero(np.diff(rows) != 1) + 1), len(rows))
            runs = [(int(rows[a]), int(rows[b - 1]) + 1) for a, b in pairwise(breaks) if a < b]
        pieces, count = [], 0
        for start, stop in runs:
            cuts = [each.cut(0, (start, stop)) for each in self._pieces]
            pieces += [each.moved(0, count) for each in cuts if each is not None]
            count += max(0, stop - start)
        return JoinedTensor((count, *self.shape[1:]), self.dtype, pieces)

    def in_order(self) -> np.ndarray | None:
        """The tensor as an array that is no copy; None if it has no such array in C order."""
        for each in self._pieces:
            if each.values.size == math.prod(self.shape) and each.values.flags.c_contiguous:
                return each.values.reshape(self.shape)
        return None

    def copy_to(self, to: np.ndarray) -> None:
        """Copies the tensor to ``to``, an array in C order of the same shape."""
        matrix = to.reshape(-1, _columns(self.shape))
        for each in self._pieces:
            rows, columns = each.ranges
            _copy_in_tiles(matrix[slice(*rows), slice(*columns)], each.values)


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

    def join(self, parts: Sequence[np.ndarray]) -> JoinedTensor:
        """The tensor that consists of ``parts``, which are not copied.

        Args:
            parts: the slices of the first TP shard, then those of the next; of any shape.
        """
        return JoinedTensor(self.shape, parts[0].dtype, list(self._pieces(parts)))

    def _pieces(self, parts: Sequence[np.ndarray]) -> Iterator[_Piece]:
        if not self.shards:
            yield from _pieces_of_slices(parts, self.shape)
        for number, shard in enumerate(self.shards):
            slices = parts[number * self.slices : (number + 1) * self.slices]
            for piece in _pieces_of_slices(slices, self.shard_shape):
                at = 0
                for start, stop in shard.ranges:
                    cut = piece.cut(shard.axis, (at, at + stop - start))
                    if cut is not None:
                        yield cut.moved(shard.axis, start)
                    at += stop - start


@dataclass(frozen=True)
class Division:
    """The division of a tensor that no rank holds as a whole.

    Attributes:
        holders: takes the rank that writes the tensor; returns the ranks that hold the parts, in
            the order of ``Assembly.join``.
        part_bytes: size of each part in bytes.
        assembly: joins the parts.
    """

    holders: Callable[[int], tuple[int, ...]]
    part_bytes: int
    assembly: Assembly


def _copy_in_tiles(to: np.ndarray, values: np.ndarray) -> None:
    """Copies ``values`` to ``to``, a transposed matrix tile by tile, to use the caches."""
    if values.ndim != 2 or values.strides[0] >= values.strides[1]:
        np.copyto(to, values)
        return
    for row in range(0, len(values), _TILE):
        for column in range(0, values.shape[1], _TILE):
            tile = (slice(row, row + _TILE), slice(column, column + _TILE))
            to[tile] = values[tile]


def _columns(shape: Shape) -> int:
    """Number of columns of a tensor as a matrix [first axis, all others]."""
    return max(1, math.prod(shape[1:]))


def _pieces_of_slices(slices: Sequence[np.ndarray], shape: Shape) -> Iterator[_Piece]:
    """The pieces of a tensor that is stored as consecutive flat ``slices`` and padding.

    A slice that does not begin and end with a row has a piece for the part of a row at its start,
    one for its whole rows, and one for the part of a row at its end.
    """
    size, columns = math.prod(shape), _columns(shape)
    start = 0
    for each in slices:
        flat = each.reshape(-1)[: max(0, size - start)]
        stop = start + flat.size
        first_row = min(-(-start // columns) * columns, stop)
        last_row = max(first_row, stop // columns * columns)
        for begin, end in pairwise((start, first_row, last_row, stop)):
            if begin < end:
                values = flat[begin - start : end - start]
                row, column = divmod(begin, columns)
                width = columns if (begin, end) == (first_row, last_row) else end - begin
                rows = values.size // width
                matrix = values.reshape(rows, width)
                yield _Piece(((row, row + rows), (column, column + width)), matrix)
        start += each.size
