from __future__ import annotations

import numpy as np
import paddle
import pytest
from op_testing import as_float64, check_against_reference, parameter, random, run

from pypkg.ops import rms_norm, rms_norm_reference

# One row, one column, sizes that are no multiple of a vector, more than two dimensions, no rows.
SHAPES = [(1, 1), (1, 760), (3, 1128), (2, 5, 64), (300, 17), (0, 8)]


def test_reference_is_the_formula():
    x, residual, weight = random((4, 10), 0), random((4, 10), 1), random((10,), 2)
    h = x + residual
    expected = h / np.sqrt((h**2).mean(axis=1, keepdims=True) + 1e-3) * weight
    tensors = [paddle.to_tensor(each) for each in (x, weight, residual)]
    y, residual_out = rms_norm_reference(tensors[0], tensors[1], 1e-3, tensors[2])
    np.testing.assert_allclose(y.numpy(), expected, rtol=1e-12)
    np.testing.assert_allclose(residual_out.numpy(), h, rtol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("with_residual", [False, True])
def test_values_and_gradients(each_backend, shape, with_residual):
    arrays = [random(shape, 0, 2.0), random(shape[-1:], 1)]
    if with_residual:
        arrays.append(random(shape, 2))
    check_against_reference(
        lambda x, w, r=None: rms_norm(x, w, 1e-5, r),
        lambda x, w, r=None: rms_norm_reference(x, w, 1e-5, r),
        arrays,
    )


@pytest.mark.parametrize("weight_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("with_residual", [False, True])
def test_bfloat16(each_backend, weight_dtype, with_residual):
    """With a residual h is rounded before it is normalised, once more than in the reference."""
    arrays = [random((6, 760), 0), random((760,), 1)] + [random((6, 760), 2)] * with_residual
    dtypes = ["bfloat16", weight_dtype] + ["bfloat16"] * with_residual
    check_against_reference(
        lambda x, w, r=None: rms_norm(x, w, 1e-5, r),
        lambda x, w, r=None: rms_norm_reference(x, w, 1e-5, r),
        arrays,
        dtypes,
    )


@pytest.mark.parametrize("used", [0, 1])
def test_one_output_used(each_backend, used):
    arrays = [random((3, 40), 0), random((40,), 1), random((3, 40), 2)]

    def only(function):
        def call(x, w, r):
            # The weight has no gradient through h alone, so it gets one of its own.
            return function(x, w, 1e-6, r)[used] + 0 * w

        return call

    check_against_reference(only(rms_norm), only(rms_norm_reference), arrays)


@pytest.mark.parametrize("first", [True, False])
def test_gradients_of_x_and_residual_are_apart(each_backend, first):
    """Each may get more gradient from elsewhere, which must not reach the other."""
    arrays = [random((3, 16), 0), random((16,), 1), random((3, 16), 2)]

    def with_other_uses(function):
        def call(x, w, r):
            a, b = x * 1.0, r * 1.0
            other = a * a + b * b * b
            y, h = function(a, w, 1e-6, b)
            return other + y + h if first else y + h + other

        return call

    check_against_reference(with_other_uses(rms_norm), with_other_uses(rms_norm_reference), arrays)


def test_residual_may_be_x_itself(each_backend):
    arrays = [random((3, 16), 0), random((16,), 1)]
    check_against_reference(
        lambda x, w: rms_norm(x, w, 1e-6, x), lambda x, w: rms_norm_reference(x, w, 1e-6, x), arrays
    )


def test_rows_of_zeros_and_of_large_values(compiled):
    x = parameter(np.concatenate([np.zeros((1, 32)), np.full((1, 32), 1e15)]))
    (y,), (dx, _) = run(lambda x, w: rms_norm(x, w), [x, parameter(np.ones(32))])
    np.testing.assert_array_equal(y[0], 0.0)
    np.testing.assert_allclose(y[1], 1.0, rtol=1e-6)
    assert np.isfinite(dx).all()


def test_float64_runs_on_the_reference(compiled):
    x = paddle.to_tensor(random((2, 8), 0))
    y = rms_norm(x, paddle.ones([8], "float64"))
    assert y.dtype == paddle.float64
    np.testing.assert_array_equal(
        as_float64(y), as_float64(rms_norm_reference(x, paddle.ones([8], "float64")))
    )


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"weight": paddle.ones([7])}, ValueError, r"weight must have shape \[8\], got \[7\]"),
        (
            {"weight": paddle.ones([8], "bfloat16")},
            TypeError,
            "weight must be float32 or float32, got bfloat16|weight must be float32, got bfloat16",
        ),
        ({"x": paddle.ones([2, 8], "int64")}, TypeError, "x must be float32 or .*, got int64"),
        (
            {"residual": paddle.ones([3, 8])},
            ValueError,
            r"residual must have shape \[2, 8\], got \[3, 8\]",
        ),
        (
            {"residual": paddle.ones([2, 8], "bfloat16")},
            TypeError,
            "residual must be float32, got bfloat16",
        ),
    ],
)
def test_wrong_inputs(each_backend, arguments, error, message):
    good = {"x": paddle.ones([2, 8]), "weight": paddle.ones([8])}
    with pytest.raises(error, match="rms_norm: (" + message + ")"):
        rms_norm(**{**good, **arguments})


def test_glue_checks_too(compiled):
    with pytest.raises(ValueError, match=r"weight must have shape \[8\], got \[7\]"):
        paddle._C_ops._run_custom_op("pypkg_rms_norm", paddle.ones([2, 8]), paddle.ones([7]), 1e-6)
