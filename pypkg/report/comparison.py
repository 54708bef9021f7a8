"""Compares the logged metrics of two runs step by step, and lists what may explain a difference.

Only steps that both runs logged in metrics.jsonl are compared. The loss of a row is the mean over
the steps since the previous row, so it is compared only where both runs average the same steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pypkg.errors import UserError
from pypkg.report.collect import check_is_run, saved_settings, unique_names
from pypkg.report.parts import event_text
from pypkg.training.ledger import Event, current_events
from pypkg.training.reporting.reporters import METRICS_FILE, read_metrics
from pypkg.training.reporting.run_info import RunInfo, read_run_info

# Metrics that a repeated run reproduces. NAME/PART, such as the loss of a corpus, counts as NAME.
METRICS = ("loss", "eval_loss", "grad_norm", "learning_rate", "consumed_tokens")
_MEAN_SINCE_LAST_ROW = "loss"
# These settings say where a run writes. They do not affect the loss.
_OUTPUT_SETTINGS = {"output_dir", "logging_dir", "run_name"}

_Point = tuple[int, float]  # the first step that a value covers, and the value


@dataclass(frozen=True)
class Difference:
    """The values of a metric at a step.

    Attributes:
        relative: |a - b| / max(|a|, |b|); infinite where one of them is not finite.
    """

    step: int
    a: float
    b: float
    relative: float


@dataclass(frozen=True)
class MetricComparison:
    """A metric in two runs.

    Attributes:
        compared: number of steps at which the values of both runs belong to the same steps.
        first: the first difference beyond the tolerance; None if there is none.
        largest: the largest difference, even if within the tolerance; None if all values are equal.
    """

    name: str
    compared: int
    first: Difference | None
    largest: Difference | None


@dataclass(frozen=True)
class Differing:
    """A setting, version or size that differs; None is the value of a run that lacks it."""

    name: str
    a: Any
    b: Any


@dataclass(frozen=True)
class RunEvent:
    """An event of the ledger of ``run``; ``step`` is the first step that it concerns."""

    run: str
    step: int | None
    event: str
    text: str


@dataclass(frozen=True)
class Comparison:
    """Two runs, a and b.

    Attributes:
        names: names of the runs.
        last_steps: the last logged step of each.
        metrics: the METRICS that at least one run has, and the parts (NAME/PART) that differ.
        first_step: the first step at which a metric differs; None if the runs are equal.
        settings: differing settings, then differing fields of model, layout and environment.
        events: events of both ledgers up to ``first_step``, or up to the last compared step.
    """

    names: tuple[str, str]
    last_steps: tuple[int, int]
    tolerance: float
    metrics: list[MetricComparison]
    first_step: int | None
    settings: list[Differing]
    events: list[RunEvent]


def compare(a: Path, b: Path, tolerance: float = 0.0) -> Comparison:
    """Compares the runs in the output_dirs ``a`` and ``b``.

    Args:
        tolerance: the largest relative difference that counts as equal. Two NaN are equal.

    Raises:
        UserError: a folder holds no run, a file of it cannot be read, or no step is in both runs.
    """
    for folder in (a, b):
        check_is_run(folder)
    rows = [read_metrics(folder / METRICS_FILE) for folder in (a, b)]
    points = [_points(each) for each in rows]
    names = unique_names([a, b])
    last = [max((int(row["global_step"]) for row in each), default=0) for each in rows]
    metrics = []
    last_compared = 0
    for name in _ordered({*points[0], *points[1]}):
        in_a, in_b = (each.get(name, {}) for each in points)
        found, steps = _compare_metric(name, in_a, in_b, tolerance)
        last_compared = max([last_compared, *steps])
        if name in METRICS or found.first:
            metrics.append(found)
    if not last_compared:
        raise UserError(
            f"{a} and {b} have no step of {METRICS_FILE} in common: their last steps are {last[0]} "
            f"and {last[1]}. Give two runs that logged the same steps (logging_steps)."
        )
    first = min((each.first.step for each in metrics if each.first), default=None)
    infos = [read_run_info(folder) for folder in (a, b)]
    settings = [saved_settings(folder, info) for folder, info in zip((a, b), infos)]
    return Comparison(
        names=(names[0], names[1]),
        last_steps=(last[0], last[1]),
        tolerance=tolerance,
        metrics=metrics,
        first_step=first,
        settings=_differing("", *settings) + _differing_infos(*infos),
        events=_events(names, (a, b), last_compared if first is None else first),
    )


def _points(rows: Sequence[Mapping[str, float]]) -> dict[str, dict[int, _Point]]:
    """The points of each metric, by metric and step."""
    found: dict[str, dict[int, _Point]] = {}
    last = 0
    for row in rows:
        step = int(row["global_step"])
        for name, value in row.items():
            base = name.partition("/")[0]
            if base in METRICS:
                begin = last + 1 if base == _MEAN_SINCE_LAST_ROW else step
                found.setdefault(name, {})[step] = (begin, value)
        if _MEAN_SINCE_LAST_ROW in row:
            last = step
    return found


def _ordered(names: set[str]) -> list[str]:
    return sorted(names, key=lambda name: (METRICS.index(name.partition("/")[0]), name))


def _compare_metric(
    name: str, a: Mapping[int, _Point], b: Mapping[int, _Point], tolerance: float
) -> tuple[MetricComparison, list[int]]:
    """The comparison, and the steps that were compared."""
    steps = sorted(step for step in a.keys() & b.keys() if a[step][0] == b[step][0])
    pairs = [(step, a[step][1], b[step][1]) for step in steps]
    found = [Difference(*pair, _relative(*pair[1:])) for pair in pairs]
    beyond = [each for each in found if each.relative > tolerance]
    largest = max(found, key=lambda each: each.relative, default=None)
    if largest is not None and largest.relative == 0:
        largest = None
    return MetricComparison(name, len(steps), beyond[0] if beyond else None, largest), steps


def _relative(a: float, b: float) -> float:
    if a == b or (math.isnan(a) and math.isnan(b)):
        return 0.0
    if not (math.isfinite(a) and math.isfinite(b)):
        return math.inf
    return abs(a - b) / max(abs(a), abs(b))


def _differing(kind: str, a: Mapping[str, Any], b: Mapping[str, Any]) -> list[Differing]:
    return [
        Differing(kind + name, a.get(name), b.get(name))
        for name in sorted(a.keys() | b.keys())
        if a.get(name) != b.get(name) and name not in _OUTPUT_SETTINGS
    ]


def _differing_infos(a: RunInfo | None, b: RunInfo | None) -> list[Differing]:
    """Differing fields of model, layout and environment, if both runs have a run_info.json."""
    if a is None or b is None:
        return []
    kinds = ("model", "layout", "environment")
    return [
        each
        for kind in kinds
        for each in _differing(f"{kind}: ", getattr(a, kind), getattr(b, kind))
    ]


def _events(names: Sequence[str], folders: Sequence[Path], last: int) -> list[RunEvent]:
    found = [
        RunEvent(name, step, event["event"], event_text(event))
        for name, folder in zip(names, folders)
        for event in current_events(folder)
        if (step := _concerned_step(event)) is None or step <= last
    ]
    return sorted(found, key=lambda each: -1 if each.step is None else each.step)


def _concerned_step(event: Event) -> int | None:
    """The first step that an event concerns; for a rollback, the step of its checkpoint."""
    steps = [event[key] for key in ("step", "to_step") if event.get(key) is not None]
    return min(steps, default=None)
