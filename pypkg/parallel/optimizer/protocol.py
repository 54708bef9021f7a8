"""The interfaces of the optimizer step: ``Optimizer``, an update rule, and ``TpSharding``.

ZeRO, clipping, offload and checkpoints use an optimizer only through ``Optimizer``. A new optimizer
is a class in rules/ that implements it and a line in factory.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
import paddle
from paddle import Tensor

from pypkg.parallel.optimizer.pieces import MatrixLayout, Piece

# Reads the elements of an array that slices select: one slice per axis, from the first axis on.
# Axes without a slice are read whole.
ReadSlices: TypeAlias = Callable[[Sequence[slice]], np.ndarray]


@dataclass(eq=False)
class ParameterUpdate:
    """One parameter's tensors in a step. Only the gradient is another one in the next step.

    Attributes:
        name: the parameter's name in the model.
        parameter: float32, float16 or bfloat16, in the shape that this rank updates: that of the
            parameter or TP shard, and in ZeRO stage 3 a flat slice of it, ``[n]``. Overwritten.
        gradient: of the parameter's shape, in its dtype or float32.
        state: tensors of ``Optimizer.make_state``. Overwritten.
        piece: where the tensors lie in the whole parameter.
    """

    __slots__ = ("gradient", "name", "parameter", "piece", "state")

    name: str
    parameter: Tensor
    gradient: Tensor
    state: dict[str, Tensor]
    piece: Piece


class Optimizer(Protocol):
    """An update rule. It keeps no state itself: each call gets the state of its parameters.

    A state tensor either has the shape of its parameter and is divided like it (TP, ZeRO), or it is
    undivided: every rank with a piece of the parameter holds the whole state tensor.
    """

    def takes(self, name: str, shape: Sequence[int]) -> bool:
        """Whether this optimizer updates the parameter ``name``, whose whole shape is ``shape``."""

    def state_names(self, dtype: paddle.dtype) -> tuple[str, ...]:
        """Names of the state tensors of a parameter of ``dtype``."""

    def undivided_shape(self, state_name: str, shape: Sequence[int]) -> tuple[int, ...] | None:
        """The shape of an undivided state tensor; None if it is divided like its parameter.

        Args:
            shape: of the whole parameter.
        """

    def make_state(self, parameter: Tensor, shape: Sequence[int]) -> dict[str, Tensor]:
        """State before the first update, in the order of ``state_names``.

        Undivided tensors are float32. Others may be stored in the forms of rules/moments.py, of
        which the 8-bit form needs one more tensor.

        Args:
            parameter: in the shape that this rank updates.
            shape: of the whole parameter.
        """

    def update(
        self, updates: Sequence[ParameterUpdate], learning_rate: float, grad_scale: Tensor
    ) -> None:
        """One step for all of ``updates``, in place.

        Args:
            grad_scale: float32 scalar on the device, by which gradients are multiplied first. NaN:
                the gradients are not finite. Then no parameter changes, and no state tensor that
                has the shape of its parameter.
        """


class TpSharding(Protocol):
    """How tensor parallelism divides the parameters of a model into TP shards, by name."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the whole model's parameters by name, in the order of the model."""

    def layout(self, name: str) -> MatrixLayout:
        """The matrices and the TP shards of the parameter ``name``."""

    def gather(self, name: str, shard: Tensor, writer: int) -> np.ndarray | None:
        """Gathers the whole array on the rank ``writer``; returns None on the other ranks.

        The ranks of the writer's tensor group must call this.

        Args:
            name: of a parameter.
            shard: this rank's TP shard of the parameter, or of a state tensor of the same shape.
        """

    def read(self, name: str, read: ReadSlices, rows: tuple[int, int] | None = None) -> np.ndarray:
        """The inverse of ``gather``: this rank's shard, or some of its rows.

        Args:
            read: reads elements of the whole array; only those of the shard are read.
            rows: (start, stop) along the first axis of the shard; None: all.
        """
