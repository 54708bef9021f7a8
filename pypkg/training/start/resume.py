"""What changes where a run goes on from a checkpoint."""

from __future__ import annotations

import contextlib
import logging
import math
from pathlib import Path

from pypkg.config import Settings, load_settings
from pypkg.errors import UserError
from pypkg.training.state import TrainerState
from pypkg.training.step.schedule import learning_rate

logger = logging.getLogger("pypkg")

_OF_THE_RATE = (
    "learning_rate", "min_learning_rate", "lr_scheduler_type", "warmup_steps", "warmup_ratio",
    "decay_steps", "max_steps",
)  # fmt: skip


def check_resumed(settings: Settings, checkpoint: Path, state: TrainerState) -> None:
    """Warns of a learning rate that jumps at the first step after ``checkpoint``.

    Raises:
        UserError: ``max_steps`` is below the steps that ``checkpoint`` has completed.
    """
    if not settings.do_train:
        return
    if settings.max_steps < state.global_step:
        raise UserError(
            f"max_steps is {settings.max_steps}, but {checkpoint} has completed "
            f"{state.global_step} steps; raise max_steps, or name an older checkpoint in "
            "resume_from_checkpoint"
        )
    if settings.max_steps > state.global_step and (jump := _jump(settings, checkpoint, state)):
        logger.warning(jump)


def _jump(settings: Settings, checkpoint: Path, state: TrainerState) -> str | None:
    earlier = None
    with contextlib.suppress(UserError):  # of another version, or not there
        earlier = load_settings([str(checkpoint / "settings.json")])
    if earlier is None:
        return None
    updates = state.global_step - state.skipped_steps
    before, now = learning_rate(earlier, updates), learning_rate(settings, updates)
    if math.isclose(before, now, rel_tol=1e-3):
        return None
    changed = [
        f"{name} was {getattr(earlier, name)} and is {getattr(settings, name)}"
        for name in _OF_THE_RATE
        if getattr(earlier, name) != getattr(settings, name)
    ]
    way_out = ""
    if earlier.decay_steps != settings.decay_steps:
        way_out = f"; a decay_steps of {earlier.decay_steps:g} keeps the earlier decay"
    return (
        f"the learning rate of step {state.global_step + 1} is {now:.3g}, but would have been "
        f"{before:.3g} with the settings of {checkpoint}: {', '.join(changed)}{way_out}"
    )
