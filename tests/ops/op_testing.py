"""Helpers of the operators' tests: inputs, gradients and the comparison with a reference.

The reference runs in float64 on the very values that the operator gets (rounded to its dtype), so
all of the difference is the operator's. An error is measured against the largest expected value:
the terms of a sum have about its size, and float32 sums of a few thousand terms in any order stay
within TOLERANCE of it. For bfloat16 and float16 it is one or two roundings of the result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import paddle

TOLERANCE = {"float32": 5e-6, "bfloat16": 2.0**-7, "float16": 2.0**-10}


def random(shape: Sequence[int], seed: int, scale: float = 1.0) -> np.ndarray:
    return scale * np.random.default_rng(seed).standard_normal(tuple(shape))


def parameter(values: np.ndarray, dtype: str = "float32") -> paddle.Tensor:
    """A leaf tensor that wants a gradient."""
    tensor = paddle.to_tensor(np.asarray(values, dtype="float64")).astype(dtype)
    tensor.stop_gradient = False
    return tensor


def as_float64(tensor: paddle.Tensor) -> np.ndarray:
    return tensor.astype("float64").numpy()


def run(
    function: Callable,
    inputs: Sequence[paddle.Tensor],
    cotangent_seed: int = 99,
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The outputs of function(*inputs) and the gradients of a random weighted sum of them."""
    results = function(*inputs)
    outputs = list(results) if isinstance(results, tuple) else [results]
    outputs = [output for output in outputs if not output.stop_gradient]
    cotangents = []
    for i, output in enumerate(outputs):
        values = random(output.shape, cotangent_seed + i)
        cotangents.append(paddle.to_tensor(values.astype("float32")).astype(output.dtype))
    values = [as_float64(output.detach()) for output in outputs]
    paddle.autograd.backward(outputs, cotangents)
    return values, [as_float64(each.grad) for each in inputs]


def assert_close(got: np.ndarray, expected: np.ndarray, tolerance: float, what: str) -> None:
    assert got.shape == expected.shape, f"{what}: shape {got.shape}, expected {expected.shape}"
    if expected.size == 0:
        return
    largest = max(np.abs(expected).max(), 1.0)
    error = np.abs(got - expected).max() / largest
    assert error <= tolerance, f"{what}: error {error:.2e} of the largest value, {tolerance:.2e}"


def check_against_reference(
    function: Callable,
    reference: Callable,
    arrays: Sequence[np.ndarray],
    dtypes: Sequence[str] | str = "float32",
    tolerance: float | None = None,
) -> None:
    """Outputs and gradients of ``function`` in ``dtypes`` against ``reference`` in float64.

    The first dtype sets the tolerance; cotangents are the same numbers for both.
    """
    dtypes = [dtypes] * len(arrays) if isinstance(dtypes, str) else dtypes
    tolerance = tolerance or TOLERANCE[dtypes[0]]
    inputs = [parameter(array, dtype) for array, dtype in zip(arrays, dtypes)]
    exact = [parameter(as_float64(each), "float64") for each in inputs]
    outputs, gradients = run(function, inputs)
    expected_outputs, expected_gradients = run(reference, exact)
    for i, (got, expected) in enumerate(zip(outputs, expected_outputs, strict=True)):
        assert_close(got, expected, tolerance, f"output {i}")
    for i, (got, expected) in enumerate(zip(gradients, expected_gradients, strict=True)):
        assert_close(got, expected, tolerance, f"gradient of input {i}")
