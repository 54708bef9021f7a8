"""Tolerances of the validation that precedes every timing."""

from __future__ import annotations

import math

import numpy as np

from pypkg.bench.ops.case import OURS, Baseline, BenchmarkError

# The rule is |result - reference| <= tolerance * (|reference| + m) for every value. m is the larger
# of the mean |reference| of its row (last axis) and of all values, because errors of values whose
# terms cancel are as large as those of their neighbours. In float32, sums of thousands of terms and
# exponentials lose some bits of 2^-24. bfloat16 has a tolerance per operator.
_FLOAT32_TOLERANCE = 5e-5
# Other baselines may store intermediate results in their dtype.
_BASELINE_SLACK = 8.0


def tolerance(baseline: Baseline, precision: str, bfloat16_tolerance: float) -> float:
    """The largest permitted relative error of a baseline in ``precision``."""
    allowed = bfloat16_tolerance if precision == "bfloat16" else _FLOAT32_TOLERANCE
    return allowed if baseline.name == OURS else allowed * _BASELINE_SLACK


def checked_error(
    actual: np.ndarray,
    expected: np.ndarray,
    allowed: float,
    *,
    case: str,
    baseline: str,
    part: str,
) -> float:
    """The largest error of any value, divided by ``allowed``.

    Args:
        part: the name of this result.

    Raises:
        BenchmarkError: the error is above 1, or NaN.
    """
    error = math.inf
    if actual.shape == expected.shape:
        error = float((np.abs(actual - expected) / (allowed * _magnitude(expected))).max())
    if not error <= 1.0:
        raise BenchmarkError(
            f"{case}: {baseline} is wrong in its {part}: the largest error is {error:.3g} times "
            "what is allowed. Nothing is timed."
        )
    return error


def _magnitude(values: np.ndarray) -> np.ndarray:
    size = np.abs(values)
    row = size.mean(axis=-1, keepdims=True) if size.ndim else size
    return size + np.maximum(row, size.mean())
