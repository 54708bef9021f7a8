"""Validation and timing of operators with gradients."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pypkg.bench.ops.accuracy import checked_error, tolerance
from pypkg.bench.ops.case import Baseline, BenchmarkCase, Inputs
from pypkg.bench.ops.frameworks import Framework
from pypkg.bench.ops.work import PASSES


@dataclass(frozen=True)
class Differentiated:
    """Runs an operator forward and backward; the function of a baseline takes the inputs by name.

    A function returns a tensor or a tuple of tensors. Outputs and gradients are validated.

    Args:
        inputs: creates float32 and integer arrays by name, from a generator.
        gradients: names of the inputs that get a gradient. They have the dtype of the case; other
            inputs keep their own.
        reference: the operator in any precision, on Paddle tensors; validation runs it in float64.
        overwritten: names of the inputs whose memory a baseline may overwrite; each run gets fresh
            ones.
    """

    inputs: Callable[[np.random.Generator], Inputs]
    gradients: tuple[str, ...]
    reference: Callable
    overwritten: tuple[str, ...] = ()

    def prepare(
        self,
        case: BenchmarkCase[Any],
        baselines: Sequence[Baseline],
        frameworks: Mapping[str, Framework],
    ) -> tuple[dict[str, OperatorRun], dict[str, float]]:
        """The baselines, validated and ready to run, and the largest error of each.

        Errors are relative to the tolerance.

        Raises:
            BenchmarkError: an output or gradient differs from the reference.
        """
        inputs = self.inputs(np.random.default_rng(0))
        expected = _expected(self, inputs, case.dtype, frameworks["paddle"])
        runs, errors = {}, {}
        for baseline in baselines:
            run = OperatorRun(self, baseline, frameworks[baseline.framework], inputs, case.dtype)
            errors[baseline.name] = _validate(run, expected, case)
            runs[baseline.name] = run
        return runs, errors


@dataclass(frozen=True)
class _Expected:
    outputs: list[np.ndarray]
    output_gradients: list[np.ndarray]
    gradients: list[np.ndarray]


def _expected(method: Differentiated, inputs: Inputs, dtype: str, paddle: Framework) -> _Expected:
    """Results of the reference in float64, for inputs that are rounded to ``dtype``."""

    def rounded(array: np.ndarray) -> np.ndarray:
        return paddle.array(paddle.tensor(array, dtype))

    tensors = {
        name: paddle.tensor(rounded(array), "float64")
        if name in method.gradients
        else paddle.tensor(array, None)
        for name, array in inputs.items()
    }
    outputs = _as_list(method.reference(**tensors))
    generator = np.random.default_rng(1)
    output_gradients = [
        rounded(np.asarray(generator.standard_normal(each.shape, dtype=np.float32)))
        for each in outputs
    ]
    gradients = paddle.gradients(
        outputs,
        [tensors[name] for name in method.gradients],
        [paddle.tensor(each, None) for each in output_gradients],
    )
    return _Expected(
        [paddle.array(each) for each in outputs],
        output_gradients,
        [paddle.array(each) for each in gradients],
    )


class OperatorRun:
    """A baseline and its tensors, ready to run."""

    def __init__(
        self,
        method: Differentiated,
        baseline: Baseline,
        framework: Framework,
        inputs: Inputs,
        dtype: str,
    ) -> None:
        self.method = method
        self.baseline = baseline
        self.framework = framework
        self.precision = baseline.precision or dtype
        tensors = baseline.tensors or dtype
        self._tensors = {
            name: framework.tensor(array, tensors if name in method.gradients else None)
            for name, array in inputs.items()
        }
        self._output_gradients: list[Any] = []

    def results(self, output_gradients: Sequence[np.ndarray]) -> tuple[list[Any], list[Any]]:
        """Outputs and gradients in float64. Later runs use the same output gradients."""
        tensors, wanted = self._inputs()
        outputs = _as_list(self.baseline.function(**tensors))
        # The backward pass may overwrite memory that an output shares, so outputs are read before.
        arrays = [self.framework.array(each) for each in outputs]
        self._output_gradients = [
            self.framework.tensor_like(array, output)
            for array, output in zip(output_gradients, outputs)
        ]
        gradients = self.framework.gradients(outputs, wanted, self._output_gradients)
        return arrays, [self.framework.array(each) for each in gradients]

    def seconds(self) -> dict[str, float]:
        """Runs once; returns the seconds of the forward and of the backward pass."""
        tensors, wanted = self._inputs()
        self.framework.synchronize()
        start = time.perf_counter()
        outputs = _as_list(self.baseline.function(**tensors))
        self.framework.synchronize()
        middle = time.perf_counter()
        gradients = self.framework.gradients(outputs, wanted, self._output_gradients)
        self.framework.synchronize()
        end = time.perf_counter()
        del outputs, gradients  # after the clock: freeing memory does not count
        return dict(zip(PASSES, (middle - start, end - middle)))

    def _inputs(self) -> tuple[dict[str, Any], list[Any]]:
        tensors = dict(self._tensors)
        for name in self.method.overwritten:
            tensors[name] = self.framework.fresh(tensors[name])
        return tensors, [tensors[name] for name in self.method.gradients]


def _validate(run: OperatorRun, expected: _Expected, case: BenchmarkCase[Any]) -> float:
    """The largest error of any output or gradient, relative to the tolerance."""
    allowed = tolerance(run.baseline, run.precision, case.bfloat16_tolerance)
    outputs, gradients = run.results(expected.output_gradients)
    names = [f"output {number}" for number in range(len(outputs))]
    names += [f"gradient of {name}" for name in run.method.gradients]
    who = {"case": f"{case.op}, {case.shape}, {run.precision}", "baseline": run.baseline.name}
    return max(
        checked_error(actual, wanted, allowed, part=name, **who)
        for name, actual, wanted in zip(
            names, [*outputs, *gradients], [*expected.outputs, *expected.gradients]
        )
    )


def _as_list(outputs: Any) -> list[Any]:
    return list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]
