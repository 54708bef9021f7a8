"""Chooses the checkpoint from which a run resumes: the newest whole one, or the named one."""

from __future__ import annotations

import logging
import time
from pathlib import Path

from pypkg.config import Settings
from pypkg.errors import UserError
from pypkg.parallel.comm.collective import from_first_rank
from pypkg.training.checkpoint.folders import (
    checkpoints,
    is_marked,
    remove_checkpoint,
    set_aside,
    step_in_name,
)
from pypkg.training.checkpoint.parts import Parts
from pypkg.training.checkpoint.verify import Report
from pypkg.training.ledger import OVERWRITTEN, events, record
from pypkg.training.start.read_progress import read_progress
from pypkg.training.start.start_up import folder_with_weights
from pypkg.training.state import TrainerState

logger = logging.getLogger("pypkg")


def checkpoint_to_resume(settings: Settings, parts: Parts | None = None) -> Path | None:
    """The checkpoint from which the run resumes, ready to be read; None for a new run.

    It is ``resume_from_checkpoint`` if that is set. Otherwise it is the newest checkpoint in
    ``output_dir`` that is whole on all machines; newer damaged ones are renamed. With
    ``overwrite_output_dir`` the checkpoints in ``output_dir`` are removed. Every rank must call
    this.

    Raises:
        UserError: the named checkpoint, all checkpoints in ``output_dir``, or the one that
            ``continue_training`` starts from are damaged; or ``ignore_load_lr_and_optim`` restarts
            the count of steps while ``output_dir`` holds checkpoints, so both runs' would mix.
    """
    parts = parts or Parts()
    chosen = _choose(settings, parts)
    if chosen is not None:
        parts.open(chosen)
    return chosen


def _choose(settings: Settings, parts: Parts) -> Path | None:
    found = _all_checkpoints(settings, parts)
    if found and settings.ignore_load_lr_and_optim and not settings.overwrite_output_dir:
        raise UserError(
            f"ignore_load_lr_and_optim is true, which counts steps from 0 again, but output_dir "
            f"{settings.output_dir!r} holds {found[-1].name} already. Set output_dir to another "
            "folder and resume_from_checkpoint to the checkpoint whose weights to take."
        )
    if settings.resume_from_checkpoint:
        return _named_checkpoint(Path(settings.resume_from_checkpoint), settings, parts)
    if settings.overwrite_output_dir:
        if found:
            logger.info("overwrite_output_dir: starting anew, removing %d checkpoints", len(found))
        parts.places.from_leader(lambda: _remove_all(settings))
        from_first_rank(lambda: _record_new_start(settings))
        found = []
    newest = _newest_whole(found, settings, parts)
    if newest is None and settings.continue_training:
        _check_first_weights(folder_with_weights(settings), settings, parts)
    return newest


def best_checkpoint(
    settings: Settings, state: TrainerState, parts: Parts | None = None
) -> Path | None:
    """The best checkpoint, ready to be read, if ``load_best_model_at_end`` is set; else None.

    None too, with a warning, if it is missing or damaged. Every rank must call this.
    """
    if not settings.load_best_model_at_end or state.best_checkpoint is None:
        return None
    parts = parts or Parts()
    best = Path(settings.output_dir, state.best_checkpoint)
    if not all(parts.places.from_leaders(best.is_dir)):
        logger.warning("the best checkpoint, %s, is gone: the run ends with the last model", best)
        return None
    if damage := _damage(best, settings.verify_checkpoint, parts):
        logger.warning(
            "the best checkpoint, %s, is damaged (%s): the run ends with the last model",
            *(best, "; ".join(damage)),
        )
        return None
    parts.open(best)
    return best


def _all_checkpoints(settings: Settings, parts: Parts) -> list[Path]:
    """The checkpoints of all places, oldest first."""
    by_place = parts.places.from_leaders(lambda: checkpoints(settings.output_dir))
    found = {(step, folder.name) for each in by_place for step, folder in each}
    return [Path(settings.output_dir, name) for _, name in sorted(found)]


def _remove_all(settings: Settings) -> None:
    for _, folder in checkpoints(settings.output_dir):
        remove_checkpoint(folder)


def _record_new_start(settings: Settings) -> None:
    if events(settings.output_dir):
        record(settings.output_dir, OVERWRITTEN, step=0)


def _named_checkpoint(folder: Path, settings: Settings, parts: Parts) -> Path:
    if not any(parts.places.from_leaders(lambda: is_marked(folder))):
        return folder  # weights alone, or no checkpoint, which the reader reports
    if damage := _damage(folder, settings.verify_checkpoint, parts):
        raise UserError(
            f"resume_from_checkpoint is {str(folder)!r}, which is damaged: {'; '.join(damage)}. "
            "Name another checkpoint, or set verify_checkpoint to no to take it as it is."
        )
    return folder


def _check_first_weights(folder: Path, settings: Settings, parts: Parts) -> None:
    """Checks the folder that ``continue_training`` starts from, if it is a checkpoint of a run."""
    if not any(parts.places.from_leaders(lambda: is_marked(folder))):
        return
    if damage := _damage(folder, settings.verify_checkpoint, parts):
        raise UserError(
            f"model_name_or_path is the checkpoint {str(folder)!r}, which is damaged: "
            f"{'; '.join(damage)}. Name another one, or set verify_checkpoint to no to take it as "
            "it is."
        )
    parts.open(folder)


def _newest_whole(found: list[Path], settings: Settings, parts: Parts) -> Path | None:
    """The newest whole checkpoint of ``found`` (oldest first); renames newer damaged ones."""
    damaged: list[tuple[Path, str]] = []
    for folder in reversed(found):
        damage = _damage(folder, settings.verify_checkpoint, parts)
        if not damage:
            for other, faults in damaged:
                _set_aside(other, faults, settings, parts)
            return folder
        damaged.append((folder, "; ".join(damage)))
    if not damaged:
        return None
    listed = "\n".join(f"  - {folder.name}: {faults}" for folder, faults in damaged)
    raise UserError(
        f"no checkpoint in output_dir {settings.output_dir!r} is whole:\n{listed}\nName a "
        "checkpoint of another folder in resume_from_checkpoint, set overwrite_output_dir to start "
        "anew, or set verify_checkpoint to no to take the newest as it is."
    )


def _set_aside(folder: Path, faults: str, settings: Settings, parts: Parts) -> None:
    """Renames a damaged checkpoint in each place."""
    kept = parts.places.from_leaders(lambda: set_aside(folder).name if folder.exists() else None)

    def report() -> None:
        kept_as = next(name for name in kept if name is not None)
        logger.warning("%s is damaged and kept as %s: %s", folder, kept_as, faults)
        record(
            *(settings.output_dir, "damaged_checkpoint"),
            checkpoint=folder.name, kept_as=kept_as, damage=faults, step=step_in_name(folder),
        )  # fmt: skip

    from_first_rank(report)


def _damage(folder: Path, checks: str, parts: Parts) -> tuple[str, ...]:
    """The faults of a checkpoint. With checks "no" only a missing folder is one."""
    started = time.monotonic()
    report = parts.verify(folder, checks, read_progress(str(folder)))
    if not report.damage and checks != "no":
        _log_checked(report, checks, time.monotonic() - started)
    return report.damage


def _log_checked(report: Report, checks: str, seconds: float) -> None:
    if report.manifest is None:
        logger.info(
            "%s has no manifest, as checkpoints of earlier versions and of PaddleNLP: its contents "
            "cannot be verified",
            report.folder,
        )
        return
    size = sum(record.size for record in report.manifest.files.values())
    logger.info(
        "%s is whole: %d files, %.3g GB, by %s in %.1f s",
        *(report.folder, len(report.manifest.files), size / 1e9, checks, seconds),
    )
