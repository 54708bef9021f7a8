from __future__ import annotations

import numpy as np
import pytest
from kernel_testing import DTYPES, arg, assert_close, load, poisoned, store

from pypkg import _native

SHAPES = [(1, 1), (1, 8), (3, 760), (2, 1128), (70, 100)]
EPSILON = 1e-5


def forward(x, weight, residual=None):
    dtype = "float32" if x.dtype == np.float32 else "bfloat16"
    y, rstd = poisoned(x.shape, dtype), poisoned(x.shape[:1])
    h = None if residual is None else poisoned(x.shape, dtype)
    _native.rms_norm_forward(
        arg(x), arg(weight), arg(y), rstd, arg(residual), arg(h), epsilon=EPSILON
    )
    return y, rstd, h


def backward(dy, h, weight, rstd, dh=None, dx=None):
    dtype = "float32" if h.dtype == np.float32 else "bfloat16"
    dx = poisoned(h.shape, dtype) if dx is None else dx
    dweight = np.full_like(weight, 0x7FC0 if weight.dtype == np.uint16 else np.nan)
    workspace = poisoned((_native.rms_norm_backward_workspace(arg(h)),))
    _native.rms_norm_backward(
        arg(dy), arg(h), arg(weight), rstd, arg(dx), arg(dweight), workspace, arg(dh)
    )
    return dx, dweight


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("weight_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_float64(rng, shape, dtype, weight_dtype, with_residual):
    if dtype == "float32" and weight_dtype == "bfloat16":
        return  # not offered; see test_weight_dtype_is_checked
    x = store(rng.normal(0.3, 2.0, shape), dtype)
    residual = store(rng.normal(size=shape), dtype) if with_residual else None
    weight = store(rng.normal(1.0, 0.2, shape[1]), weight_dtype)
    y, rstd, h = forward(x, weight, residual)

    # The sum is rounded to its dtype first, and it is the rounded sum that is normalised.
    expected_h = x if residual is None else store(load(x) + load(residual), dtype)
    if with_residual:
        np.testing.assert_array_equal(h, expected_h)
    h64, w64 = load(expected_h), load(weight)
    expected_rstd = 1 / np.sqrt(np.mean(h64**2, axis=1) + EPSILON)
    assert_close(rstd, expected_rstd)
    assert_close(y, h64 * expected_rstd[:, None] * w64)

    dy = store(rng.normal(size=shape), dtype)
    dh = store(rng.normal(size=shape), dtype) if with_residual else None
    dx, dweight = backward(dy, expected_h, weight, rstd, dh)
    r = load(rstd)[:, None]
    dyw = load(dy) * w64
    expected_dx = r * (dyw - h64 * r**2 * np.mean(dyw * h64, axis=1, keepdims=True))
    if with_residual:
        expected_dx += load(dh)
    if shape[1] > 1:  # with one column the two terms of dx cancel to rounding
        assert_close(dx, expected_dx)
    assert_close(dweight, np.sum(load(dy) * h64 * r, axis=0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_dx_may_be_dy_or_dh(rng, dtype):
    shape = (5, 96)
    h, dy, dh = (store(rng.normal(size=shape), dtype) for _ in range(3))
    weight = store(rng.normal(size=96), dtype)
    _, rstd, _ = forward(h, weight)
    expected, expected_dweight = backward(dy, h, weight, rstd, dh)
    for target in ("dy", "dh"):
        arrays = {"dy": dy.copy(), "dh": dh.copy()}
        dx, dweight = backward(arrays["dy"], h, weight, rstd, arrays["dh"], dx=arrays[target])
        np.testing.assert_array_equal(dx, expected)
        np.testing.assert_array_equal(dweight, expected_dweight)


def test_results_do_not_depend_on_threads(rng, every_thread_count):
    h, dy = (store(rng.normal(size=(200, 33)), "float32") for _ in range(2))
    weight = store(rng.normal(size=33), "float32")
    results = []
    for count in every_thread_count:
        _native.set_num_threads(count)
        y, rstd, _ = forward(h, weight)
        results.append([y, rstd, *backward(dy, h, weight, rstd)])
    for other in results[1:]:
        for a, b in zip(results[0], other):
            np.testing.assert_array_equal(a, b)


def test_weight_dtype_is_checked(rng):
    x, weight = store(rng.normal(size=(2, 8)), "float32"), store(np.ones(8), "bfloat16")
    with pytest.raises(ValueError, match=r"weight dtype bfloat16 must be float32 or that of x"):
        forward(x, weight)


def test_float16_is_refused():
    x, w = np.ones((2, 8), np.float16), np.ones(8, np.float32)
    with pytest.raises(ValueError, match="float16 is not supported on CPU"):
        _native.rms_norm_forward(x, w, x.copy(), poisoned((2,)))


def test_no_rows():
    y, _, _ = forward(np.zeros((0, 8), np.float32), np.ones(8, np.float32))
    assert y.shape == (0, 8)
    _, dweight = backward(y, y, np.ones(8, np.float32), np.zeros(0, np.float32))
    np.testing.assert_array_equal(dweight, 0.0)
