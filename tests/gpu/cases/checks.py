"""Checks of every kernel, forward and backward, against float64: the same on a GPU, under the
emulation of CUDA and for the CPU kernels.

A check draws inputs, runs a kernel on outputs filled with NaN and yields comparisons. The error of
an element is relative to its size plus that of typical ones, so that one wrong element cannot hide
among many right ones. Tolerances count roundings: UNIT is the relative error
of one rounding to the dtype; what is computed in float32 adds FLOAT32_ERROR.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

UNIT = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
FLOAT32_ERROR = 2e-5
DTYPES = tuple(UNIT)
CPU_DTYPES = ("float32", "bfloat16")  # what the CPU kernels take


class Backend(Protocol):
    """Arrays of one device, and the kernels that run on it."""

    kernels: Any  # pypkg._native or a module like it
    stream: int

    def array(self, values: np.ndarray, dtype: str, misaligned: bool = False) -> Any:
        """A copy of the values on the device; misaligned: not at a multiple of 16 bytes."""

    def poisoned(self, shape: tuple[int, ...], dtype: str, misaligned: bool = False) -> Any:
        """An array of NaN."""

    def columns(self, array: Any, start: int, stop: int) -> Any:
        """A view of columns of a matrix."""

    def numpy(self, array: Any) -> np.ndarray:
        """Values as float64, integers as int64."""


@dataclass(frozen=True)
class Comparison:
    what: str
    actual: np.ndarray
    expected: np.ndarray
    tolerance: float
    averaging: float = 1  # how many times smaller the error of the whole must be, in the 2-norm
    term: float | np.ndarray = 0  # size of the sum's terms, where they may cancel; broadcast

    def error(self) -> float:
        """Largest error of an element, or `averaging` times that of the whole if that is larger;
        inf for NaN or infinities out of place."""
        actual, expected = self.actual, self.expected
        assert actual.shape == expected.shape, (self.what, actual.shape, expected.shape)
        finite = np.isfinite(expected)
        same = np.array_equal(actual[~finite], expected[~finite], equal_nan=True)
        if not same or not np.isfinite(actual[finite]).all():
            return float("inf")
        term = np.broadcast_to(self.term, expected.shape)[finite]
        actual, expected = actual[finite], expected[finite]
        difference = np.abs(actual - expected)
        if not difference.any():
            return 0.0
        typical = np.sqrt((expected**2).mean())
        element = (difference / (np.abs(expected) + np.maximum(typical, term) + 1e-30)).max()
        typical_term = np.sqrt((term**2).mean())
        whole = np.sqrt((difference**2).mean()) / (typical + 0.01 * typical_term + 1e-30)
        return float(max(element, self.averaging * whole))


@dataclass(frozen=True)
class Case:
    operation: str
    dtype: str
    label: str
    run: Callable[[Backend, np.random.Generator], Iterator[Comparison]]

    def __str__(self) -> str:
        return f"{self.operation}-{self.dtype}-{self.label}"


def check(case: Case, backend: Backend, seed: int = 0) -> float:
    """Runs a case; returns its largest error as a fraction of the tolerance."""
    worst = 0.0
    for comparison in case.run(backend, np.random.default_rng(seed)):
        error = comparison.error()
        if not error <= comparison.tolerance:
            what = f"{case}: {comparison.what}"
            raise AssertionError(
                f"{what} is off by {error:.2e}, allowed {comparison.tolerance:.2e}"
            )
        if error > 0:
            worst = max(worst, error / comparison.tolerance)
    return worst


def tolerance(dtype: str, roundings: float = 1) -> float:
    return roundings * UNIT[dtype] + FLOAT32_ERROR
