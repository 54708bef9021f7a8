"""Products against float64: of a few rows, and in bfloat16 on a CPU, of rounded operands."""

from __future__ import annotations

import importlib
import subprocess
import sys

import numpy as np
import paddle
import pytest

from pypkg import _native, ops
from pypkg.errors import UserError
from pypkg.ops.dispatch.library import custom_op

matmul = importlib.import_module("pypkg.ops.matmul")  # pypkg.ops has the function by that name
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


@pytest.fixture(params=_native.cpu_isas())
def few_rows(request, compiled, monkeypatch):
    """The products of a few rows that ran, on each version of the kernels."""
    ran = []

    def run(op, tensors, *attributes):
        ran.append(tensors[0].shape)
        assert op == "pypkg_matmul_few_rows"
        return run_compiled(op, tensors, *attributes)

    run_compiled = matmul.run_compiled
    monkeypatch.setattr(matmul, "run_compiled", run)
    _native.set_cpu_isa(request.param)
    yield ran
    _native.set_cpu_isa("")


@paddle.no_grad()
@pytest.mark.parametrize("transpose_y", [False, True])
@pytest.mark.parametrize(
    "x_shape, y_shape",
    [
        ([1, 1], [1, 1]),
        ([3, 7], [7, 5]),
        ([8, 1, 65], [65, 300]),
        ([5, 130], [130, 4133]),  # more columns than a tile, and a few
        ([1, 1, 513], [513, 1021]),
        ([2, 3, 2, 64], [2, 3, 64, 130]),
        ([1, 8, 1, 130], [1, 8, 130, 64]),
    ],
)
def test_products_of_a_few_rows(few_rows, x_shape, y_shape, transpose_y):
    x, y = draw(*x_shape), draw(*y_shape)
    given = paddle.to_tensor(y.swapaxes(-1, -2).copy() if transpose_y else y)
    out = ops.matmul(paddle.to_tensor(x), given, transpose_y=transpose_y).numpy()
    bound = 1e-6 * np.sqrt(x_shape[-1]) + 1e-6
    np.testing.assert_allclose(out, x.astype(np.float64) @ y, rtol=1e-5, atol=5 * bound)
    if y.ndim == 2:  # each row has the bits that it has alone
        rows = x.reshape([-1, 1, x_shape[-1]])
        alone = [ops.matmul(paddle.to_tensor(row), given, transpose_y=transpose_y) for row in rows]
        assert (paddle.concat(alone).numpy().ravel() == out.ravel()).all()
    assert few_rows


@paddle.no_grad()
def test_a_bias_and_a_view_of_a_few_rows(few_rows):
    x, weight, bias = draw(4, 3, 96), draw(96, 51), draw(51)
    out = ops.linear(paddle.to_tensor(x)[:, -1], *map(paddle.to_tensor, (weight, bias))).numpy()
    expected = x[:, -1].astype(np.float64) @ weight + bias
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-4)
    assert few_rows == [[4, 96]]


def test_more_rows_and_gradients_are_the_frameworks_own(few_rows):
    x, y = paddle.to_tensor(draw(9, 7)), paddle.to_tensor(draw(7, 3))
    with paddle.no_grad():
        assert (ops.matmul(x, y) == paddle.matmul(x, y)).all()
        pairs = paddle.to_tensor(draw(2, 9, 7)), paddle.to_tensor(draw(2, 7, 3))
        assert (ops.matmul(*pairs) == paddle.matmul(*pairs)).all()
        one, more = paddle.to_tensor(draw(1, 2, 7)), paddle.to_tensor(draw(3, 7, 3))
        assert ops.matmul(one, more).shape == [3, 2, 3]
    assert (ops.matmul(x[:2], y) == paddle.matmul(x[:2], y)).all()
    assert not few_rows


def test_shapes_that_do_not_fit_are_refused(compiled):
    x, y = paddle.zeros([2, 3]), paddle.zeros([4, 5])
    with pytest.raises(ValueError, match=r"x of shape \[2, 3\] cannot be multiplied .* \[4, 5\]"):
        custom_op("pypkg_matmul_few_rows", x, y, False)


@needs_instructions
def test_a_paddle_without_onednn_is_told(compiled, monkeypatch):
    def run(*_):
        raise OSError("(External) dnnl_engine_create is missing")

    monkeypatch.setattr(matmul, "run_compiled", run)
    with pytest.raises(UserError, match=r"no oneDNN .*dnnl_engine_create is missing.* 'float32'"):
        ops.set_matmul_precision("bfloat16")
    assert (ops.matmul(paddle.ones([9, 2]), paddle.ones([2, 3])) == 2).all()


@needs_instructions
def test_products_without_a_depth_are_zero(bfloat16_products):
    def product(x, y):
        return custom_op("pypkg_matmul_bfloat16", paddle.ones(x), paddle.ones(y), False, False)[0]

    empty = product([2, 0], [0, 3])
    assert (empty == 0).all() and empty.shape == [2, 3]
    with pytest.raises(ValueError, match="x has 2 columns, but y has 3 rows"):
        product([2, 2], [3, 3])


def test_unknown_precision():
    with pytest.raises(UserError, match="expected one of float32, bfloat16"):
        ops.set_matmul_precision("float8")


@pytest.mark.parametrize("transpose_x", [False, True])
@pytest.mark.parametrize("transpose_y", [False, True])
@pytest.mark.parametrize(
    "sizes", [(1, 1, 1), (1, 9, 33), (33, 1, 9), (9, 33, 1), (7, 49, 257), (130, 95, 31)]
)
def test_product_that_is_added_to_a_sum(sizes, transpose_x, transpose_y):
    m, n, k = sizes
    x, y, before = draw(m, k), draw(k, n), draw(m, n)
    total = paddle.to_tensor(before)
    given = [
        paddle.to_tensor(np.ascontiguousarray(each.T) if transposed else each)
        for each, transposed in ((x, transpose_x), (y, transpose_y))
    ]
    assert matmul.can_add_matmul(given[0])
    custom_op("pypkg_add_matmul", *given, total, transpose_x, transpose_y)
    expected = before + x.astype(np.float64) @ y.astype(np.float64)
    np.testing.assert_allclose(total.numpy(), expected, rtol=1e-5, atol=1e-5 * np.sqrt(k))


def test_a_product_can_be_added_before_any_other_product():
    """Paddle loads MKL with the first product of a process."""
    command = "import paddle; from pypkg.ops.matmul import can_add_matmul as can; "
    answer = subprocess.run(
        [sys.executable, "-c", command + "print(can(paddle.ones([2, 2])))"],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert answer.stdout.split()[-1] == "True", answer.stderr


def test_sums_of_products():
    """The first is the product, the others are added in its memory, in at least float32."""
    for dtype in ("float32", "float64"):
        x, y = draw(9, 5).astype(dtype), draw(9, 3).astype(dtype)
        total, address = None, None
        for count in (1, 2, 3):
            total = matmul.add_product(total, paddle.to_tensor(x), paddle.to_tensor(y))
            assert total.dtype == getattr(paddle, dtype)
            assert address in (None, total.data_ptr())
            address = total.data_ptr()
            np.testing.assert_allclose(total.numpy(), count * (x.T @ y), rtol=1e-5, atol=1e-5)


def test_mistakes_of_a_product_that_is_added():
    x, y, total = (paddle.zeros(shape) for shape in ([3, 4], [4, 5], [3, 5]))
    for given, expected in (
        ([x, y, paddle.zeros([3, 4])], r"sum must have shape \[3, 5\], got \[3, 4\]"),
        ([x, x, total], "x has 4 columns, but y has 3 rows"),
        ([x, y, total.astype("float64")], "sum must be float32"),
        ([x.astype("float16"), y, total], "x must be float32"),
    ):
        with pytest.raises(ValueError, match=expected):
            custom_op("pypkg_add_matmul", *given, False, False)


def test_which_products_can_be_added(monkeypatch):
    x = paddle.zeros([2, 2])
    assert matmul.can_add_matmul(x)
    assert not matmul.can_add_matmul(x.astype("float64"))
    with monkeypatch.context() as patch:
        patch.setattr(matmul, "_precision", "bfloat16")
        assert not matmul.can_add_matmul(x)
    with monkeypatch.context() as patch:
        patch.setattr(matmul, "backend", lambda: "reference")
        assert not matmul.can_add_matmul(x)

    def missing(*arguments):
        raise RuntimeError("cblas_sgemm is missing")

    monkeypatch.setattr(matmul, "run_compiled", missing)
    matmul._has_blas.cache_clear()
    assert not matmul.can_add_matmul(x)
    matmul._has_blas.cache_clear()
