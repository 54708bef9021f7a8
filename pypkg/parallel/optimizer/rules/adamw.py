"""AdamW, computed by the fused operator ``ops.adamw_``."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from math import prod

import paddle
from paddle import Tensor

from pypkg import ops
from pypkg.parallel.optimizer.protocol import ParameterUpdate
from pypkg.parallel.optimizer.rules import moments
from pypkg.parallel.optimizer.rules.weights import (
    MASTER_WEIGHT,
    STEP,
    Weights,
    count_step,
    new_step,
)

_MOMENTS = ("moment1", "moment2")
_POWERS = ("beta1_pow_acc", "beta2_pow_acc")


class AdamW:
    """AdamW (Loshchilov and Hutter, 2019); an ``Optimizer`` that takes every parameter.

    ``ops.adamw_`` states the formula. If moments are not stored in float32, or weights are rounded
    stochastically, the operator gets one parameter at a time, converted to float32.

    Args:
        beta1, beta2, epsilon: as in the formula.
        weight_decay: factor of the decoupled weight decay.
        decayed: names of the parameters that weight decay applies to.
        form: storage of the moments, one of ``moments.FORMS``. Bfloat16 moments are rounded
            stochastically, because rounding to nearest would lose the small steps of a beta2 near
            1.
        weights: how 16-bit parameters are updated.
    """

    def __init__(
        self,
        *,
        beta1: float,
        beta2: float,
        epsilon: float,
        weight_decay: float,
        decayed: Collection[str],
        form: str = "float32",
        weights: Weights,
    ) -> None:
        self._beta1, self._beta2, self._epsilon = beta1, beta2, epsilon
        self._weight_decay, self._decayed = weight_decay, decayed
        self._form, self._weights = form, weights
        self._counts_steps = form == "bfloat16" or weights.stochastic

    def takes(self, name: str, shape: Sequence[int]) -> bool:
        return True

    def state_names(self, dtype: paddle.dtype) -> tuple[str, ...]:
        step = (STEP,) if self._counts_steps else ()
        return (*self._weights.state_names(dtype), *_MOMENTS, *_POWERS, *step)

    def undivided_shape(self, state_name: str, shape: Sequence[int]) -> tuple[int, ...] | None:
        return (1,) if state_name in (*_POWERS, STEP) else None

    def make_state(self, parameter: Tensor, shape: Sequence[int]) -> dict[str, Tensor]:
        """Zero moments, beta powers in host memory and, for 16-bit weights, the master weight."""
        state = self._weights.make_state(parameter)
        for moment in _MOMENTS:
            state |= moments.zeros(moment, parameter, prod(shape), self._form)
        host = paddle.CPUPlace()
        for power, beta in zip(_POWERS, (self._beta1, self._beta2), strict=True):
            state[power] = paddle.to_tensor([beta], "float32", place=host)
        if self._counts_steps:
            state[STEP] = new_step()
        return state

    def update(
        self, updates: Sequence[ParameterUpdate], learning_rate: float, grad_scale: Tensor
    ) -> None:
        if self._form == "float32" and not self._weights.stochastic:
            masters = [each.state[MASTER_WEIGHT] for each in updates if MASTER_WEIGHT in each.state]
            self._run(
                updates,
                [each.parameter for each in updates],
                [each.gradient for each in updates],
                [[each.state[moment] for each in updates] for moment in _MOMENTS],
                masters or None,
                learning_rate,
                grad_scale,
            )
            return
        for each in updates:
            self._update_one(each, learning_rate, grad_scale)

    @paddle.no_grad()
    def _update_one(
        self, update: ParameterUpdate, learning_rate: float, grad_scale: Tensor
    ) -> None:
        state = update.state
        step = count_step(state) if self._counts_steps else 0
        weights = self._weights.read(update)
        first, second = (moments.read(state, moment) for moment in _MOMENTS)
        gradient = update.gradient.astype("float32")
        self._run(
            [update], [weights], [gradient], [[first], [second]], None, learning_rate, grad_scale
        )
        for moment, values in zip(_MOMENTS, (first, second), strict=True):
            key = f"{update.name}.{moment}" if self._form == "bfloat16" else ""
            moments.write(state, moment, values, key, step)
        self._weights.write(update, weights, step)

    def _run(
        self,
        updates: Sequence[ParameterUpdate],
        weights: Sequence[Tensor],
        gradients: Sequence[Tensor],
        both_moments: Sequence[Sequence[Tensor]],
        masters: Sequence[Tensor] | None,
        learning_rate: float,
        grad_scale: Tensor,
    ) -> None:
        first, second = both_moments
        beta1_powers, beta2_powers = ([each.state[power] for each in updates] for power in _POWERS)
        ops.adamw_(
            weights,
            gradients,
            first,
            second,
            beta1_powers,
            beta2_powers,
            masters,
            learning_rate=learning_rate,
            weight_decays=[
                self._weight_decay if each.name in self._decayed else 0.0 for each in updates
            ],
            beta1=self._beta1,
            beta2=self._beta2,
            epsilon=self._epsilon,
            grad_scale=grad_scale,
        )
