"""Gradients of 16 bits that accumulate in float32: values, and the memory that it takes."""

from __future__ import annotations

import numpy as np
import paddle
import pytest
from paddle.base import core

from pypkg.parallel.optimizer.main_grad import add_to, with_main_grad

ELEMENTS = 2**20


def gradients(dtype: str) -> list[paddle.Tensor]:
    """Of sizes so different that a sum in 16 bits would lose the small ones."""
    draw = np.random.default_rng(0).standard_normal
    return [
        paddle.to_tensor(draw(ELEMENTS, dtype=np.float32) * 2.0**-exponent).astype(dtype)
        for exponent in (0, 9, 12)
    ]


def backward(parameter: paddle.Tensor, gradient: paddle.Tensor) -> None:
    (parameter.astype("float32") * gradient.astype("float32")).sum().backward()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_sums_are_those_of_float32(dtype):
    ones = paddle.nn.initializer.Constant(1.0)
    parameter = paddle.create_parameter([ELEMENTS], dtype, default_initializer=ones)
    given = gradients(dtype)
    optimizer = with_main_grad([parameter], paddle.optimizer.SGD(parameters=[parameter]))
    expected, address = np.zeros(ELEMENTS, np.float32), None
    for gradient in given:
        backward(parameter, gradient)
        expected += gradient.astype("float32").numpy()
        total = parameter.main_grad
        assert total.dtype == paddle.float32 and np.array_equal(total.numpy(), expected)
        assert address in (None, total.data_ptr())  # added to in place
        address = total.data_ptr()
        assert parameter.grad is None or not parameter.grad._is_initialized()
    optimizer.clear_grad(set_to_zero=False)
    assert parameter.main_grad is None


def test_the_first_gradient_is_converted_once_and_not_copied_again():
    gradient = gradients("bfloat16")[0]
    before = core.host_memory_stat_current_value("Allocated", 0)
    core.host_memory_stat_reset_peak_value("Allocated", 0)
    total = add_to(None, gradient)
    peak = core.host_memory_stat_peak_value("Allocated", 0) - before
    assert 4 * ELEMENTS <= peak < 4.1 * ELEMENTS  # the result alone
    assert total.dtype == paddle.float32
