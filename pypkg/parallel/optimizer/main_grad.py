"""Gradients that accumulate in float32 for parameters of 16 bits.

Fleet's sharding and its MixPrecisionOptimizer read them from ``parameter.main_grad``. Fleet's
MixPrecisionLayer fills that from a hook that runs before a gradient is accumulated. It therefore
loses what other hooks do to the gradient, such as the sum over the tensor group in tp_layers.py.
The hook here runs after the accumulation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import paddle
from paddle import Tensor


def with_main_grad(parameters: Iterable[Tensor], optimizer: paddle.optimizer.Optimizer) -> Any:
    """Gives each parameter a float32 ``main_grad``, which is None until there is a gradient.

    Returns:
        A MixPrecisionOptimizer around ``optimizer``, which updates from ``main_grad``.
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
        assert gradient is not None  # the hook runs after the accumulation
        parameter.main_grad = add_to(parameter.main_grad, gradient)
        parameter.clear_gradient(False)

    return add


def add_to(total: Tensor | None, gradient: Tensor) -> Tensor:
    """``total`` + ``gradient`` in float32, in the memory of ``total`` where there is one.

    On a GPU a 16-bit gradient takes 6 bytes of traffic per element the first time, and 10 from then
    on: Paddle's builds for CUDA add 16 bits to float32 in one kernel. Those for CPUs would convert
    the gradient first and warn of it, so the conversion is made here.
    """
    if total is None:
        is_wide = gradient.dtype == paddle.float32
        return gradient.clone() if is_wide else gradient.astype("float32")
    if gradient.place.is_cpu_place():
        gradient = gradient.astype("float32")  # itself, if it is of that dtype
    return total.add_(gradient)
