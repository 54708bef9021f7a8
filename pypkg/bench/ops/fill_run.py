"""Validation and timing of operators that overwrite a tensor with normal random numbers."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pypkg.bench.ops.case import Baseline, BenchmarkCase, BenchmarkError
from pypkg.bench.ops.frameworks import Framework
from pypkg.bench.ops.work import FILL

# Elements compared at a time. A matrix of a large model in float64 would fill the memory.
_SLICE = 2**20
# The mean and the variance of z, |z|, z^2, z^3 and z^4, where z is normal.
_MOMENTS = {
    "mean": (0.0, 1.0),
    "mean magnitude": (math.sqrt(2 / math.pi), 1 - 2 / math.pi),
    "mean square": (1.0, 2.0),
    "mean cube": (0.0, 15.0),
    "mean fourth power": (3.0, 96.0),
}
_STANDARD_ERRORS = 6.0  # a correct generator exceeds this once in 5 x 10^8
_FLOAT32_ROUNDING = 1e-6  # of a moment; rounding to bfloat16 adds less than its random error


@dataclass(frozen=True)
class NormalFill:
    """Runs operators that overwrite a tensor with normal numbers of mean 0.

    The function of a baseline gets the tensor. Baselines make different numbers, so validation
    compares their moments with those of the normal distribution.

    Args:
        shape: shape of the tensor, which has the dtype of the case.
        deviation: the standard deviation that the functions are asked for.
    """

    shape: tuple[int, ...]
    deviation: float

    def prepare(
        self,
        case: BenchmarkCase[Any],
        baselines: Sequence[Baseline],
        frameworks: Mapping[str, Framework],
    ) -> tuple[dict[str, FillRun], dict[str, float]]:
        """The baselines, validated and ready to run, and the largest error of each.

        Errors are relative to what is allowed.

        Raises:
            BenchmarkError: a moment differs from that of the normal distribution.
        """
        runs, errors = {}, {}
        for baseline in baselines:
            run = FillRun(self, baseline, frameworks[baseline.framework], case.dtype)
            run.seconds()
            errors[baseline.name] = _checked_error(run.slices(), self.deviation, baseline, case)
            runs[baseline.name] = run
        return runs, errors


class FillRun:
    """A baseline and its tensor, ready to run."""

    def __init__(
        self, fill: NormalFill, baseline: Baseline, framework: Framework, dtype: str
    ) -> None:
        self._function, self._framework = baseline.function, framework
        nothing = np.full(fill.shape, np.nan, np.float32)
        self._tensor = framework.tensor(nothing, dtype).detach()

    def seconds(self) -> dict[str, float]:
        """Runs once; returns the seconds."""
        self._framework.synchronize()
        start = time.perf_counter()
        self._function(self._tensor)
        self._framework.synchronize()
        return {FILL: time.perf_counter() - start}

    def slices(self) -> Iterator[np.ndarray]:
        """The numbers in float64, some at a time."""
        flat = self._tensor.flatten()
        for start in range(0, flat.shape[0], _SLICE):
            yield self._framework.array(flat[start : start + _SLICE])


def _checked_error(
    slices: Iterator[np.ndarray], deviation: float, baseline: Baseline, case: BenchmarkCase[Any]
) -> float:
    """The largest error of a moment, divided by what is allowed."""
    count, sums = 0, np.zeros(len(_MOMENTS))
    for values in slices:
        z = values / deviation
        square = z * z
        count += z.size
        sums += [each.sum() for each in (z, np.abs(z), square, square * z, square * square)]
    errors = [
        abs(total / count - mean)
        / (_STANDARD_ERRORS * math.sqrt(variance / count) + _FLOAT32_ROUNDING)
        for total, (mean, variance) in zip(sums, _MOMENTS.values())
    ]
    for name, error in zip(_MOMENTS, errors):
        if not error <= 1.0:
            raise BenchmarkError(
                f"{case.op}, {case.shape}, {case.dtype}: {baseline.name} is wrong in its {name}: "
                f"the error is {error:.3g} times what is allowed. Nothing is timed."
            )
    return max(errors)
