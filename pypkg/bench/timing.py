"""Interleaved timing and its summary.

Baselines take turns, one run each per round, so that a slow moment of the machine affects all of
them. The result of a baseline is its median over the rounds.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

Sample = TypeVar("Sample")


@dataclass(frozen=True)
class Summary:
    """Median and quartiles, in the unit of the values."""

    median: float
    lower_quartile: float
    upper_quartile: float
    count: int


def summarize(values: Sequence[float]) -> Summary:
    """Median and quartiles of at least one value."""
    if not values:
        raise ValueError("there are no values to summarize")
    if len(values) == 1:
        return Summary(values[0], values[0], values[0], 1)
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return Summary(median, lower, upper, len(values))


def interleave(
    runs: Mapping[str, Callable[[], Sample]], rounds: int, pause: float = 0.0
) -> dict[str, list[Sample]]:
    """Calls every run once per round and collects the results.

    Each round begins with the next run, so that no run always follows the same other run.

    Args:
        pause: seconds of sleep before each run, in which idle worker threads of the run before
            stop spinning.
    """
    names = list(runs)
    samples: dict[str, list[Sample]] = {name: [] for name in names}
    collects = gc.isenabled()
    gc.disable()
    try:
        for number in range(rounds):
            first = number % len(names)
            for name in names[first:] + names[:first]:
                time.sleep(pause)
                samples[name].append(runs[name]())
            gc.collect(0)
    finally:
        if collects:
            gc.enable()
    return samples


def rounds_within(seconds: float, seconds_per_round: float, at_least: int, at_most: int) -> int:
    """How many rounds fit into ``seconds``, within the limits."""
    return max(at_least, min(at_most, int(seconds / max(seconds_per_round, 1e-9))))
