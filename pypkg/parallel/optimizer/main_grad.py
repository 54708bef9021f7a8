"""Gradients that accumulate in float32 for parameters of 16 bits.

Fleet's sharding and its MixPrecisionOptimizer look for them in ``parameter.main_grad``. Its
MixPrecisionLayer would fill that from a hook that runs before a gradient is accumulated, and loses
what other such hooks make of the gradient (tp_layers.py sums over the tensor group in one); so it
is filled here after the accumulation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import paddle
from paddle import Tensor


def with_main_grad(parameters: Iterable[Tensor], optimizer: paddle.optimizer.Optimizer) -> Any:
    """Gives the parameters a ``main_grad``, None until there is a gradient.

    Returns:
        An optimizer that uses it.
    """
    from paddle.distributed.fleet.utils.mix_precision_utils import MixPrecisionOptimizer

    for parameter in parameters:
        parameter.main_grad = None
        parameter._register_backward_hook(_adder(parameter))
    return MixPrecisionOptimizer(optimizer)


def _adder(parameter: Tensor) -> Callable[..., None]:
    @paddle.no_grad()
    def add(*_: object) -> None:
        gradient = parameter.grad
        if parameter.main_grad is None:
            # A copy: a float32 gradient would be the tensor itself.
            parameter.main_grad = gradient.astype("float32").clone()
        else:
            parameter.main_grad.add_(gradient.astype("float32"))
        parameter.clear_gradient(False)

    return add
