"""Dynamic loss scaling for float16, in which small gradients would underflow.

Growth and back-off follow paddle.amp.GradScaler. Gradients count as finite if their global norm is
finite. The norm is the same on all ranks, so all ranks skip the same steps.
"""

from __future__ import annotations

from dataclasses import dataclass

from pypkg.errors import UserError

# Number of consecutive steps with overflow at scale 1, the minimum, after which the run ends.
MOST_OVERFLOWS = 20


@dataclass(frozen=True)
class LossScale:
    """How the scale starts and changes.

    Attributes:
        initial: the first factor of the loss.
        growth, backoff: factors by which the scale grows and shrinks.
        growth_interval: consecutive steps with finite gradients after which the scale grows.
        backoff_interval: consecutive steps with gradients that are not finite after which the scale
            shrinks; it stays at least 1.
    """

    initial: float = 32768.0
    growth: float = 2.0
    backoff: float = 0.5
    growth_interval: int = 2000
    backoff_interval: int = 1


class LossScaler:
    """The current scale. ``skipped_steps`` counts the steps without an update."""

    def __init__(self, options: LossScale) -> None:
        self.options = options
        self.scale = options.initial
        self.skipped_steps = 0
        self._finite = 0
        self._overflowed = 0
        self._overflowed_at_one = 0  # consecutive steps at scale 1; a resumed run counts anew

    def update(self, skipped: bool) -> None:
        """Adapts the scale; called after each step.

        Args:
            skipped: whether the gradients of the step were not finite.

        Raises:
            UserError: this was the case in ``MOST_OVERFLOWS`` consecutive steps at scale 1. The
                scale cannot shrink further, so the run would skip steps for ever.
        """
        options = self.options
        at_one = skipped and self.scale <= 1.0
        self._overflowed_at_one = self._overflowed_at_one + 1 if at_one else 0
        if self._overflowed_at_one == MOST_OVERFLOWS:
            raise UserError(
                f"the gradients of {MOST_OVERFLOWS} steps in a row are not finite in float16, "
                "although the loss scale is at its minimum of 1. These steps updated no weights. "
                "Train with bf16, or lower learning_rate, and start the same command again."
            )
        self._finite = 0 if skipped else self._finite + 1
        self._overflowed = self._overflowed + 1 if skipped else 0
        self.skipped_steps += skipped
        if self._overflowed == options.backoff_interval:
            self.scale, self._overflowed = max(self.scale * options.backoff, 1.0), 0
        if self._finite == options.growth_interval:
            self.scale, self._finite = self.scale * options.growth, 0

    def state(self) -> dict[str, float]:
        """The state that a resumed run needs, as JSON numbers."""
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
