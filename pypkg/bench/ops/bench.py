"""Validates the baselines of an operator and times them in turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

from pypkg.bench.ops.case import OURS, Operator, Shape, Update, UpdateShape, result_row
from pypkg.bench.ops.frameworks import Framework
from pypkg.bench.ops.limits import ThreadedCopy, matmul_rate
from pypkg.bench.ops.run import operator_runs
from pypkg.bench.ops.update_run import update_runs
from pypkg.bench.ops.work import ELEMENT_SIZE, PASSES, Work
from pypkg.bench.timing import Summary, interleave, rounds_within, summarize

DTYPES = ("float32", "bfloat16")
_MIN_ROUNDS, _MAX_ROUNDS = 3, 60
# Longer than the worker threads of OpenMP runtimes spin here after a parallel region.
_PAUSE = 0.004
_LIMIT = "limit"

PassSeconds = dict[str, float]
Value = TypeVar("Value", float, Work)


class _Run(Protocol):
    def seconds(self) -> PassSeconds:
        """Of each pass, run once."""


@dataclass(frozen=True)
class Limits:
    """What the machine can do at best."""

    copy: ThreadedCopy
    matmul: Framework  # whose float32 matrix product is fastest

    def seconds(self, bound: str, work: Mapping[str, Work], dtype: str) -> PassSeconds:
        """The time that each pass would take at the limit, measured now.

        Args:
            bound: that of an operator.
        """
        if bound == "compute":
            rate = matmul_rate(self.matmul, runs=3)
            return {name: each.flops / rate for name, each in work.items()}
        in_place, size = bound == "memory in place", ELEMENT_SIZE[dtype]
        return {name: self.copy.seconds(each.bytes(size), in_place) for name, each in work.items()}


def bench_operator(
    operator: Operator | Update,
    shape: Shape | UpdateShape,
    dtype: str,
    frameworks: Mapping[str, Framework],
    limits: Limits,
    seconds: float,
) -> list[dict[str, Any]]:
    """Validates every baseline, then times them in turns for about ``seconds``.

    Returns:
        A row per baseline and pass; none if ours does not support the dtype here.

    Raises:
        BenchmarkError: the result of a baseline differs from the reference.
    """
    baselines = [
        each for each in operator.baselines if dtype in each.dtypes and each.framework in frameworks
    ]
    if not any(each.name == OURS for each in baselines):
        return []
    runs: Mapping[str, _Run]
    if isinstance(operator, Update):
        assert isinstance(shape, UpdateShape)
        runs, errors = update_runs(operator, baselines, shape, dtype, frameworks)
    else:
        assert isinstance(shape, Shape)
        runs, errors = operator_runs(operator, baselines, shape, dtype, frameworks)
    turns: dict[str, Callable[[], PassSeconds]] = {
        name: partial(_turn, run) for name, run in runs.items()
    }
    turns[_LIMIT] = lambda: limits.seconds(operator.bound, shape.work, dtype)
    start = time.perf_counter()
    interleave(turns, 1, _PAUSE)
    rounds = rounds_within(seconds, time.perf_counter() - start, _MIN_ROUNDS, _MAX_ROUNDS)
    samples = interleave(turns, rounds, _PAUSE)
    return _rows(operator, shape, dtype, samples, errors)


def _turn(run: _Run) -> PassSeconds:
    """``seconds`` after an untimed run, so that caches and the allocator hold the memory of this
    baseline and not that of another one.
    """
    run.seconds()
    return run.seconds()


def _rows(
    operator: Operator | Update,
    shape: Shape | UpdateShape,
    dtype: str,
    samples: dict[str, list[PassSeconds]],
    errors: Mapping[str, float],
) -> list[dict[str, Any]]:
    work = _with_sum(shape.work)
    limit = _milliseconds(samples.pop(_LIMIT))
    return [
        result_row(
            *(operator.name, shape.label, dtype, each, name, summary),
            work=work[each],
            limit=limit[each].median,
            error=errors[name],
        )
        for name, rounds in samples.items()
        for each, summary in _milliseconds(rounds).items()
        if each in operator.passes
    ]


def _milliseconds(rounds: Sequence[PassSeconds]) -> dict[str, Summary]:
    """Summary of each pass, and of both together."""
    rounds = [_with_sum(each) for each in rounds]
    return {name: summarize([1e3 * each[name] for each in rounds]) for name in rounds[0]}


def _with_sum(passes: Mapping[str, Value]) -> dict[str, Value]:
    """With that of forward and backward together, where there are two."""
    forward, backward, both = PASSES
    if backward not in passes:
        return dict(passes)
    return {**passes, both: passes[forward] + passes[backward]}
