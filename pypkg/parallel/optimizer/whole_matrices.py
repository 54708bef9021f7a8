"""Whole matrices for update rules that need them, each on one of the ranks that hold pieces.

Tensor parallelism and ZeRO stage 3 leave no rank a whole matrix. The n ranks that hold the pieces
of matrices own one n-th of them each. A piece is sent once to the owner, and its result once back:
a rank sends 2 (n - 1) / n of the bytes of its pieces in a step.
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
    """This rank's pieces of the results of ``compute``; all ranks that hold pieces call this.

    Args:
        pieces: of this rank, in the same order on all ranks. The tensors have one dtype.
        compute: of a whole matrix, to one of the same shape and dtype. It is called on the owner
            with its piece.
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
        # Matrices of one size take turns, so that no owner waits for a larger one.
        indices.sort(key=lambda index: -pieces[index][1].size)
        for start in range(0, len(indices), len(ranks)):
            turn = indices[start : start + len(ranks)]
            results = exchange([pieces[index] for index in turn], compute)
            for index, result in zip(turn, results, strict=True):
                found[index] = result
    return [each for each in found if each is not None]


class _Exchange:
    """Sends pieces of at most as many matrices as there are ranks to their owners, and back.

    Args:
        piece: one of this rank.
        ranks: that hold the pieces of a matrix, by tensor rank and sharding rank.
    """

    def __init__(self, piece: Piece, ranks: Sequence[int]) -> None:
        self._ranks, self._own = ranks, ranks.index(piece.mesh.rank)
        both = piece.is_divided and piece.is_sliced
        self._group = None if both else piece.mesh.tensor or piece.mesh.sharding
        if piece.is_sliced and not piece.is_divided:
            self._group = piece.mesh.sharding

    def __call__(self, pieces: Sequence[tuple[Piece, Tensor]], compute: Compute) -> list[Tensor]:
        parts = self._to_owners([value for _, value in pieces])
        results: list[Tensor] = []
        if parts:
            piece = pieces[self._own][0]
            whole = compute(piece, joined(piece, parts))
            results = divided(piece, whole, len(self._ranks))
        return self._to_holders([value for _, value in pieces], results)

    def _others(self) -> Iterator[tuple[int, int]]:
        """Index and rank of the other ranks."""
        return ((i, rank) for i, rank in enumerate(self._ranks) if i != self._own)

    def _to_owners(self, values: Sequence[Tensor]) -> list[Tensor]:
        """The pieces of the matrix that this rank owns, of all ranks; empty if it owns none."""
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
            like: this rank's pieces, of whose shapes the results are.
            results: pieces of all ranks of the matrix that this rank owns, or empty.
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
