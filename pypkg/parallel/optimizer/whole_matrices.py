"""Computes functions of whole matrices whose pieces are on several ranks (for Muon).

Under tensor parallelism and ZeRO stage 3 no rank holds a whole matrix. The n ranks that hold pieces
divide the matrices among them: each rank owns one n-th. Each piece is sent to the owner of its
matrix, and a piece of the result is sent back. In a step a rank sends 2 (n - 1) / n of the bytes of
its pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import paddle
import paddle.distributed as dist
from paddle import Tensor

from pypkg.parallel.comm.gather import holders
from pypkg.parallel.optimizer.pieces import Piece, divided, joined

Compute = Callable[[Piece, Tensor], Tensor]


@paddle.no_grad()
def on_owners(pieces: Sequence[tuple[Piece, Tensor]], compute: Compute) -> list[Tensor]:
    """This rank's pieces of the results of ``compute``. All ranks that hold pieces must call this.

    Args:
        pieces: the pieces of this rank, in the same order on all ranks. All tensors have one dtype.
        compute: takes the owner's piece and the whole matrix; returns a matrix of the same shape
            and dtype. It is called on the owner only.
    """
    found: list[Tensor | None] = [None] * len(pieces)
    groups: dict[tuple[bool, bool], list[int]] = {}
    for index, (piece, _) in enumerate(pieces):
        groups.setdefault((piece.is_divided, piece.is_sliced), []).append(index)
    for (over_tensor, over_sharding), indices in groups.items():
        first = pieces[indices[0]][0]
        ranks = holders(first.mesh.rank, over_tensor, over_sharding)
        if len(ranks) == 1:
            for index in indices:
                found[index] = compute(*pieces[index])
            continue
        exchange = _Exchange(first, ranks)
        # Matrices of about one size are computed together, so that no owner waits for a larger one.
        indices.sort(key=lambda index: -pieces[index][1].size)
        for start in range(0, len(indices), len(ranks)):
            turn = indices[start : start + len(ranks)]
            results = exchange([pieces[index] for index in turn], compute)
            for index, result in zip(turn, results, strict=True):
                found[index] = result
    return [each for each in found if each is not None]


class _Exchange:
    """Sends pieces to the owners of their matrices and pieces of the results back.

    A call takes at most one matrix for each rank.

    Args:
        piece: any piece of this rank.
        ranks: those that hold the pieces of a matrix, by tensor rank, then sharding rank.
    """

    def __init__(self, piece: Piece, ranks: Sequence[int]) -> None:
        self._ranks, self._own = ranks, ranks.index(piece.mesh.rank)
        self._group = piece.mesh.tensor if piece.is_divided else piece.mesh.sharding
        if piece.is_divided and piece.is_sliced:
            self._group = None  # the group of all ranks

    def __call__(self, pieces: Sequence[tuple[Piece, Tensor]], compute: Compute) -> list[Tensor]:
        parts = self._to_owners([value for _, value in pieces])
        results: list[Tensor] = []
        if parts:
            piece = pieces[self._own][0]
            whole = compute(piece, joined(piece, parts))
            results = divided(piece, whole, len(self._ranks))
        return self._to_holders([value for _, value in pieces], results)

    def _others(self) -> Iterator[tuple[int, int]]:
        """(index in ``ranks``, global rank) of the other ranks."""
        return ((i, rank) for i, rank in enumerate(self._ranks) if i != self._own)

    def _to_owners(self, values: Sequence[Tensor]) -> list[Tensor]:
        """All ranks' pieces of the matrix that this rank owns; empty if it owns none."""
        operations = [
            self._operation(dist.isend, values[index], rank)
            for index, rank in self._others()
            if index < len(values)
        ]
        received = {}
        if self._own < len(values):
            own = values[self._own]
            received = {i: paddle.empty(own.shape, own.dtype) for i, _ in self._others()}
            operations += [
                self._operation(dist.irecv, received[i], rank) for i, rank in self._others()
            ]
            received[self._own] = own
        self._run(operations)
        return [received[index] for index in sorted(received)]

    def _to_holders(self, like: Sequence[Tensor], results: Sequence[Tensor]) -> list[Tensor]:
        """This rank's piece of each result.

        Args:
            like: this rank's pieces; the returned tensors have their shapes and dtypes.
            results: all ranks' pieces of the result that this rank has computed, or empty.
        """
        operations = [
            self._operation(dist.isend, results[index].contiguous(), rank)
            for index, rank in self._others()
            if results
        ]
        found = [
            results[index].reshape(value.shape)
            if index == self._own
            else paddle.empty(value.shape, value.dtype)
            for index, value in enumerate(like)
        ]
        operations += [
            self._operation(dist.irecv, found[index], rank)
            for index, rank in self._others()
            if index < len(like)
        ]
        self._run(operations)
        return found

    def _operation(self, operation: Callable[..., Any], tensor: Tensor, rank: int) -> dist.P2POp:
        return dist.P2POp(operation, tensor, rank, self._group)

    @staticmethod
    def _run(operations: list[dist.P2POp]) -> None:
        if operations:
            for task in dist.batch_isend_irecv(operations):
                task.wait()
