"""Validates the baselines of a case and times them in turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from pypkg.bench.ops.case import OURS, Baseline, BenchmarkCase, with_sum
from pypkg.bench.ops.frameworks import Framework
from pypkg.bench.ops.limits import ThreadedCopy, matmul_rate
from pypkg.bench.ops.work import ELEMENT_SIZE, Work
from pypkg.bench.timing import Summary, interleave, rounds_within, summarize

DTYPES = ("float32", "bfloat16")
_MIN_ROUNDS, _MAX_ROUNDS = 3, 60
# The worker threads of OpenMP runtimes spin for a shorter time after a parallel region.
_PAUSE = 0.004
_LIMIT = "limit"

PassSeconds = dict[str, float]


class _Run(Protocol):
    def seconds(self) -> PassSeconds:
        """Runs once; returns the seconds of each pass."""


class OperatorMethod(Protocol):
    """The way to run and validate the baselines of an operator."""

    def prepare(
        self,
        case: BenchmarkCase[Any],
        baselines: Sequence[Baseline],
        frameworks: Mapping[str, Framework],
    ) -> tuple[Mapping[str, _Run], dict[str, float]]:
        """The validated baselines by name, and their largest errors relative to the tolerance."""


OperatorCase = BenchmarkCase[OperatorMethod]


@dataclass(frozen=True)
class Limits:
    """The limits of the machine."""

    copy: ThreadedCopy
    matmul: Framework  # the one with the fastest float32 matrix product

    def seconds(self, bound: str, work: Mapping[str, Work], dtype: str) -> PassSeconds:
        """Measures the seconds that each pass would take at the limit.

        Args:
            bound: limiting resource of a case.
            work: work of each pass.
            dtype: dtype of the case.
        """
        if bound == "compute":
            rate = matmul_rate(self.matmul, runs=3)
            return {name: each.flops / rate for name, each in work.items()}
        in_place, size = bound == "memory in place", ELEMENT_SIZE[dtype]
        return {name: self.copy.seconds(each.bytes(size), in_place) for name, each in work.items()}


def bench_case(
    case: OperatorCase, frameworks: Mapping[str, Framework], limits: Limits, seconds: float
) -> list[dict[str, Any]]:
    """Validates every baseline, then times them in turns for about ``seconds``.

    Returns:
        A row per baseline and pass; none if ours does not support the dtype here.

    Raises:
        BenchmarkError: the result of a baseline differs from the reference.
    """
    baselines = [
        each
        for each in case.baselines
        if case.dtype in each.dtypes and each.framework in frameworks
    ]
    if not any(each.name == OURS for each in baselines):
        return []
    runs, errors = case.method.prepare(case, baselines, frameworks)
    turns: dict[str, Callable[[], PassSeconds]] = {
        name: partial(_turn, run) for name, run in runs.items()
    }
    turns[_LIMIT] = lambda: limits.seconds(case.bound, case.work, case.dtype)
    start = time.perf_counter()
    interleave(turns, 1, _PAUSE)
    rounds = rounds_within(seconds, time.perf_counter() - start, _MIN_ROUNDS, _MAX_ROUNDS)
    return _rows(case, interleave(turns, rounds, _PAUSE), errors)


def _turn(run: _Run) -> PassSeconds:
    """The seconds of a run after an untimed run.

    The untimed run brings the memory of this baseline into the caches and the allocator.
    """
    run.seconds()
    return run.seconds()


def _rows(
    case: OperatorCase, samples: dict[str, list[PassSeconds]], errors: Mapping[str, float]
) -> list[dict[str, Any]]:
    limit = _milliseconds(samples.pop(_LIMIT))
    return [
        case.row(each, name, summary, limit=limit[each].median, error=errors[name])
        for name, rounds in samples.items()
        for each, summary in _milliseconds(rounds).items()
        if each in (case.passes or limit)
    ]


def _milliseconds(rounds: Sequence[PassSeconds]) -> dict[str, Summary]:
    """Summary of each pass, and of forward and backward together."""
    rounds = [with_sum(each) for each in rounds]
    return {name: summarize([1e3 * each[name] for each in rounds]) for name in rounds[0]}
