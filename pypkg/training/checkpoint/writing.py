"""Writing a checkpoint that is either whole or absent."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

from safetensors import SafetensorError

from pypkg.errors import UserError
from pypkg.files import replace_folder
from pypkg.models.weights.formats.safetensors import TensorSpec, write_tensors
from pypkg.parallel import mesh
from pypkg.parallel.comm.collective import from_first_rank, is_first_rank
from pypkg.parallel.optimizer.updater import Updater
from pypkg.training.checkpoint.folders import (
    OPTIMIZER_FILE,
    SETTINGS_FILE,
    STATE_FILE,
    TEMPORARY_PREFIX,
    checkpoint_name,
    checkpoints,
    remove_checkpoint,
    surplus,
)
from pypkg.training.checkpoint.manifest import write_manifest
from pypkg.training.state import TrainerState

logger = logging.getLogger("pypkg")


def save_checkpoint(
    output_dir: str | Path,
    state: TrainerState,
    *,
    save_model: Callable[[Path], None],
    updater: Updater | None,
    settings_json: str,
    keep: int | None = None,
) -> Path:
    """Writes ``checkpoint-<global_step>`` and then removes the oldest beyond ``keep``.

    The newest and ``state.best_checkpoint`` always stay.

    All ranks have to call this; the first writes what the others hand over.

    Args:
        save_model: writes the weights into a folder; every rank takes part.
        updater: whose state is written, in the form of whole parameters; None writes none.

    Raises:
        UserError: the disk is full or the folder cannot be written; earlier checkpoints are
            untouched and nothing half-written stays. Raised on every rank.
    """
    final = Path(output_dir) / checkpoint_name(state)
    temporary = Path(output_dir) / f"{TEMPORARY_PREFIX}{state.global_step}-{os.getpid()}"
    failure: UserError | None = None
    moments = updater.state() if updater is not None else iter(())
    from_first_rank(lambda: _begin(final, temporary))
    try:
        with _saving(final, temporary):
            save_model(temporary)
            if updater is not None and is_first_rank():
                shapes = updater.state_shapes().items()
                specs = {name: TensorSpec("float32", shape) for name, shape in shapes}
                write_tensors(temporary / OPTIMIZER_FILE, specs, moments)
    except UserError as error:  # the others learn of it at the next thing done together
        failure = error
    for _ in moments:  # what other ranks hand over, and what this one could not write
        pass

    def finish() -> None:
        if failure is not None:
            raise failure
        with _saving(final, temporary):
            (temporary / SETTINGS_FILE).write_text(settings_json, encoding="utf-8")
            (temporary / STATE_FILE).write_text(
                json.dumps(asdict(state), indent=2), encoding="utf-8"
            )
            write_manifest(temporary, state, asdict(mesh.current().degrees))
            replace_folder(temporary, final)
        if keep is not None and keep > 0:
            for folder in surplus(output_dir, keep, state.best_checkpoint):
                try:
                    remove_checkpoint(folder)
                except UserError as error:
                    logger.warning("%s", error)

    from_first_rank(finish)
    return final


def _begin(final: Path, temporary: Path) -> None:
    with _saving(final, temporary):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)


@contextlib.contextmanager
def _saving(final: Path, temporary: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError, UserError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        older = checkpoints(final.parent)
        kept = f" The last complete checkpoint is {older[-1][1]}." if older else ""
        raise UserError(
            f"saving {final} failed: {_reason(error)}.{kept} Free some space or set output_dir to "
            "another disk, then start the same command again."
        ) from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _reason(error: BaseException) -> str:
    if isinstance(error, UserError) and error.__cause__ is not None:
        error = error.__cause__
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
    if full or "No space left" in str(error):
        return "the disk is full"
    return getattr(error, "strerror", None) or str(error)
