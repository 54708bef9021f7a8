"""The state of an update rule that keeps one moment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import paddle
from paddle import Tensor

from pypkg.parallel.optimizer.rules.weights import STEP, Weights, new_step


class OneMoment:
    """Base of an ``Optimizer`` whose state is one float32 moment in the shape of the weight.

    Attributes:
        MOMENT: name of the moment in the state.
    """

    MOMENT: ClassVar[str]

    def __init__(self, weights: Weights) -> None:
        self._weights = weights

    def state_names(self, dtype: paddle.dtype) -> tuple[str, ...]:
        return (*self._weights.state_names(dtype), self.MOMENT, STEP)

    def undivided_shape(self, state_name: str, shape: Sequence[int]) -> tuple[int, ...] | None:
        return (1,) if state_name == STEP else None

    def make_state(self, parameter: Tensor, shape: Sequence[int]) -> dict[str, Tensor]:
        """A zero moment and, for a 16-bit parameter, the master weight."""
        moment = paddle.zeros(parameter.shape, "float32")
        return {**self._weights.make_state(parameter), self.MOMENT: moment, STEP: new_step()}
