"""Detects what a resumed run changes: model, learning rate, layout and global batch."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pypkg.config import Settings, load_settings
from pypkg.errors import UserError
from pypkg.files.checksums import SealError
from pypkg.models import ModelConfig
from pypkg.models.architecture.family import differing_fields
from pypkg.parallel.mesh import Degrees
from pypkg.training.checkpoint.folders import SETTINGS_FILE
from pypkg.training.checkpoint.manifest import read_manifest
from pypkg.training.ledger import record
from pypkg.training.state import TrainerState
from pypkg.training.step.schedule import learning_rate

logger = logging.getLogger("pypkg")

_SCHEDULE_SETTINGS = (
    "learning_rate", "min_learning_rate", "lr_scheduler_type", "warmup_steps", "warmup_ratio",
    "decay_steps", "max_steps", "lr_end", "power", "num_cycles", "lr_wsd_decay_steps",
    "lr_wsd_decay_style",
)  # fmt: skip
_SIZES = (
    "model_type", "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads",
    "num_key_value_heads", "head_dim",
)  # fmt: skip
# A run may change these between the model's folder and its checkpoint, or they are used up.
_MAY_DIFFER = (
    "vocab_size", "max_position_embeddings", "tie_word_embeddings", "initializer_range",
    "initialization", "bos_token_id", "eos_token_id", "pad_token_id", "layer_types",
)  # fmt: skip


def check_resumed_model(
    settings: Settings, checkpoint: Path, given: ModelConfig, held: ModelConfig
) -> None:
    """Compares the model of a checkpoint, which the run trains, with that of the settings.

    Logs a warning if they differ in more than their sizes.

    Args:
        given: by model_name_or_path and the settings that override it.
        held: by config.json of ``checkpoint``.

    Raises:
        UserError: their sizes differ, so that the settings are of another run.
    """
    name = settings.model_name_or_path
    sizes = [
        f"{field} is {getattr(held, field)}, not {getattr(given, field)}"
        for field in _SIZES
        if getattr(held, field) != getattr(given, field)
    ]
    if sizes:
        raise UserError(
            f"{checkpoint} holds another model than the settings ask for (model_name_or_path "
            f"{name!r}): {', '.join(sizes)}. To go on with the checkpoint, give its model. To "
            "train the other model, set output_dir to another folder, or overwrite_output_dir to "
            "true"
        )
    others = [
        each for each in differing_fields(held, given) if each.partition("=")[0] not in _MAY_DIFFER
    ]
    if others:
        logger.warning(
            "the model is that of %s, which differs from model_name_or_path (%s): %s",
            *(checkpoint, name, ", ".join(others)),
        )


def check_resumed(settings: Settings, checkpoint: Path, state: TrainerState) -> None:
    """Logs a warning if the learning rate jumps at the first step after ``checkpoint``.

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


def record_resumed(
    settings: Settings, checkpoint: Path, state: TrainerState, degrees: Degrees
) -> None:
    """Records in the ledger that a run resumes from ``checkpoint``, with changes of the layout.

    Logs a warning if the global batch changes. Only one rank calls this.
    """
    folder, step, layout = settings.output_dir, state.global_step, asdict(degrees)
    record(folder, "resumed", step=step, checkpoint=str(checkpoint), layout=layout)
    earlier = _earlier_layout(checkpoint)
    # A checkpoint of a version that lacked an axis had one rank on it.
    if earlier and asdict(Degrees()) | dict(earlier) != layout:
        record(folder, "layout_changed", step=step, before=earlier, after=layout)
    before = _earlier_batch(checkpoint, state, earlier)
    after = _global_batch(settings, layout)
    if before is None or before == after:
        return
    record(folder, "global_batch_changed", step=step, before=before, after=after)
    shards = degrees.data * degrees.sharding
    logger.warning(
        "a step takes %d samples (per_device_train_batch_size %d x gradient_accumulation_steps %d "
        "x %d ranks with samples of their own), but the steps before %s took %d; %s",
        *(after, settings.per_device_train_batch_size, settings.gradient_accumulation_steps),
        *(shards, checkpoint, before, _way_to_batch(settings, before, shards)),
    )


def _way_to_batch(s: Settings, samples: int, shards: int) -> str:
    """Which value of which setting keeps a global batch of ``samples``, as text."""
    for name, other in (
        ("gradient_accumulation_steps", s.per_device_train_batch_size),
        ("per_device_train_batch_size", s.gradient_accumulation_steps),
    ):
        if samples % (other * shards) == 0:
            return f"{name} {samples // (other * shards)} keeps {samples}"
    return f"no setting keeps {samples}, which {shards} ranks do not divide in these micro batches"


def _global_batch(s: Settings, layout: Mapping[str, Any]) -> int:
    shards = layout["data"] * layout["sharding"]
    return s.per_device_train_batch_size * s.gradient_accumulation_steps * shards


def _earlier_layout(checkpoint: Path) -> Mapping[str, Any] | None:
    """The layout of the run that wrote ``checkpoint``; None if it is not recorded."""
    with contextlib.suppress(OSError, SealError, UserError):
        manifest = read_manifest(checkpoint)
        return manifest.layout if manifest is not None else None
    return None


def _earlier_batch(
    checkpoint: Path, state: TrainerState, layout: Mapping[str, Any] | None
) -> int | None:
    """Samples per step before ``checkpoint``; None if they are not known."""
    earlier = _earlier_settings(checkpoint)
    if earlier is not None and layout is not None and {"data", "sharding"} <= layout.keys():
        return _global_batch(earlier, layout)
    if state.global_step and state.consumed_samples % state.global_step == 0:
        return state.consumed_samples // state.global_step
    return None


def _earlier_settings(checkpoint: Path) -> Settings | None:
    with contextlib.suppress(UserError):  # the file is of another version, or missing
        return load_settings([str(checkpoint / SETTINGS_FILE)])
    return None


def _decay_begins(earlier: Settings, settings: Settings, updates: int) -> bool:
    """Whether the decay of warmup_stable_decay starts here, at the earlier run's plateau."""
    length, last = settings.lr_wsd_decay_steps, settings.decay_steps
    return (
        settings.lr_scheduler_type == "warmup_stable_decay"
        and length is not None
        and last is not None
        and last - length == updates
        and learning_rate(earlier, updates) == settings.learning_rate
    )


def _jump(settings: Settings, checkpoint: Path, state: TrainerState) -> str | None:
    """A warning if the settings change the learning rate of the next step; else None."""
    earlier = _earlier_settings(checkpoint)
    if earlier is None:
        return None
    updates = state.global_step - state.skipped_steps
    before, now = learning_rate(earlier, updates), learning_rate(settings, updates)
    if math.isclose(before, now, rel_tol=1e-3) or _decay_begins(earlier, settings, updates):
        return None
    changed = [
        f"{name} was {getattr(earlier, name)} and is {getattr(settings, name)}"
        for name in _SCHEDULE_SETTINGS
        if getattr(earlier, name) != getattr(settings, name)
    ]
    way_out = ""
    kept = learning_rate(replace(settings, decay_steps=earlier.decay_steps), updates)
    if math.isclose(before, kept, rel_tol=1e-3):  # not if the schedule changes too
        way_out = f"; a decay_steps of {earlier.decay_steps:g} keeps the earlier decay"
    return (
        f"the learning rate of step {state.global_step + 1} is {now:.3g}, but would have been "
        f"{before:.3g} with the settings of {checkpoint}: {', '.join(changed)}{way_out}"
    )
