"""Loss scaling, which keeps small gradients of float16 from vanishing.

The growth and back-off are those of paddle.amp.GradScaler. That gradients are finite is read off
their global norm, which all processes have in common; so all of them skip the same steps.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LossScale:
    """How the scale begins and changes.

    Attributes:
        initial: what the loss is multiplied by at first.
        growth, backoff: factors by which it changes.
        growth_interval: steps with finite gradients in a row after which it grows.
        backoff_interval: steps without in a row after which it shrinks, to 1 at least.
    """

    initial: float = 32768.0
    growth: float = 2.0
    backoff: float = 0.5
    growth_interval: int = 2000
    backoff_interval: int = 1


class LossScaler:
    """The scale at work. ``skipped_steps`` counts the updates that were left out."""

    def __init__(self, options: LossScale) -> None:
        self.options = options
        self.scale = options.initial
        self.skipped_steps = 0
        self._finite = 0
        self._overflowed = 0

    def update(self, skipped: bool) -> None:
        """After each step."""
        options = self.options
        self._finite = 0 if skipped else self._finite + 1
        self._overflowed = self._overflowed + 1 if skipped else 0
        self.skipped_steps += skipped
        if self._overflowed == options.backoff_interval:
            self.scale, self._overflowed = max(self.scale * options.backoff, 1.0), 0
        if self._finite == options.growth_interval:
            self.scale, self._finite = self.scale * options.growth, 0

    def state(self) -> dict[str, float]:
        """What resuming needs, as numbers that JSON holds."""
        return {
            "scale": self.scale,
            "finite_steps": self._finite,
            "overflowed_steps": self._overflowed,
            "skipped_steps": self.skipped_steps,
        }

    def load_state(self, state: dict[str, float]) -> None:
        """The inverse of ``state``."""
        self.scale = float(state["scale"])
        self._finite = int(state["finite_steps"])
        self._overflowed = int(state["overflowed_steps"])
        self.skipped_steps = int(state["skipped_steps"])
