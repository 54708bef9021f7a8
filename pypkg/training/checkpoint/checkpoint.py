"""Checkpoints that are either whole or absent.

``output_dir/checkpoint-N/`` holds a Hugging Face model folder (config.json, safetensors), and
beside it optimizer.safetensors, trainer_state.json, settings.json and the tokenizer's files. The
folder is written and synced under a temporary name and then renamed, so a folder with the final
name is always complete.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from pypkg.errors import UserError
from pypkg.files import replace_folder
from pypkg.models.architecture.config import ModelConfig
from pypkg.models.weights.formats.safetensors import TensorSpec, write_tensors
from pypkg.parallel.comm.collective import from_first_rank, is_first_rank
from pypkg.parallel.optimizer.updater import Updater
from pypkg.training.checkpoint import paddlenlp
from pypkg.training.state import TrainerState

_NAME = re.compile(r"checkpoint-(\d+)$")
_TEMPORARY = "tmp-checkpoint-"
_OPTIMIZER = "optimizer.safetensors"
_STATE = "trainer_state.json"
_SETTINGS = "settings.json"


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


def checkpoint_name(state: TrainerState) -> str:
    """Name of the folder that a checkpoint of ``state`` has."""
    return f"checkpoint-{state.global_step}"


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
    temporary = Path(output_dir) / f"{_TEMPORARY}{state.global_step}-{os.getpid()}"
    failure: UserError | None = None
    moments = updater.state() if updater is not None else iter(())
    from_first_rank(lambda: _begin(final, temporary))
    try:
        with _saving(final, temporary):
            save_model(temporary)
            if updater is not None and is_first_rank():
                shapes = updater.state_shapes().items()
                specs = {name: TensorSpec("float32", shape) for name, shape in shapes}
                write_tensors(temporary / _OPTIMIZER, specs, moments)
    except UserError as error:  # the others learn of it at the next thing done together
        failure = error
    for _ in moments:  # what other ranks hand over, and what this one could not write
        pass

    def finish() -> None:
        if failure is not None:
            raise failure
        with _saving(final, temporary):
            (temporary / _SETTINGS).write_text(settings_json, encoding="utf-8")
            (temporary / _STATE).write_text(json.dumps(asdict(state), indent=2), encoding="utf-8")
            replace_folder(temporary, final)
        if keep is not None and keep > 0:
            for folder in _surplus(output_dir, keep, state.best_checkpoint):
                shutil.rmtree(folder, ignore_errors=True)

    from_first_rank(finish)
    return final


def _surplus(output_dir: str | Path, keep: int, best: str | None) -> list[Path]:
    """The oldest checkpoints beyond ``keep``, but neither the newest nor the one named ``best``."""
    older = [folder for _, folder in checkpoints(output_dir)][:-1]
    others = [folder for folder in older if folder.name != best]
    places = keep - 1 - (len(older) - len(others))
    return others[: max(len(others) - max(places, 0), 0)]


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


def load_trainer_state(checkpoint: str | Path, seq_length: int = 0) -> TrainerState:
    """Reads trainer_state.json, ours or PaddleNLP's.

    Args:
        seq_length: tokens of a sample, from which those of a PaddleNLP run are counted.

    Raises:
        UserError: the folder is no checkpoint, or the file is damaged.
    """
    file = Path(checkpoint) / _STATE
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if paddlenlp.is_trainer_state(content):
            return paddlenlp.trainer_state(content, file, seq_length)
        return TrainerState.from_json(content)
    except FileNotFoundError as error:
        raise UserError(
            f"{checkpoint} is not a checkpoint: it holds no {_STATE}. resume_from_checkpoint takes "
            "a checkpoint-N folder of an earlier output_dir."
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} cannot be read: {error}. Resume from an older one.") from error


def load_optimizer(
    checkpoint: str | Path, updater: Updater, config: ModelConfig | None = None
) -> None:
    """Reads the optimizer state that belongs to the parameters of this rank, ours or PaddleNLP's.

    Args:
        config: of the model, without which PaddleNLP's state cannot be read.

    Raises:
        UserError: the file is missing, damaged, or of another model.
    """
    file = Path(checkpoint) / _OPTIMIZER
    if config is not None and paddlenlp.has_optimizer(Path(checkpoint)):
        stored = paddlenlp.OptimizerState(Path(checkpoint), config)
        updater.load_state(stored.read)
        stored.log_unread()
        return
    if not file.is_file():
        raise UserError(
            f"{checkpoint} holds no {_OPTIMIZER}, nor PaddleNLP's optimizer state, as checkpoints "
            "with ignore_save_lr_and_optim do. Resume from another one, or set "
            "ignore_load_lr_and_optim to take only its weights."
        )
    try:
        with safe_open(file, framework="numpy") as stored:
            names = set(stored.keys())

            def read(name: str) -> np.ndarray:
                if name not in names:
                    raise KeyError(name)
                return stored.get_tensor(name)

            if names:  # else saved before the first update
                updater.load_state(read)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} cannot be read: {error}. Resume from an older one.") from error
    except KeyError as error:
        raise UserError(
            f"{file} holds no {error.args[0]}: it belongs to another model. Set "
            "overwrite_output_dir to start anew, or choose another output_dir."
        ) from error
