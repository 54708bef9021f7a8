"""Baselines of an operator with gradients, validated against its reference."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pypkg.bench.ops.accuracy import checked_error, tolerance
from pypkg.bench.ops.case import Baseline, Inputs, Operator, Shape
from pypkg.bench.ops.frameworks import Framework
from pypkg.bench.ops.work import PASSES


def operator_runs(
    operator: Operator,
    baselines: Sequence[Baseline],
    shape: Shape,
    dtype: str,
    frameworks: Mapping[str, Framework],
) -> tuple[dict[str, OperatorRun], dict[str, float]]:
    """The baselines by name, and the largest error of each over its tolerance.

    Raises:
        BenchmarkError: an output or gradient differs from the reference.
    """
    inputs = shape.inputs(np.random.default_rng(0))
    expected = _expected(operator, inputs, dtype, frameworks["paddle"])
    runs, errors = {}, {}
    for baseline in baselines:
        run = OperatorRun(operator, baseline, frameworks[baseline.framework], inputs, dtype)
        errors[baseline.name] = _validate(run, expected, f"{operator.name}, {shape.label}")
        runs[baseline.name] = run
    return runs, errors


@dataclass(frozen=True)
class _Expected:
    outputs: list[np.ndarray]
    output_gradients: list[np.ndarray]
    gradients: list[np.ndarray]


def _expected(operator: Operator, inputs: Inputs, dtype: str, paddle: Framework) -> _Expected:
    """What the reference gives in float64, for inputs that are rounded to ``dtype``."""

    def rounded(array: np.ndarray) -> np.ndarray:
        return paddle.array(paddle.tensor(array, dtype))

    tensors = {
        name: paddle.tensor(rounded(array), "float64")
        if name in operator.gradients
        else paddle.tensor(array, None)
        for name, array in inputs.items()
    }
    outputs = _as_list(operator.reference(**tensors))
    generator = np.random.default_rng(1)
    output_gradients = [
        rounded(np.asarray(generator.standard_normal(each.shape, dtype=np.float32)))
        for each in outputs
    ]
    gradients = paddle.gradients(
        outputs,
        [tensors[name] for name in operator.gradients],
        [paddle.tensor(each, None) for each in output_gradients],
    )
    return _Expected(
        [paddle.array(each) for each in outputs],
        output_gradients,
        [paddle.array(each) for each in gradients],
    )


class OperatorRun:
    """A baseline with its tensors, ready to run."""

    def __init__(
        self,
        operator: Operator,
        baseline: Baseline,
        framework: Framework,
        inputs: Inputs,
        dtype: str,
    ) -> None:
        self.operator = operator
        self.baseline = baseline
        self.framework = framework
        self.precision = baseline.precision or dtype
        tensors = baseline.tensors or dtype
        self._tensors = {
            name: framework.tensor(array, tensors if name in operator.gradients else None)
            for name, array in inputs.items()
        }
        self._output_gradients: list[Any] = []

    def results(self, output_gradients: Sequence[np.ndarray]) -> tuple[list[Any], list[Any]]:
        """Outputs and gradients in float64; later runs use these output gradients too."""
        tensors, wanted = self._inputs()
        outputs = _as_list(self.baseline.function(**tensors))
        # Read before the backward pass, which may overwrite what an output shares memory with.
        arrays = [self.framework.array(each) for each in outputs]
        self._output_gradients = [
            self.framework.tensor_like(array, output)
            for array, output in zip(output_gradients, outputs)
        ]
        gradients = self.framework.gradients(outputs, wanted, self._output_gradients)
        return arrays, [self.framework.array(each) for each in gradients]

    def seconds(self) -> dict[str, float]:
        """Of one forward and one backward pass."""
        tensors, wanted = self._inputs()
        self.framework.synchronize()
        start = time.perf_counter()
        outputs = _as_list(self.baseline.function(**tensors))
        self.framework.synchronize()
        middle = time.perf_counter()
        gradients = self.framework.gradients(outputs, wanted, self._output_gradients)
        self.framework.synchronize()
        end = time.perf_counter()
        del outputs, gradients  # after the clock: freeing is the caller's
        return dict(zip(PASSES, (middle - start, end - middle)))

    def _inputs(self) -> tuple[dict[str, Any], list[Any]]:
        tensors = dict(self._tensors)
        for name in self.operator.overwritten:
            tensors[name] = self.framework.fresh(tensors[name])
        return tensors, [tensors[name] for name in self.operator.gradients]


def _validate(run: OperatorRun, expected: _Expected, case: str) -> float:
    """The largest error of any output or gradient."""
    allowed = tolerance(run.baseline, run.precision, run.operator.bfloat16_tolerance)
    outputs, gradients = run.results(expected.output_gradients)
    names = [f"output {number}" for number in range(len(outputs))]
    names += [f"gradient of {name}" for name in run.operator.gradients]
    who = {"case": f"{case}, {run.precision}", "baseline": run.baseline.name}
    return max(
        checked_error(actual, wanted, allowed, part=name, **who)
        for name, actual, wanted in zip(
            names, [*outputs, *gradients], [*expected.outputs, *expected.gradients]
        )
    )


def _as_list(outputs: Any) -> list[Any]:
    return list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]
