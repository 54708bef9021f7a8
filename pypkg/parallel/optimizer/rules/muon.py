"""Muon: updates matrices by their orthogonalized momentum."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence

import numpy as np
import paddle
from paddle import Tensor

from pypkg.parallel.optimizer.pieces import MatrixLayout, Piece
from pypkg.parallel.optimizer.protocol import ParameterUpdate
from pypkg.parallel.optimizer.rules.one_moment import OneMoment
from pypkg.parallel.optimizer.rules.weights import Weights, count_step
from pypkg.parallel.optimizer.whole_matrices import on_owners

# Of the quintic Newton-Schulz iteration, as in Jordan's post and torch.optim.Muon.
_A, _B, _C = 3.4445, -4.7750, 2.0315
_ITERATIONS, _EPSILON = 5, 1e-7
# Root mean square of the updates of AdamW (Liu et al., 2025).
_ADAMW_RMS = 0.2


class Muon(OneMoment):
    """Muon (Jordan et al., 2024) with AdamW's update size (Liu et al., "Muon is Scalable for LLM
    Training", 2025): it takes AdamW's learning rate and weight decay.

    With g the scaled gradient, w the weights, and O(m) the orthogonal factor of an r x c matrix m,
    which ``orthogonalized`` approximates::

        momentum = mu * momentum + (1 - mu) * g
        w = w - learning_rate * weight_decay * w
        w = w - learning_rate * 0.2 * sqrt(max(r, c)) * O(mu * momentum + (1 - mu) * g)

    Query, key and value in one parameter are treated as separate matrices, and so are gate and up
    projection. A divided matrix is orthogonalized by one of the ranks that hold its pieces.

    Args:
        momentum: mu.
        weight_decay: factor in the formula, for the parameters named in ``decayed``.
        takes: whether Muon updates a parameter, given its name and whole shape; only matrices.
        weights: how 16-bit parameters are updated.
    """

    MOMENT = "momentum"

    def __init__(
        self,
        *,
        momentum: float,
        weight_decay: float,
        decayed: Collection[str],
        takes: Callable[[str, Sequence[int]], bool],
        weights: Weights,
    ) -> None:
        self._momentum, self._takes = momentum, takes
        super().__init__(weights)
        self._weight_decay, self._decayed = weight_decay, decayed

    def takes(self, name: str, shape: Sequence[int]) -> bool:
        return self._takes(name, shape)

    @paddle.no_grad()
    def update(
        self, updates: Sequence[ParameterUpdate], learning_rate: float, grad_scale: Tensor
    ) -> None:
        is_finite = paddle.isfinite(grad_scale)
        pieces = [(each.piece, self._blend(each, grad_scale, is_finite)) for each in updates]
        for each, direction in zip(updates, on_owners(pieces, _orthogonal_matrices), strict=True):
            step, old = count_step(each.state), self._weights.read(each)
            decay = self._weight_decay if each.name in self._decayed else 0.0
            new = old * (1 - learning_rate * decay)
            new -= learning_rate * _scales(each.piece) * direction.astype("float32")
            self._weights.write(each, paddle.where(is_finite, new, old), step)

    def _blend(self, update: ParameterUpdate, grad_scale: Tensor, is_finite: Tensor) -> Tensor:
        """Updates the momentum; returns the matrix to orthogonalize, bfloat16."""
        moment, mu = update.state[self.MOMENT], self._momentum
        gradient = update.gradient.astype("float32") * grad_scale
        new = mu * moment + (1 - mu) * gradient
        paddle.assign(paddle.where(is_finite, new, moment), moment)
        return (mu * new + (1 - mu) * gradient).astype("bfloat16")


def _scales(piece: Piece) -> Tensor | float:
    """0.2 * sqrt(max(r, c)) of the matrix that each element belongs to."""
    layout = piece.layout
    values = [_ADAMW_RMS * math.sqrt(max(shape)) for shape in _shapes(layout)]
    if len(set(values)) == 1:
        return values[0]
    of_whole = np.repeat(values, layout.widths)
    return piece.along_axis(np.where(piece.places < 0, 0.0, of_whole[piece.places]))


def _shapes(layout: MatrixLayout) -> list[tuple[int, int]]:
    rows, columns = layout.shape
    if not layout.widths:
        return [(rows, columns)]
    if layout.axis == 0:
        return [(width, columns) for width in layout.widths]
    return [(rows, width) for width in layout.widths]


def _orthogonal_matrices(piece: Piece, whole: Tensor) -> Tensor:
    """``orthogonalized`` of each matrix of a parameter."""
    layout = piece.layout
    if len(layout.widths) < 2:
        return orthogonalized(whole)
    matrices = whole.split(list(layout.widths), axis=layout.axis)
    return paddle.concat([orthogonalized(each) for each in matrices], axis=layout.axis)


@paddle.no_grad()
def orthogonalized(matrix: Tensor) -> Tensor:
    """Approximates U V^T of the SVD U S V^T by five Newton-Schulz iterations (Jordan et al., 2024).

    Its singular values are about 0.7 to 1.2. It is computed in bfloat16; products are summed in
    float32.

    Args:
        matrix: [r, c] of a floating type.

    Returns:
        bfloat16 [r, c].
    """
    x = matrix.astype("float32")
    x = (x / paddle.clip(paddle.linalg.norm(x), min=_EPSILON)).astype("bfloat16")
    is_tall = matrix.shape[0] > matrix.shape[1]
    if is_tall:  # x @ x.T is smaller if x is wide
        x = x.T
    for _ in range(_ITERATIONS):
        gram = _product(x, x.T).astype("bfloat16")
        polynomial = _B * gram.astype("float32") + _C * _product(gram, gram)
        step = _product(polynomial.astype("bfloat16"), x)
        x = (_A * x.astype("float32") + step).astype("bfloat16")
    return x.T if is_tall else x


def _product(x: Tensor, y: Tensor) -> Tensor:
    """x @ y of bfloat16 matrices, as float32. On a GPU the result has been rounded to bfloat16."""
    if x.place.is_cpu_place():  # Paddle has no bfloat16 matmul on a CPU
        return paddle.matmul(x.astype("float32"), y.astype("float32"))
    return paddle.matmul(x, y).astype("float32")
