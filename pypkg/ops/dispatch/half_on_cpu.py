"""Training in 16 bits on a CPU: Paddle's operators that have no 16-bit CPU kernel, in float32.

Paddle 3.3.1 can store, copy and convert float16 and bfloat16 on a CPU, but not multiply, add or
normalise them. ``install`` wraps each such operator. The wrapper converts 16-bit CPU tensors to
float32, runs Paddle's operator, and rounds the results to the 16-bit dtype. This is the precision
of a 16-bit kernel: sums are float32, and a result is rounded once. Gradients are converted too. All
tensors of a model stay in 16 bits, so dtypes, hooks, master weights, loss scaling and communication
are those of a GPU.

Tensors of other dtypes or on other devices are passed to Paddle's operator unchanged. The CPU
kernels of this package support bfloat16; for float16 the reference of an operator runs
(``library.implementation``).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import paddle
from paddle import Tensor

HALF = (paddle.float16, paddle.bfloat16)
_WIDER = (paddle.float32, paddle.float64)
# Functions of paddle._C_ops, which Paddle's Python functions call.
_OPERATORS = (
    *("add", "divide", "linear", "matmul", "maximum", "multiply", "subtract", "where"),
    *("gelu", "layer_norm", "p_norm", "relu", "silu", "softmax"),
)
_IN_PLACE = ("add_", "multiply_")
# Methods of paddle.Tensor, whose arithmetic does not use paddle._C_ops.
_ARITHMETIC = ("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "matmul")


@functools.cache
def install() -> None:
    """Replaces the operators for the whole process. A second call has no effect."""
    operators: Any = paddle._C_ops
    for name in _IN_PLACE:  # composed of the operator that is not in place, and an assignment
        replaced, plain = getattr(operators, name), getattr(operators, name.removesuffix("_"))
        setattr(operators, name, _in_place(replaced, _widened(plain)))
    for name in _OPERATORS:
        setattr(operators, name, _widened(getattr(operators, name)))
    for name in _ARITHMETIC:
        setattr(Tensor, f"__{name}__", _widened(getattr(Tensor, f"__{name}__")))


def _widened(operator: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(operator)
    def run(*args: Any, **kwargs: Any) -> Any:
        given = [each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)]
        halves = [each for each in given if _is_half(each)]
        if not halves:
            return operator(*args, **kwargs)
        wide = [_wide(each) for each in args]
        result = operator(*wide, **{name: _wide(each) for name, each in kwargs.items()})
        is_mixed = any(each.dtype in _WIDER for each in given)  # Paddle's result is not of 16 bits
        return result if is_mixed else result.astype(halves[0].dtype)

    return run


def _in_place(operator: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(operator)
    def run(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not _is_half(x):
            return operator(x, *args, **kwargs)
        return paddle.assign(plain(x, *args, **kwargs), x)

    return run


def _is_half(value: object) -> bool:
    return isinstance(value, Tensor) and value.dtype in HALF and value.place.is_cpu_place()


def _wide(value: Any) -> Any:
    return value.astype("float32") if _is_half(value) else value
