"""The interfaces of the optimizer step: an update rule, and how tensor parallelism shards.

ZeRO, clipping, offload and checkpoints know an optimizer by ``Optimizer`` alone. A new optimizer is
a class that implements it and a line in factory.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, TypeAlias

import numpy as np
import paddle
from paddle import Tensor

# The elements of an array that slices, one per axis from the first on, select; none: all.
ReadSlices: TypeAlias = Callable[[Sequence[slice]], np.ndarray]


class ParameterUpdate(NamedTuple):
    """One parameter's tensors in a step.

    Attributes:
        name: the parameter's name in the model.
        parameter: float32, float16 or bfloat16, in the shape that this rank updates: that of the
            parameter or TP shard, and in ZeRO stage 3 a flat slice of it, ``[n]``. Overwritten.
        gradient: of the parameter's shape, in its dtype or float32.
        state: tensors of ``Optimizer.make_state``. Overwritten.
    """

    name: str
    parameter: Tensor
    gradient: Tensor
    state: dict[str, Tensor]


class Optimizer(Protocol):
    """An update rule. It holds no state itself: every call is given that of its parameters.

    A state tensor either has the shape of its parameter and is divided as the parameter is, or is
    a scalar, of shape [1], that every rank with a piece of the parameter holds.
    """

    def takes(self, name: str, shape: Sequence[int]) -> bool:
        """Whether this optimizer updates the parameter ``name``, whose whole shape is ``shape``."""

    def state_names(self, dtype: paddle.dtype) -> tuple[str, ...]:
        """Names of the state tensors of a parameter of ``dtype``."""

    def is_scalar(self, state_name: str) -> bool:
        """Whether the state tensor has shape [1] instead of the parameter's shape."""

    def make_state(self, parameter: Tensor) -> dict[str, Tensor]:
        """State before the first update, float32, in the order of ``state_names``."""

    def update(
        self, updates: Sequence[ParameterUpdate], learning_rate: float, grad_scale: Tensor
    ) -> None:
        """One step for all of ``updates``, in place.

        Args:
            grad_scale: float32 scalar on the device, by which gradients are multiplied first. NaN:
                gradients are not finite, and no parameter and no state in the shape of one changes.
        """


class TpSharding(Protocol):
    """How tensor parallelism divides the parameters of a model into TP shards, by name."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the whole model's parameters, in its order."""

    def gather(self, name: str, shard: Tensor, writer: int) -> np.ndarray | None:
        """The whole array on the rank ``writer``, whose tensor group has to call it; else None.

        Args:
            name: a parameter.
            shard: this rank's, of the parameter or of a state tensor that is shaped like it.
        """

    def read(self, name: str, read: ReadSlices, rows: tuple[int, int] | None = None) -> np.ndarray:
        """The inverse of ``gather``: this rank's shard, or some of its rows.

        Args:
            read: of the whole array; called for what the shard holds of it and nothing else.
            rows: (start, stop) along the first axis of the shard; None: all.
        """
