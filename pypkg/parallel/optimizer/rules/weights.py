"""The weights that an update rule changes: parameters, or their float32 master weights."""

from __future__ import annotations

from dataclasses import dataclass

import paddle
from paddle import Tensor

from pypkg.parallel.host_memory import to_host
from pypkg.parallel.optimizer.clipping import HALF
from pypkg.parallel.optimizer.protocol import ParameterUpdate
from pypkg.parallel.optimizer.rules.rounding import stochastic_bfloat16

MASTER_WEIGHT, STEP = "master_weight", "step"


@dataclass(frozen=True)
class Weights:
    """How 16-bit weights are updated.

    Attributes:
        stochastic: bfloat16 parameters have no master weights, and their new values are rounded
            stochastically. If false, 16-bit parameters have float32 master weights.
    """

    stochastic: bool = False

    def state_names(self, dtype: paddle.dtype) -> tuple[str, ...]:
        return (MASTER_WEIGHT,) if dtype in HALF and not self.stochastic else ()

    def make_state(self, parameter: Tensor) -> dict[str, Tensor]:
        return {
            name: parameter.detach().astype("float32") for name in self.state_names(parameter.dtype)
        }

    def read(self, update: ParameterUpdate) -> Tensor:
        """The weights in float32: the master weight if there is one, else the parameter."""
        held = update.state.get(MASTER_WEIGHT, update.parameter.detach())
        return held.astype("float32")

    def write(self, update: ParameterUpdate, values: Tensor, step: int) -> None:
        """Overwrites the weights in place.

        Args:
            values: float32, of the parameter's shape.
            step: number of the update, from 1: with the name, the seed of stochastic rounding.
        """
        parameter = update.parameter
        if MASTER_WEIGHT in update.state:
            paddle.assign(values, update.state[MASTER_WEIGHT])
        if self.stochastic and parameter.dtype == paddle.bfloat16:
            paddle.assign(stochastic_bfloat16(values, update.name, step), parameter)
        else:
            paddle.assign(values.astype(parameter.dtype), parameter)


def new_step() -> Tensor:
    """The scalar state ``STEP`` before the first update: float32 [1] in host memory."""
    return paddle.to_tensor([0.0], "float32", place=paddle.CPUPlace())


def count_step(state: dict[str, Tensor]) -> int:
    """Increments the state ``STEP`` and returns it: the number of the update, from 1."""
    step = to_host(state[STEP])
    step += 1
    return int(step[0])
