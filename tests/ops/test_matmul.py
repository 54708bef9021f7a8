"""Products in bfloat16 on a CPU against products of rounded operands in float64."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

from pypkg import _native, ops
from pypkg.errors import UserError

needs_instructions = pytest.mark.skipif(
    not _native.matmul_bfloat16_supported(), reason="this processor has no AVX512_BF16"
)


@pytest.fixture
def bfloat16_products():
    ops.set_matmul_precision("bfloat16")
    yield
    ops.set_matmul_precision("float32")


def rounded(x: np.ndarray) -> np.ndarray:
    return paddle.to_tensor(x).astype("bfloat16").astype("float32").numpy().astype(np.float64)


def product(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return rounded(x) @ rounded(y)


def draw(*shape: int) -> np.ndarray:
    return np.random.default_rng(shape).standard_normal(shape, dtype=np.float32)


@needs_instructions
@pytest.mark.parametrize("transpose_x", [False, True])
@pytest.mark.parametrize("transpose_y", [False, True])
@pytest.mark.parametrize(
    "sizes", [(1, 1, 1), (8, 48, 256), (7, 49, 257), (130, 95, 31), (300, 40, 1030), (2, 1700, 513)]
)
def test_products_and_gradients(bfloat16_products, sizes, transpose_x, transpose_y):
    m, n, k = sizes
    x, y, dout = draw(m, k), draw(k, n), draw(m, n)
    given = [
        paddle.to_tensor(x.T if transpose_x else x),
        paddle.to_tensor(y.T if transpose_y else y),
    ]
    for tensor in given:
        tensor.stop_gradient = False
    out = ops.matmul(*given, transpose_x, transpose_y)
    out.backward(paddle.to_tensor(dout))
    dx, dy = (tensor.grad.numpy() for tensor in given)
    for actual, expected in (
        (out.numpy(), product(x, y)),
        (dx.T if transpose_x else dx, product(dout, y.T)),
        (dy.T if transpose_y else dy, product(x.T, dout)),
    ):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5 * np.sqrt(max(sizes)))


@needs_instructions
def test_linear_and_no_grad(bfloat16_products):
    x, weight, bias = draw(2, 5, 96), draw(96, 51), draw(51)
    with paddle.no_grad():
        out = ops.linear(*map(paddle.to_tensor, (x, weight, bias)))
    assert out.shape == [2, 5, 51] and out.stop_gradient
    expected = product(x.reshape(10, 96), weight).reshape(2, 5, 51) + bias
    np.testing.assert_allclose(out.numpy(), expected, rtol=1e-5, atol=1e-4)


@needs_instructions
def test_infinities_and_nans_stay(bfloat16_products):
    x = np.array([[np.inf, 1.0], [np.nan, 1.0], [1.0, 2.0]], np.float32)
    out = ops.matmul(paddle.to_tensor(x), paddle.ones([2, 3])).numpy()
    assert np.isinf(out[0]).all() and np.isnan(out[1]).all() and (out[2] == 3).all()


def test_float32_is_the_frameworks_own():
    x, y = paddle.to_tensor(draw(5, 7)), paddle.to_tensor(draw(7, 3))
    assert (ops.matmul(x, y) == paddle.matmul(x, y)).all()


def test_unknown_precision():
    with pytest.raises(UserError, match="expected one of float32, bfloat16"):
        ops.set_matmul_precision("float8")
