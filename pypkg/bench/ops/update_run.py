"""Baselines of an optimizer step, validated against its reference."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from pypkg.bench.ops.accuracy import checked_error, tolerance
from pypkg.bench.ops.case import Baseline, Inputs, Update, UpdateShape
from pypkg.bench.ops.frameworks import Framework
from pypkg.bench.ops.work import STEP

# Elements that are compared at a time: a layer of a large model in float64 would fill the memory.
_SLICE = 2**20


def update_runs(
    update: Update,
    baselines: Sequence[Baseline],
    shape: UpdateShape,
    dtype: str,
    frameworks: Mapping[str, Framework],
) -> tuple[dict[str, UpdateRun], dict[str, float]]:
    """The baselines by name, after one step, and the largest error of each over its tolerance.

    Raises:
        BenchmarkError: a tensor after the step differs from the reference.
    """
    rng = np.random.default_rng(0)
    inputs = [update.inputs(rng, each, dtype) for each in shape.parameters]
    runs = [
        UpdateRun(update, each, frameworks[each.framework], inputs, dtype) for each in baselines
    ]
    for run in runs:
        run.seconds()
    errors = dict.fromkeys((each.name for each in baselines), 0.0)
    case = f"{update.name}, {shape.label}"
    for number, part, expected in _expected(update, shape, inputs, dtype, frameworks["paddle"]):
        for run in runs:
            error = run.error(expected, number, part, case)
            errors[run.baseline.name] = max(errors[run.baseline.name], error)
    return {run.baseline.name: run for run in runs}, errors


def _expected(
    update: Update, shape: UpdateShape, inputs: Sequence[Inputs], dtype: str, paddle: Framework
) -> Iterator[tuple[int, slice, Inputs]]:
    """Of the reference after a step: number of the parameter, slice of it, and values by kind."""
    for number, (arrays, full) in enumerate(zip(inputs, shape.parameters)):
        for start in range(0, math.prod(full), _SLICE):
            part = slice(start, start + _SLICE)
            exact = {
                kind: paddle.array(
                    paddle.tensor(array.reshape(-1)[part], update.dtype(kind, dtype))
                )
                for kind, array in arrays.items()
            }
            yield number, part, update.reference(exact, full)


class UpdateRun:
    """A baseline with its tensors, ready to run."""

    def __init__(
        self,
        update: Update,
        baseline: Baseline,
        framework: Framework,
        inputs: Sequence[Inputs],
        dtype: str,
    ) -> None:
        self.baseline = baseline
        self._update, self._framework, self._dtype = update, framework, dtype
        self._tensors = {
            kind: [
                framework.tensor(arrays[kind], update.dtype(kind, dtype)).detach()
                for arrays in inputs
            ]
            for kind in inputs[0]
        }
        self._step = baseline.function(self._tensors)

    def seconds(self) -> dict[str, float]:
        """Of one step."""
        self._framework.synchronize()
        start = time.perf_counter()
        self._step()
        self._framework.synchronize()
        return {STEP: time.perf_counter() - start}

    def error(self, expected: Inputs, number: int, part: slice, case: str) -> float:
        """The largest error of any kind in a part of a parameter."""
        errors = []
        for kind, values in expected.items():
            precision = self._update.dtype(kind, self._dtype)
            allowed = tolerance(self.baseline, precision, self._update.bfloat16_tolerance)
            actual = self._framework.array(self._tensors[kind][number].flatten()[part])
            who = {"case": f"{case}, {self._dtype}", "baseline": self.baseline.name}
            errors.append(checked_error(actual, values, allowed, part=f"{kind} {number}", **who))
        return max(errors)
