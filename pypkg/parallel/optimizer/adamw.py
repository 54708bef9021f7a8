"""AdamW on the fused operator."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import paddle
from paddle import Tensor

from pypkg import ops
from pypkg.parallel.optimizer.clipping import HALF
from pypkg.parallel.optimizer.protocol import ParameterUpdate

_MASTER_WEIGHT = "master_weight"
_MOMENTS = ("moment1", "moment2")
_POWERS = ("beta1_pow_acc", "beta2_pow_acc")


class AdamW:
    """AdamW (Loshchilov and Hutter, 2019); an ``Optimizer`` that takes every parameter.

    Parameters of 16 bits are updated through float32 master weights. ``ops.adamw_`` states the
    formula.

    Args:
        beta1, beta2, epsilon: of the formula.
        weight_decay: factor of the decay, which is decoupled from the gradient.
        decayed: names of the parameters that weight decay applies to.
    """

    def __init__(
        self,
        *,
        beta1: float,
        beta2: float,
        epsilon: float,
        weight_decay: float,
        decayed: Collection[str],
    ) -> None:
        self._beta1, self._beta2, self._epsilon = beta1, beta2, epsilon
        self._weight_decay, self._decayed = weight_decay, decayed

    def takes(self, name: str, shape: Sequence[int]) -> bool:
        return True

    def state_names(self, dtype: paddle.dtype) -> tuple[str, ...]:
        return (*((_MASTER_WEIGHT,) if dtype in HALF else ()), *_MOMENTS, *_POWERS)

    def is_scalar(self, state_name: str) -> bool:
        return state_name in _POWERS

    def make_state(self, parameter: Tensor) -> dict[str, Tensor]:
        """Zero moments; beta1 and beta2, in host memory; for 16 bits, the master weight."""
        is_half = parameter.dtype in HALF
        dtype = paddle.float32 if is_half else parameter.dtype
        state = {_MASTER_WEIGHT: parameter.detach().astype(dtype)} if is_half else {}
        state |= {moment: paddle.zeros(parameter.shape, dtype) for moment in _MOMENTS}
        host = paddle.CPUPlace()
        for power, beta in zip(_POWERS, (self._beta1, self._beta2), strict=True):
            state[power] = paddle.to_tensor([beta], dtype, place=host)
        return state

    def update(
        self, updates: Sequence[ParameterUpdate], learning_rate: float, grad_scale: Tensor
    ) -> None:
        names = [*_MOMENTS, *_POWERS]
        if updates[0].parameter.dtype in HALF:
            names.append(_MASTER_WEIGHT)
        ops.adamw_(
            [each.parameter for each in updates],
            [each.gradient for each in updates],
            *([each.state[name] for each in updates] for name in names),
            learning_rate=learning_rate,
            weight_decays=[
                self._weight_decay if each.name in self._decayed else 0.0 for each in updates
            ],
            beta1=self._beta1,
            beta2=self._beta2,
            epsilon=self._epsilon,
            grad_scale=grad_scale,
        )
