"""Spikes of the loss and of the gradient norm, by a robust z-score over the preceding steps."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence

# The median absolute deviation of a normal distribution is 0.6745 of its standard deviation.
_DEVIATIONS_PER_MAD = 1.4826
_LEAST_SPREAD = 0.01  # lower bound of the standard deviation, as a share of the median


def robust_z_score(value: float, history: Sequence[float]) -> float:
    """The distance of ``value`` above the median of ``history``, in standard deviations.

    The standard deviation is 1.4826 times the median absolute deviation, which is robust to single
    outliers (Iglewicz and Hoaglin, 1993, "How to Detect and Handle Outliers"), and at least a
    hundredth of the median.
    """
    median = statistics.median(history)
    deviation = statistics.median(abs(each - median) for each in history)
    spread = max(_DEVIATIONS_PER_MAD * deviation, _LEAST_SPREAD * abs(median))
    return (value - median) / spread if spread else math.copysign(math.inf, value - median)


class SpikeDetector:
    """Judges the steps of a run, one after another.

    Args:
        thresholds: z-scores of the loss and of the gradient norm above which a step is a spike;
            0 disables a check.
        window: number of preceding good steps that a step is compared with. No step is a spike
            before there are that many.
    """

    def __init__(self, thresholds: tuple[float, float], window: int) -> None:
        self._thresholds = dict(zip(_NAMES, thresholds, strict=True))
        self._history: dict[str, deque[float]] = {
            name: deque(maxlen=window) for name, threshold in self._thresholds.items() if threshold
        }

    def judge(self, loss: float, grad_norm: float) -> str | None:
        """The reason why a step is a spike, or None. A step that is none is added to the history.

        A value that is not finite is ignored.
        """
        values = dict(zip(_NAMES, (loss, grad_norm), strict=True))
        for name, history in self._history.items():
            value, threshold = values[name], self._thresholds[name]
            if len(history) < (history.maxlen or 0) or not math.isfinite(value):
                continue
            score = robust_z_score(value, history)
            if score > threshold:
                return (
                    f"the {name} is {value:.4g}, {score:.3g} standard deviations above the median "
                    f"of the {len(history)} steps before"
                )
        for name, history in self._history.items():
            if math.isfinite(values[name]):
                history.append(values[name])
        return None

    def history(self) -> dict[str, list[float]]:
        """The values that the next step is compared with; a checkpoint stores them."""
        return {name: list(values) for name, values in self._history.items()}

    def load(self, history: dict[str, list[float]]) -> None:
        """Restores a result of ``history``. A metric that it lacks starts with no history."""
        for name, values in self._history.items():
            values.clear()
            values.extend(history.get(name, ()))


_NAMES = ("loss", "gradient norm")
