"""Adafactor: second moments of a matrix, factored into rows and columns."""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from math import prod
from typing import NamedTuple

import numpy as np
import paddle
import paddle.distributed as dist
from paddle import Tensor

from pypkg.parallel.optimizer.pieces import Piece
from pypkg.parallel.optimizer.protocol import ParameterUpdate
from pypkg.parallel.optimizer.rules.weights import STEP, Weights, count_step, new_step

_ROW, _COLUMN, _WHOLE = "exp_avg_sq_row", "exp_avg_sq_col", "exp_avg_sq"
_DECAY, _EPSILON, _THRESHOLD = -0.8, 1e-30, 1.0


class Adafactor:
    """Adafactor (Shazeer and Stern, 2018) without momentum, at the learning rate of the schedule.

    It is the variant of transformers with scale_parameter and relative_step off. With g the scaled
    gradient of an r x c matrix, w its weights, t the step and b = 1 - t^-0.8::

        row = b * row + (1 - b) * (mean of g^2 over columns + 1e-30)
        col = b * col + (1 - b) * (mean of g^2 over rows + 1e-30)
        u = g / sqrt(row * col / mean of row)
        w = w - learning_rate * weight_decay * w
        w = w - learning_rate * u / max(1, rms(u))

    A vector has a second moment for each element instead of row * col / mean of row. A parameter
    counts as one matrix, even if it packs query, key and value. The sums over a divided matrix are
    reduced over all ranks that hold pieces, in two messages: r + c numbers for each matrix, and
    later one number for each matrix.

    An instance updates either matrices or all other parameters, because their states differ.

    Args:
        factored: whether this instance takes the matrices.
        weight_decay: factor in the formula, for the parameters named in ``decayed``.
        weights: how 16-bit parameters are updated.
    """

    def __init__(
        self,
        factored: bool,
        *,
        weight_decay: float,
        decayed: Collection[str],
        weights: Weights,
    ) -> None:
        self._factored = factored
        self._weight_decay, self._decayed, self._weights = weight_decay, decayed, weights

    def takes(self, name: str, shape: Sequence[int]) -> bool:
        return (len(shape) == 2) == self._factored

    def state_names(self, dtype: paddle.dtype) -> tuple[str, ...]:
        moments = (_ROW, _COLUMN) if self._factored else (_WHOLE,)
        return (*self._weights.state_names(dtype), *moments, STEP)

    def undivided_shape(self, state_name: str, shape: Sequence[int]) -> tuple[int, ...] | None:
        undivided = {STEP: (1,), _ROW: tuple(shape[:1]), _COLUMN: tuple(shape[1:])}
        return undivided.get(state_name)

    def make_state(self, parameter: Tensor, shape: Sequence[int]) -> dict[str, Tensor]:
        """Zero second moments and, for a 16-bit parameter, the master weight."""
        state = self._weights.make_state(parameter)
        if self._factored:
            state |= {_ROW: paddle.zeros([shape[0]]), _COLUMN: paddle.zeros([shape[1]])}
        else:
            state[_WHOLE] = paddle.zeros(parameter.shape, "float32")
        return {**state, STEP: new_step()}

    @paddle.no_grad()
    def update(
        self, updates: Sequence[ParameterUpdate], learning_rate: float, grad_scale: Tensor
    ) -> None:
        is_finite = paddle.isfinite(grad_scale)
        over_sharding = any(each.piece.is_sliced for each in updates)
        blocks = [_block(each, grad_scale, over_sharding) for each in updates]
        steps = [count_step(each.state) for each in updates]
        move = self._move_matrix_moments if self._factored else self._move_moments
        directions = move(updates, blocks, steps, is_finite)
        counted = [
            block.counted(direction.square()).sum().reshape([1])
            for block, direction in zip(blocks, directions, strict=True)
        ]
        squares = _summed(counted, updates)
        for index, each in enumerate(updates):
            rms = (squares[index] / prod(each.piece.layout.shape)).sqrt()
            direction = directions[index] / paddle.clip(rms / _THRESHOLD, min=1.0)
            self._apply(each, direction, learning_rate, is_finite, steps[index])

    def _move_matrix_moments(
        self,
        updates: Sequence[ParameterUpdate],
        blocks: Sequence[_Block],
        steps: Sequence[int],
        is_finite: Tensor,
    ) -> list[Tensor]:
        """Updates row and column moments; returns u of the formula for each parameter.

        The results have the layout of ``blocks``.
        """
        sums = iter(_summed([each for block in blocks for each in block.sums()], updates))
        for each, step in zip(updates, steps, strict=True):
            height, width = each.piece.layout.shape
            self._move(each, _ROW, next(sums) / width, step, is_finite)
            self._move(each, _COLUMN, next(sums) / height, step, is_finite)
        return [_factored(each, block) for each, block in zip(updates, blocks, strict=True)]

    def _move_moments(
        self,
        updates: Sequence[ParameterUpdate],
        blocks: Sequence[_Block],
        steps: Sequence[int],
        is_finite: Tensor,
    ) -> list[Tensor]:
        """``_move_matrix_moments`` for vectors."""
        for each, block, step in zip(updates, blocks, steps, strict=True):
            self._move(each, _WHOLE, block.gradient.square(), step, is_finite)
        return [
            block.gradient * each.state[_WHOLE].rsqrt()
            for each, block in zip(updates, blocks, strict=True)
        ]

    def _move(
        self, update: ParameterUpdate, name: str, mean: Tensor, step: int, is_finite: Tensor
    ) -> None:
        kept, beta = update.state[name], 1.0 - step**_DECAY
        new = beta * kept + (1.0 - beta) * (mean + _EPSILON)
        paddle.assign(paddle.where(is_finite, new, kept), kept)

    def _apply(
        self,
        update: ParameterUpdate,
        direction: Tensor,
        learning_rate: float,
        is_finite: Tensor,
        step: int,
    ) -> None:
        if self._factored:
            direction = update.piece.from_block(direction)
        old = self._weights.read(update)
        decay = self._weight_decay if update.name in self._decayed else 0.0
        new = old * (1 - learning_rate * decay) - learning_rate * direction
        self._weights.write(update, paddle.where(is_finite, new, old), step)


class _Block(NamedTuple):
    """A gradient as whole rows of the rank's shard, with their position in the parameter.

    Attributes:
        gradient: float32, [rows, columns] or [n].
        piece: the piece that the rank updates.
        ids: for each axis, the indices in the whole parameter, int64; 0 for padding.
        owned: for each axis, float32: 1 for the indices that this rank counts in sums, else 0.
    """

    gradient: Tensor
    piece: Piece
    ids: tuple[Tensor, ...]
    owned: tuple[Tensor, ...]

    def counted(self, values: Tensor) -> Tensor:
        """``values`` with zeros for the elements that this rank does not count."""
        for axis, owned in enumerate(self.owned):
            values = values * owned.reshape([-1 if a == axis else 1 for a in range(values.ndim)])
        return values

    def sums(self) -> list[Tensor]:
        """This rank's part of the sums of squares of each row and column of the whole matrix."""
        squares = self.counted(self.gradient.square())
        return [
            paddle.index_add(paddle.zeros([length]), ids, 0, squares.sum(axis=1 - axis))
            for axis, (length, ids) in enumerate(
                zip(self.piece.layout.shape, self.ids, strict=True)
            )
        ]


def _block(update: ParameterUpdate, grad_scale: Tensor, over_sharding: bool) -> _Block:
    piece = update.piece
    is_counted = float(piece.counts(over_sharding))
    layout, is_matrix = piece.layout, len(piece.layout.shape) == 2
    gradient = update.gradient.astype("float32") * grad_scale
    ids, owned = [], []
    for axis, length in enumerate(layout.shard_shape):
        places = piece.places if axis == layout.axis else np.arange(length)
        counts = piece.owned if axis == layout.axis else np.ones(length, bool)
        if axis == 0 and is_matrix:
            places, counts = places[slice(*piece.rows())], counts[slice(*piece.rows())]
        ids.append(paddle.to_tensor(np.maximum(places, 0), dtype="int64"))
        owned.append(paddle.to_tensor(counts * is_counted, dtype="float32"))
    if is_matrix:
        gradient = piece.to_block(gradient)
    return _Block(gradient, piece, tuple(ids), tuple(owned))


def _factored(update: ParameterUpdate, block: _Block) -> Tensor:
    """The gradient divided by the root of the factored second moment."""
    row, column = update.state[_ROW], update.state[_COLUMN]
    of_rows = (row / row.mean()).rsqrt()[block.ids[0]].unsqueeze(1)
    return block.gradient * of_rows * column.rsqrt()[block.ids[1]]


def _summed(values: Sequence[Tensor], updates: Sequence[ParameterUpdate]) -> list[Tensor]:
    """Sums ``values`` over the ranks that hold pieces of the same parameters.

    There is one message for each group. The terms of a tensor group are added in the order of
    ranks. An all-reduce would add them in an order that depends on the offset in the message. That
    offset differs between the pipeline stages that hold copies of a tied embedding.
    """
    mesh = updates[0].piece.mesh
    is_sliced = any(each.piece.is_sliced for each in updates)
    flat = paddle.concat(list(values))
    if mesh.tensor is not None:
        parts: list[Tensor] = []
        dist.all_gather(parts, flat, group=mesh.tensor)
        flat = functools.reduce(paddle.add, parts)
    if is_sliced:
        dist.all_reduce(flat, group=mesh.sharding)
    return flat.split([value.shape[0] for value in values])
