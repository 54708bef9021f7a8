"""Progress of a run: what resuming needs besides weights and optimizer state."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol


@dataclass
class TrainerState:
    """What resuming needs besides weights and optimizer state; trainer_state.json holds it.

    Attributes:
        global_step: completed optimizer steps.
        consumed_samples, consumed_tokens: totals of all ranks since the start of the run.
        initial_loss: loss of the first step, in nats per token.
        pending_losses: losses of the steps since the last log line, so that a resumed run prints
            the same line as an uninterrupted run.
        pending_source_losses: ``SourceLosses.sums`` of these steps.
        data_order: ``SampleOrder.to_json``, with the samples consumed from each corpus.
        loss_scale: ``LossScaler.state``, or empty.
        skipped_steps: steps of ``global_step`` that skip_data_intervals passed over.
        best_loss: lowest validation loss of a checkpoint, with load_best_model_at_end.
        best_checkpoint: name of the folder of that checkpoint.
        spike_history: ``SpikeDetector.history``.
        pending_evaluation: whether a signal interrupted the evaluation at ``global_step``, so that
            the resumed run repeats it.
    """

    global_step: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0
    initial_loss: float | None = None
    pending_losses: list[float] = field(default_factory=list)
    pending_source_losses: list[list[float]] = field(default_factory=list)
    data_order: dict = field(default_factory=dict)
    loss_scale: dict = field(default_factory=dict)
    skipped_steps: int = 0
    best_loss: float | None = None
    best_checkpoint: str | None = None
    spike_history: dict[str, list[float]] = field(default_factory=dict)
    pending_evaluation: bool = False

    def become(self, other: TrainerState) -> None:
        """Takes all values of ``other``."""
        for each in fields(self):
            setattr(self, each.name, getattr(other, each.name))

    @classmethod
    def from_json(cls, values: Any) -> TrainerState:
        """Makes a state from ``values``, the output of ``dataclasses.asdict``.

        Raises:
            ValueError: there are unknown fields or invalid values.
        """
        if not isinstance(values, dict):
            raise ValueError(f"it holds a {type(values).__name__}, not an object")
        if unknown := values.keys() - {each.name for each in fields(cls)}:
            raise ValueError(f"it holds {', '.join(map(repr, sorted(unknown)))}, which no run has")
        state = cls(**values)
        for name, (holds, expected) in _CHECKS.items():
            if not holds(getattr(state, name)):
                raise ValueError(f"{name} is {getattr(state, name)!r:.60}; expected {expected}")
        if state.skipped_steps > state.global_step:
            raise ValueError(f"skipped_steps is above global_step ({state.global_step})")
        return state


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_loss(value: Any) -> bool:
    return value is None or _is_finite(value)


def _are_finite(values: Any) -> bool:
    return isinstance(values, list) and all(map(_is_finite, values))


def _is_loss_scale(value: Any) -> bool:
    names = {"scale", "finite_steps", "overflowed_steps", "skipped_steps"}
    return isinstance(value, dict) and (
        not value
        or (value.keys() == names and all(map(_is_finite, value.values())) and value["scale"] > 0)
    )


_COUNT = (_is_count, "a whole number, not negative")
_LOSS = (_is_loss, "a finite number or null")
_OBJECT = (lambda value: isinstance(value, dict), "an object")
_CHECKS = {
    "global_step": _COUNT,
    "consumed_samples": _COUNT,
    "consumed_tokens": _COUNT,
    "skipped_steps": _COUNT,
    "initial_loss": _LOSS,
    "best_loss": _LOSS,
    "best_checkpoint": (lambda value: value is None or isinstance(value, str), "a name or null"),
    "pending_evaluation": (lambda value: isinstance(value, bool), "true or false"),
    "pending_losses": (_are_finite, "a list of finite numbers"),
    "pending_source_losses": (
        lambda value: isinstance(value, list) and all(map(_are_finite, value)),
        "a list of lists of finite numbers",
    ),
    "spike_history": (
        lambda value: isinstance(value, dict) and all(map(_are_finite, value.values())),
        "an object of lists of finite numbers",
    ),
    "data_order": _OBJECT,
    "loss_scale": (_is_loss_scale, "an object of a positive scale and three numbers of steps"),
}


class Saver(Protocol):
    """Writes checkpoints. All ranks call each method at the same points of the run."""

    def save(self, state: TrainerState) -> Path:
        """Writes a checkpoint, or starts to write it; returns its future folder."""

    def poll(self) -> None:
        """Called after every step; completes a checkpoint whose files have been written."""

    def wait(self) -> None:
        """Waits until the checkpoint that is being written is complete."""
