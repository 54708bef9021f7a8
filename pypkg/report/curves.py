"""The curves of a run: metrics.jsonl by metric, each with a bounded number of points."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from pypkg.report.document import Curve

_STEP, _TOKENS = "global_step", "consumed_tokens"


class _Chart(NamedTuple):
    title: str
    unit: str


# Charts in the order of the page. A curve belongs to the chart of its name, and NAME/CORPUS to the
# chart of "NAME/". Other metrics have a chart of their own.
_CHARTS = {
    "loss": _Chart("Loss", "nats per token"),
    "eval_loss": _Chart("Loss", "nats per token"),
    "loss/": _Chart("Training loss by corpus", "nats per token"),
    "eval_loss/": _Chart("Validation loss by corpus", "nats per token"),
    "learning_rate": _Chart("Learning rate", ""),
    "grad_norm": _Chart("Gradient norm", "before clipping"),
    "tokens_per_second_per_device": _Chart("Speed", "tokens/s per rank"),
    "mfu": _Chart("Model FLOPs utilisation", "fraction of the peak"),
    "peak_memory_gib": _Chart("Peak memory", "GiB, rank 0"),
    "data_wait_seconds_per_step": _Chart("Wait for data", "seconds per step"),
}
# Perplexity is the exponential of the validation loss, which is drawn.
_NOT_DRAWN = {_STEP, _TOKENS, "eval_perplexity"}


def curves(rows: Sequence[Mapping[str, float]], points: int) -> list[Curve]:
    """The curves of ``rows`` of metrics.jsonl, in the order of the page.

    Args:
        points: maximum number of points of a curve. A longer curve is divided into intervals of
            equal length and keeps the minimum and maximum of each, so that no spike is lost.
    """
    tokens_at = TokensOfSteps(rows)
    columns: dict[str, tuple[list[int], list[float]]] = {}
    for row in rows:
        for name, value in row.items():
            if name not in _NOT_DRAWN and not name.startswith("start_"):  # one point each
                steps, values = columns.setdefault(name, ([], []))
                steps.append(int(row[_STEP]))
                values.append(float(value))
    found = []
    for name in sorted(columns, key=_place):
        steps, values = columns[name]
        kept = _downsampled(values, points)
        some_steps = [steps[each] for each in kept]
        chart = _CHARTS.get(_key(name), _Chart(name, ""))
        found.append(
            Curve(
                name, chart.title, chart.unit, some_steps, tokens_at(some_steps),
                [values[each] for each in kept], len(values),
            )
        )  # fmt: skip
    return found


class TokensOfSteps:
    """Maps steps to consumed tokens, interpolated linearly between the rows that log them."""

    def __init__(self, rows: Sequence[Mapping[str, float]]) -> None:
        known = {0: 0.0} | {int(row[_STEP]): row[_TOKENS] for row in rows if _TOKENS in row}
        self._steps = sorted(known)
        self._tokens = [known[step] for step in self._steps]

    def __call__(self, steps: Sequence[int]) -> list[float | None]:
        """Tokens consumed at each of ``steps``; None after the last row that logs them."""
        if not len(steps):
            return []
        found = np.interp(steps, self._steps, self._tokens)
        last = self._steps[-1]
        return [float(each) if step <= last else None for step, each in zip(steps, found)]


def _key(name: str) -> str:
    prefix, separator, _ = name.partition("/")
    return prefix + separator


def _place(name: str) -> tuple[int, str]:
    names = list(_CHARTS)
    key = _key(name)
    return (names.index(key) if key in _CHARTS else len(names), name)


def _downsampled(values: Sequence[float], points: int) -> list[int]:
    """Indices of the values to draw: first and last, minimum and maximum of each interval."""
    if len(values) <= points:
        return list(range(len(values)))
    numbers = np.asarray(values)
    parts = np.array_split(np.arange(len(values)), max((points - 2) // 2, 1))
    kept = {0, len(values) - 1}
    for part in parts:
        some = numbers[part]
        if np.isnan(some).all():
            kept.add(int(part[0]))
        else:
            kept |= {int(part[np.nanargmin(some)]), int(part[np.nanargmax(some)])}
    return sorted(kept)
