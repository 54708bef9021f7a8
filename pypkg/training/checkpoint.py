"""Checkpoints that are either whole or absent.

``output_dir/checkpoint-N/`` holds a Hugging Face model folder (config.json, safetensors), and
beside it optimizer.safetensors, trainer_state.json, settings.json and the tokenizer's files. All
is written and synced under a temporary name first and then renamed, so a folder with the final
name is complete whatever happened.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import paddle
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from pypkg.errors import UserError
from pypkg.training.optimizer import load_optimizer_state, optimizer_state

_NAME = re.compile(r"checkpoint-(\d+)$")
_TEMPORARY = "tmp-checkpoint-"
_OPTIMIZER = "optimizer.safetensors"
_STATE = "trainer_state.json"
_SETTINGS = "settings.json"


@dataclass
class TrainerState:
    """What resuming needs besides weights and moments.

    pending_losses are the losses of the steps since the last log line, so that the first line
    after a resume is the one that an uninterrupted run prints. data_order names everything that
    decides which tokens make sample i.
    """

    global_step: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0
    initial_loss: float | None = None
    pending_losses: list[float] = field(default_factory=list)
    data_order: dict = field(default_factory=dict)


def checkpoints(output_dir: str | Path) -> list[tuple[int, Path]]:
    """Complete checkpoints of a run as (step, folder), oldest first."""
    folder = Path(output_dir)
    if not folder.is_dir():
        return []
    found = []
    for entry in folder.iterdir():
        match = _NAME.match(entry.name)
        if match and (entry / _STATE).is_file():
            found.append((int(match.group(1)), entry))
    return sorted(found)


def prepare_output_dir(output_dir: str | Path) -> None:
    """Makes the folder, proves that it can be written, and removes what a killed save left.

    Raises:
        UserError: it cannot be made or written.
    """
    folder = Path(output_dir)
    probe = folder / f".write-test-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"output_dir {str(folder)!r} cannot be written: {error.strerror}. "
            "Set output_dir to a folder you may write."
        ) from error
    for stale in folder.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(stale, ignore_errors=True)


def save_checkpoint(
    output_dir: str | Path,
    state: TrainerState,
    *,
    save_model: Callable[[Path], None],
    model: paddle.nn.Layer,
    optimizer: paddle.optimizer.Optimizer,
    settings_json: str,
    keep: int | None = None,
) -> Path:
    """Writes ``checkpoint-<global_step>`` and then removes the oldest beyond ``keep``.

    Raises:
        UserError: the disk is full or the folder cannot be written; earlier checkpoints are
            untouched and nothing half-written stays.
    """
    final = Path(output_dir) / f"checkpoint-{state.global_step}"
    temporary = Path(output_dir) / f"{_TEMPORARY}{state.global_step}-{os.getpid()}"
    with _saving(final, temporary):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        save_model(temporary)
        moments = {
            k: np.ascontiguousarray(v.numpy()) for k, v in optimizer_state(optimizer, model).items()
        }
        save_file(moments, temporary / _OPTIMIZER)
        (temporary / _SETTINGS).write_text(settings_json, encoding="utf-8")
        (temporary / _STATE).write_text(json.dumps(asdict(state), indent=2), encoding="utf-8")
        _sync(temporary)
        shutil.rmtree(final, ignore_errors=True)
        os.rename(temporary, final)
        _sync_folder(final.parent)
    if keep is not None and keep > 0:
        for _, folder in checkpoints(output_dir)[:-keep]:
            shutil.rmtree(folder, ignore_errors=True)
    return final


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


def _sync(folder: Path) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load_trainer_state(checkpoint: str | Path) -> TrainerState:
    """Reads trainer_state.json.

    Raises:
        UserError: the folder is no checkpoint of ours, or the file is damaged.
    """
    file = Path(checkpoint) / _STATE
    try:
        return TrainerState(**json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise UserError(
            f"{checkpoint} is not a checkpoint: it holds no {_STATE}. resume_from_checkpoint takes "
            "a checkpoint-N folder of an earlier output_dir."
        ) from error
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{file} cannot be read: {error}. Resume from an older one.") from error


def load_optimizer(
    checkpoint: str | Path, model: paddle.nn.Layer, optimizer: paddle.optimizer.Optimizer
) -> None:
    """Reads the moments that belong to the model's parameters.

    Raises:
        UserError: the file is missing, damaged, or of another model.
    """
    file = Path(checkpoint) / _OPTIMIZER
    try:
        state = {name: paddle.to_tensor(array) for name, array in load_file(file).items()}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} cannot be read: {error}. Resume from an older one.") from error
    if not state:
        return  # saved before the first update
    try:
        load_optimizer_state(optimizer, model, state)
    except KeyError as error:
        raise UserError(
            f"{file} holds no {error.args[0]}: it belongs to another model. Set "
            "overwrite_output_dir to start anew, or choose another output_dir."
        ) from error
