"""squared_l2_norm against float64."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

from pypkg import _native, ops

SHAPES = [(1,), (760,), (3, 1128), (17, 31, 19), (8192,), (8193,), (2, 0), ()]


def tensors(dtype: str) -> list[paddle.Tensor]:
    rng = np.random.default_rng(0)
    return [paddle.to_tensor(rng.standard_normal(s), "float32").astype(dtype) for s in SHAPES]


def exact(values: list[paddle.Tensor]) -> float:
    return sum(float((each.astype("float64").numpy() ** 2).sum()) for each in values)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_against_float64(each_backend, dtype):
    values = tensors(dtype)
    total = ops.squared_l2_norm(values)
    assert total.shape == [1]
    assert total.dtype == (paddle.float64 if dtype == "float64" else paddle.float32)
    # Ours: float32 sums of at most 64 terms join a float64, and the total is rounded once. Paddle's
    # kernel, which the other backends call, has float32 sums of thousands of terms.
    rel = 2e-7 if each_backend == "compiled" and dtype in ("float32", "bfloat16") else 2e-6
    assert total.item() == pytest.approx(exact(values), rel=rel)


def test_several_dtypes_and_tensors_that_are_not_contiguous(each_backend):
    values = [*tensors("float32"), *tensors("bfloat16"), tensors("float32")[2].T]
    assert ops.squared_l2_norm(values).item() == pytest.approx(exact(values), rel=2e-6)
    columns = [tensors("float32")[2][:, ::3]]
    assert ops.squared_l2_norm(columns).item() == pytest.approx(exact(columns), rel=2e-6)


def test_of_nothing_it_is_zero(each_backend):
    assert ops.squared_l2_norm([]).item() == 0.0


def test_what_is_not_finite_shows(each_backend):
    assert np.isnan(ops.squared_l2_norm([paddle.ones([9000]), paddle.to_tensor([np.nan])]).item())
    assert np.isinf(ops.squared_l2_norm([paddle.full([2], 1e30)]).item())


def test_threads_do_not_matter(compiled):
    found = []
    for count in (1, 2, 3):
        _native.set_num_threads(count)
        found.append(ops.squared_l2_norm(tensors("float32")).item())
    _native.set_num_threads(0)
    assert len(set(found)) == 1


def test_wrong_dtype(each_backend):
    with pytest.raises(TypeError, match="tensors must be float32 or float16"):
        ops.squared_l2_norm([paddle.ones([2]), paddle.ones([2], "int32")])
