"""Gradients that accumulate in float32 for parameters of 16 bits.

Fleet's sharding and its MixPrecisionOptimizer read them from ``parameter.main_grad``. Fleet's
MixPrecisionLayer fills it from a hook that runs before a gradient is accumulated. That hook misses
the effect of other hooks, such as the sum over the tensor group in tp_layers.py. The hook here runs
after the accumulation. It finds no gradient where linear_gradients.py has added the product to
``main_grad``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import paddle
from paddle import Tensor


def with_main_grad(parameters: Iterable[Tensor], optimizer: paddle.optimizer.Optimizer) -> Any:
    """Gives each parameter a float32 ``main_grad``, which is None until it has a gradient.

    Returns:
        A MixPrecisionOptimizer around ``optimizer``, which uses ``main_grad`` in its updates.
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
        if gradient is None:  # linear_gradients.py
            return
        parameter.main_grad = add_to(parameter.main_grad, gradient)
        parameter.clear_gradient(False)

    return add


def add_to(total: Tensor | None, gradient: Tensor) -> Tensor:
    """``total`` + ``gradient`` in float32, in place if ``total`` is given.

    On a GPU one kernel adds a 16-bit gradient to float32. The first call of a step moves 6 bytes of
    memory per element, the others 10. Paddle's builds for CPUs would convert the gradient and log a
    warning, so the conversion is made here.
    """
    if total is None:
        is_wide = gradient.dtype == paddle.float32
        return gradient.clone() if is_wide else gradient.astype("float32")
    if gradient.place.is_cpu_place():
        gradient = gradient.astype("float32")  # no copy if it is float32
    return total.add_(gradient)
