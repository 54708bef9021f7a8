"""Validation and timing of optimizer steps."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pypkg.bench.ops.accuracy import checked_error, tolerance
from pypkg.bench.ops.case import Baseline, BenchmarkCase, Inputs
from pypkg.bench.ops.frameworks import Framework
from pypkg.bench.ops.work import STEP

# Elements compared at a time. A whole layer of a large model in float64 would fill the memory.
_SLICE = 2**20


@dataclass(frozen=True)
class InPlaceUpdate:
    """Runs an optimizer step, which updates many tensors in place.

    The function of a baseline takes a list of tensors per kind, by name, and returns the step: a
    function without arguments that updates these tensors. Tensors are validated after the first
    step; timed steps continue from there.

    Args:
        parameters: shapes of the parameters.
        inputs: creates the float32 arrays of one parameter, by kind, from a generator, the shape of
            the parameter and the dtype of the case.
        rounded: the kinds that have the dtype of the case; all others are float32.
        reference: values of one parameter after a step, by kind, given slices of its flattened
            inputs in float64 and its shape.
    """

    parameters: tuple[tuple[int, ...], ...]
    inputs: Callable[[np.random.Generator, tuple[int, ...], str], Inputs]
    rounded: tuple[str, ...]
    reference: Callable[[Inputs, tuple[int, ...]], Inputs]

    def dtype(self, kind: str, of_case: str) -> str:
        """The dtype of the tensors of a kind."""
        return of_case if kind in self.rounded else "float32"

    def prepare(
        self,
        case: BenchmarkCase[Any],
        baselines: Sequence[Baseline],
        frameworks: Mapping[str, Framework],
    ) -> tuple[dict[str, UpdateRun], dict[str, float]]:
        """The baselines after one step, ready to run, and the largest error of each.

        Errors are relative to the tolerance.

        Raises:
            BenchmarkError: a tensor after the step differs from the reference.
        """
        rng = np.random.default_rng(0)
        inputs = [self.inputs(rng, each, case.dtype) for each in self.parameters]
        runs = [
            UpdateRun(self, each, frameworks[each.framework], inputs, case.dtype)
            for each in baselines
        ]
        for run in runs:
            run.seconds()
        errors = dict.fromkeys((each.name for each in baselines), 0.0)
        for number, part, expected in _expected(self, inputs, case.dtype, frameworks["paddle"]):
            for run in runs:
                error = run.error(expected, number, part, case)
                errors[run.baseline.name] = max(errors[run.baseline.name], error)
        return {run.baseline.name: run for run in runs}, errors


def _expected(
    update: InPlaceUpdate, inputs: Sequence[Inputs], dtype: str, paddle: Framework
) -> Iterator[tuple[int, slice, Inputs]]:
    """Yields (number of a parameter, slice of it, values by kind) of the reference after a step."""
    for number, (arrays, full) in enumerate(zip(inputs, update.parameters)):
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
    """A baseline and its tensors, ready to run."""

    def __init__(
        self,
        update: InPlaceUpdate,
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
        """Runs once; returns the seconds of the step."""
        self._framework.synchronize()
        start = time.perf_counter()
        self._step()
        self._framework.synchronize()
        return {STEP: time.perf_counter() - start}

    def error(self, expected: Inputs, number: int, part: slice, case: BenchmarkCase[Any]) -> float:
        """The largest error of any kind in a part of a parameter, relative to the tolerance."""
        errors = []
        for kind, values in expected.items():
            precision = self._update.dtype(kind, self._dtype)
            allowed = tolerance(self.baseline, precision, case.bfloat16_tolerance)
            actual = self._framework.array(self._tensors[kind][number].flatten()[part])
            who = {"case": f"{case.op}, {case.shape}, {case.dtype}", "baseline": self.baseline.name}
            errors.append(checked_error(actual, values, allowed, part=f"{kind} {number}", **who))
        return max(errors)
