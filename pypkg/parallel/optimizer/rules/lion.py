"""Lion: the sign of an interpolated momentum."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import paddle
from paddle import Tensor

from pypkg.parallel.optimizer.protocol import ParameterUpdate
from pypkg.parallel.optimizer.rules.one_moment import OneMoment
from pypkg.parallel.optimizer.rules.weights import Weights, count_step


class Lion(OneMoment):
    """Lion (Chen et al., "Symbolic Discovery of Optimization Algorithms", 2023).

    With g the scaled gradient and w the weights::

        w = w - learning_rate * weight_decay * w
        w = w - learning_rate * sign(beta1 * moment + (1 - beta1) * g)
        moment = beta2 * moment + (1 - beta2) * g

    An ``Optimizer`` that takes every parameter.

    Args:
        beta1, beta2: as in the formula; the paper uses 0.9 and 0.99.
        weight_decay: factor in the formula, for the parameters named in ``decayed``.
        weights: how 16-bit parameters are updated.
    """

    MOMENT = "moment"

    def __init__(
        self,
        *,
        beta1: float,
        beta2: float,
        weight_decay: float,
        decayed: Collection[str],
        weights: Weights,
    ) -> None:
        self._beta1, self._beta2 = beta1, beta2
        super().__init__(weights)
        self._weight_decay, self._decayed = weight_decay, decayed

    def takes(self, name: str, shape: Sequence[int]) -> bool:
        return True

    @paddle.no_grad()
    def update(
        self, updates: Sequence[ParameterUpdate], learning_rate: float, grad_scale: Tensor
    ) -> None:
        is_finite = paddle.isfinite(grad_scale)
        for each in updates:
            step, moment = count_step(each.state), each.state[self.MOMENT]
            gradient = each.gradient.astype("float32") * grad_scale
            old = self._weights.read(each)
            direction = (self._beta1 * moment + (1 - self._beta1) * gradient).sign()
            decay = self._weight_decay if each.name in self._decayed else 0.0
            new = old * (1 - learning_rate * decay) - learning_rate * direction
            changed = self._beta2 * moment + (1 - self._beta2) * gradient
            paddle.assign(paddle.where(is_finite, changed, moment), moment)
            self._weights.write(each, paddle.where(is_finite, new, old), step)
