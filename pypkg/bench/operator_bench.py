"""Validates the operators' contenders and times them beside each other."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pypkg.bench.case import OURS, PASSES, BenchmarkError, Contender, Inputs, Operator, Shape, Work
from pypkg.bench.frameworks import Framework
from pypkg.bench.limits import ThreadedCopy, matmul_rate
from pypkg.bench.timing import Summary, interleave, rounds_within, summarize

DTYPES = ("float32", "bfloat16")
ELEMENT_SIZE = {"float32": 4, "bfloat16": 2}
# |result - reference| <= tolerance * (|reference| + m) for every value, where m is the mean
# |reference| of its row (last axis) or of all, whichever is larger: where terms cancel, errors are
# as large as those of their neighbours. float32: sums of thousands of terms and exponentials lose
# some bits of 2^-24. bfloat16 has a tolerance per operator.
_FLOAT32_TOLERANCE = 5e-5
# A peer that keeps intermediate results in its dtype is allowed that; it only has to be the same
# function.
_PEER_SLACK = 8.0
_MIN_ROUNDS, _MAX_ROUNDS = 3, 60
# Longer than the worker threads of OpenMP runtimes spin here after a parallel region.
_PAUSE = 0.004
_LIMIT = "limit"


@dataclass(frozen=True)
class Limits:
    """What the machine can do at best."""

    copy: ThreadedCopy
    matmul: Framework  # whose float32 matrix product is fastest

    def seconds(self, operator: Operator, passes: Sequence[Work], dtype: str) -> tuple[float, ...]:
        """The time that each pass would take at the limit, measured now."""
        if operator.bound == "memory":
            return tuple(self.copy.seconds(work.bytes(ELEMENT_SIZE[dtype])) for work in passes)
        rate = matmul_rate(self.matmul, runs=3)
        return tuple(work.flops / rate for work in passes)


def bench_operator(
    operator: Operator,
    shape: Shape,
    dtype: str,
    frameworks: Mapping[str, Framework],
    limits: Limits,
    seconds: float,
) -> list[dict[str, Any]]:
    """Validates every contender, then times them in turns for about ``seconds``.

    Returns:
        A row per contender and pass; none if ours does not support the dtype here.

    Raises:
        BenchmarkError: a contender's output or gradient is not that of the reference.
    """
    contenders = [
        each
        for each in operator.contenders
        if dtype in each.dtypes and each.framework in frameworks
    ]
    if not any(each.name == OURS for each in contenders):
        return []
    inputs = shape.inputs(np.random.default_rng(0))
    expected = _expected(operator, inputs, dtype, frameworks["paddle"])
    runs, errors = {}, {}
    for contender in contenders:
        run = _Run(operator, contender, frameworks[contender.framework], inputs, dtype)
        errors[contender.name] = _validate(run, expected, f"{operator.name}, {shape.label}")
        runs[contender.name] = run.turn
    del expected
    runs[_LIMIT] = lambda: limits.seconds(operator, (shape.forward, shape.backward), dtype)
    start = time.perf_counter()
    interleave(runs, 1, _PAUSE)
    rounds = rounds_within(seconds, time.perf_counter() - start, _MIN_ROUNDS, _MAX_ROUNDS)
    samples = interleave(runs, rounds, _PAUSE)
    return _rows(operator, shape, dtype, samples, errors)


def _rows(
    operator: Operator,
    shape: Shape,
    dtype: str,
    samples: dict[str, list[tuple[float, float]]],
    errors: Mapping[str, float],
) -> list[dict[str, Any]]:
    work = dict(zip(PASSES, (shape.forward, shape.backward, shape.forward + shape.backward)))
    limit = _milliseconds(samples.pop(_LIMIT))
    return [
        {
            "op": operator.name,
            "shape": shape.label,
            "dtype": dtype,
            "pass": each,
            "contender": name,
            **asdict(summary),
            "bytes": work[each].bytes(ELEMENT_SIZE[dtype]),
            "flops": work[each].flops,
            "limit": limit[each].median,
            "error": errors[name],
        }
        for name, pairs in samples.items()
        for each, summary in _milliseconds(pairs).items()
        if each in operator.passes
    ]


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


class _Run:
    """A contender with its tensors, ready to run."""

    def __init__(
        self,
        operator: Operator,
        contender: Contender,
        framework: Framework,
        inputs: Inputs,
        dtype: str,
    ) -> None:
        self.operator = operator
        self.contender = contender
        self.framework = framework
        self.precision = contender.precision or dtype
        tensors = contender.tensors or dtype
        self._tensors = {
            name: framework.tensor(array, tensors if name in operator.gradients else None)
            for name, array in inputs.items()
        }
        self._output_gradients: list[Any] = []

    def results(self, output_gradients: Sequence[np.ndarray]) -> tuple[list[Any], list[Any]]:
        """Outputs and gradients in float64; later runs use these output gradients too."""
        tensors, wanted = self._inputs()
        outputs = _as_list(self.contender.function(**tensors))
        # Read before the backward pass, which may overwrite what an output shares memory with.
        arrays = [self.framework.array(each) for each in outputs]
        self._output_gradients = [
            self.framework.tensor_like(array, output)
            for array, output in zip(output_gradients, outputs)
        ]
        gradients = self.framework.gradients(outputs, wanted, self._output_gradients)
        return arrays, [self.framework.array(each) for each in gradients]

    def turn(self) -> tuple[float, float]:
        """``seconds`` behind an untimed run, which leaves memory and caches its own, as the
        operators before it do in training, and not those of another contender.
        """
        self.seconds()
        return self.seconds()

    def seconds(self) -> tuple[float, float]:
        """Of one forward and one backward pass."""
        tensors, wanted = self._inputs()
        self.framework.synchronize()
        start = time.perf_counter()
        outputs = _as_list(self.contender.function(**tensors))
        self.framework.synchronize()
        middle = time.perf_counter()
        gradients = self.framework.gradients(outputs, wanted, self._output_gradients)
        self.framework.synchronize()
        end = time.perf_counter()
        del outputs, gradients  # after the clock: freeing is the caller's
        return middle - start, end - middle

    def _inputs(self) -> tuple[dict[str, Any], list[Any]]:
        tensors = dict(self._tensors)
        for name in self.operator.overwritten:
            tensors[name] = self.framework.fresh(tensors[name])
        return tensors, [tensors[name] for name in self.operator.gradients]


def _validate(run: _Run, expected: _Expected, case: str) -> float:
    """The largest error of any output or gradient, as a share of what is allowed.

    Raises:
        BenchmarkError: it is above 1, or not a number.
    """
    tolerance = _FLOAT32_TOLERANCE
    if run.precision == "bfloat16":
        tolerance = run.operator.bfloat16_tolerance
    if run.contender.name != OURS:
        tolerance *= _PEER_SLACK
    outputs, gradients = run.results(expected.output_gradients)
    names = [f"output {number}" for number in range(len(outputs))]
    names += [f"gradient of {name}" for name in run.operator.gradients]
    worst = 0.0
    for name, actual, wanted in zip(
        names, [*outputs, *gradients], [*expected.outputs, *expected.gradients]
    ):
        if actual.shape != wanted.shape:
            error = math.inf
        else:
            error = float((np.abs(actual - wanted) / (tolerance * _magnitude(wanted))).max())
        if not error <= 1.0:
            raise BenchmarkError(
                f"{case}, {run.precision}: {run.contender.name} is wrong in its {name}: the "
                f"largest error is {error:.3g} times what is allowed. Nothing is timed."
            )
        worst = max(worst, error)
    return worst


def _magnitude(values: np.ndarray) -> np.ndarray:
    size = np.abs(values)
    row = size.mean(axis=-1, keepdims=True) if size.ndim else size
    return size + np.maximum(row, size.mean())


def _milliseconds(pairs: Sequence[tuple[float, float]]) -> dict[str, Summary]:
    """Summary of each pass, from the seconds of forward and backward of each round."""
    columns = [[1e3 * pair[0] for pair in pairs], [1e3 * pair[1] for pair in pairs]]
    columns.append([sum(pair) for pair in zip(*columns)])
    return {name: summarize(column) for name, column in zip(PASSES, columns)}


def _as_list(outputs: Any) -> list[Any]:
    return list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]
