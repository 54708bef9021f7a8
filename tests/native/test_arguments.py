"""How arrays reach the kernels, and what is said when they do not fit."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from kernel_testing import poisoned, store

from pypkg import _native


def norm(x, weight=None, y=None, rstd=None, **options):
    weight = np.ones(8, np.float32) if weight is None else weight
    y = poisoned((2, 8)) if y is None else y
    rstd = poisoned((2,)) if rstd is None else rstd
    _native.rms_norm_forward(x, weight, y, rstd, **options)
    return y


X = np.arange(16, dtype=np.float32).reshape(2, 8)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"weight": np.ones(7, np.float32)}, r"weight has shape \[7\], expected \[cols = 8\]"),
        ({"weight": np.ones((8, 1), np.float32)}, r"shape \[8, 1\], expected \[cols = 8\]"),
        ({"y": poisoned((3, 8))}, r"y has shape \[3, 8\], expected \[rows = 2, cols = 8\]"),
        ({"x": X[0]}, r"x has shape \[8\], expected \[rows, cols\]"),
        ({"rstd": np.ones(2)}, "rstd has dtype float64, expected float32"),
        ({"x": X.astype(np.int32)}, "x has dtype int32, expected float32, float16 or bfloat16"),
        ({"y": np.ones((2, 8), np.float16)}, "y has dtype float16, expected float32"),
        ({"x": np.ones((8, 2), np.float32).T}, r"x must be contiguous \(row-major\)"),
        ({"x": np.ones((2, 16), np.float32)[:, ::2]}, "x must be contiguous"),
        ({"residual": X}, "residual and residual_out go together"),
        ({"x": (X.ctypes.data, (2, 8), "float32")}, "address, shape, dtype, device.* got 3 items"),
        ({"x": (X.ctypes.data, (2, 8), "float32", "tpu")}, "'cpu' or 'cuda', got 'tpu'"),
        ({"y": (X.ctypes.data, (2, 8), "float32", "cuda")}, "y is on cuda device 0, expected cpu"),
    ],
)
def test_what_does_not_fit_is_named(arguments, message):
    with pytest.raises(ValueError, match=f"rms_norm_forward: .*{message}|{message}"):
        norm(**{"x": X, **arguments})


def test_not_an_array():
    with pytest.raises(TypeError, match=r"x must be an array .* got <class 'list'>"):
        norm([[1.0] * 8] * 2)


def test_workspace_too_small():
    rstd = np.ones(2, np.float32)
    weight = np.ones(8, np.float32)
    needed = _native.rms_norm_backward_workspace(X)
    with pytest.raises(ValueError, match=f"at least {needed} float32, got {needed - 1}"):
        _native.rms_norm_backward(
            X, X, weight, rstd, X.copy(), weight.copy(), poisoned((needed - 1,))
        )


@pytest.mark.skipif(
    _native.build_info()["cuda_architectures"] is not None, reason="about builds without CUDA"
)
def test_cuda_array_without_cuda():
    arrays = [(0, shape, "float32", "cuda") for shape in ((2, 8), (8,), (2, 8), (2,))]
    with pytest.raises(ValueError, match="built without CUDA"):
        _native.rms_norm_forward(*arrays)


def test_raw_descriptor_equals_dlpack():
    expected = norm(X)
    y = poisoned((2, 8))
    norm((X.ctypes.data, X.shape, "float32", "cpu"), y=(y.ctypes.data, (2, 8), "float32", "cpu"))
    np.testing.assert_array_equal(y, expected)


def test_bfloat16_by_dlpack():
    """From a library that has bfloat16, here Paddle, in a process of its own."""
    program = """
import numpy as np, paddle
from pypkg import _native
x = paddle.arange(16, dtype="float32").reshape([2, 8]).astype("bfloat16")
y, weight, rstd = paddle.zeros_like(x), paddle.ones([8]), paddle.zeros([2])
_native.rms_norm_forward(x, weight, y, rstd)
print(" ".join(str(bits) for bits in y.numpy().reshape(-1).tolist()))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    x = store(X, "bfloat16")
    y = poisoned((2, 8), "bfloat16")
    norm((x.ctypes.data, (2, 8), "bfloat16", "cpu"), y=(y.ctypes.data, (2, 8), "bfloat16", "cpu"))
    expected = " ".join(str(bits) for bits in y.reshape(-1).tolist())
    assert done.stdout.strip().splitlines()[-1] == expected


def test_thread_count():
    default = _native.num_threads()
    assert default >= 1
    _native.set_num_threads(3)
    assert _native.num_threads() == 3
    _native.set_num_threads(0)
    assert _native.num_threads() == default


def test_thread_count_from_the_environment():
    program = "from pypkg import _native; print(_native.num_threads())"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={"PYPKG_NUM_THREADS": "5", "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "5"


def test_import_does_not_import_paddle():
    program = "import sys, pypkg._native; print('paddle' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr
