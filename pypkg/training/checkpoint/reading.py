"""Reads checkpoints of this trainer and of PaddleNLP's."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from pypkg.errors import UserError
from pypkg.files.json_files import unique_keys
from pypkg.models.architecture.config import ModelConfig
from pypkg.models.weights.formats.opening import is_file
from pypkg.models.weights.formats.safetensors import read_safetensors
from pypkg.models.weights.formats.stored_tensor import JoinedTensor, Shape, StoredTensor
from pypkg.models.weights.formats.tensor_files import read_file_shards
from pypkg.parallel.optimizer.updater import Updater
from pypkg.training.checkpoint import paddlenlp
from pypkg.training.checkpoint.folders import (
    OPTIMIZER_FILE,
    OPTIMIZER_INDEX,
    STATE_FILE,
    checkpoints,
)
from pypkg.training.checkpoint.manifest import MANIFEST_KEY
from pypkg.training.state import TrainerState


def load_trainer_state(checkpoint: str | Path, seq_length: int = 0) -> TrainerState:
    """Reads trainer_state.json of this trainer or of PaddleNLP's.

    Args:
        seq_length: tokens of a sample, to compute the consumed tokens of a PaddleNLP run.

    Raises:
        UserError: the folder is not a checkpoint, or the file is damaged.
    """
    file = Path(checkpoint) / STATE_FILE
    try:
        content = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=unique_keys)
        if paddlenlp.is_trainer_state(content):
            return paddlenlp.trainer_state(content, file, seq_length)
        if isinstance(content, dict):
            content.pop(MANIFEST_KEY, None)
        return TrainerState.from_json(content)
    except FileNotFoundError as error:
        inside = checkpoints(checkpoint)
        raise UserError(
            f"{checkpoint} is not a checkpoint: it holds no {STATE_FILE}. "
            + (
                f"It is the output_dir of a run whose newest checkpoint is {inside[-1][1]}: name "
                "that one in resume_from_checkpoint."
                if inside
                else "resume_from_checkpoint takes a checkpoint-N folder of an earlier output_dir."
            )
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} cannot be read: {error}. Resume from an older one.") from error


def load_optimizer(
    checkpoint: str | Path, updater: Updater, config: ModelConfig | None = None
) -> None:
    """Reads this rank's part of the optimizer state, written by this package or PaddleNLP.

    A checkpoint that was saved before the first update has no state, and nothing is loaded.

    Args:
        config: of the model; required to read PaddleNLP's state.

    Raises:
        UserError: the state is missing, damaged, or of another model.
    """
    if config is not None and paddlenlp.has_optimizer(Path(checkpoint)):
        stored = paddlenlp.OptimizerState(Path(checkpoint), config)
        updater.load_state(stored.read)
        stored.log_unread()
        return
    tensors = _optimizer_tensors(Path(checkpoint))
    if tensors:  # else saved before the first update
        _check_model(tensors, updater.full_state_shapes())
        updater.load_state(lambda name, cut: _read(tensors[name], name, cut))


def _optimizer_tensors(checkpoint: Path) -> dict[str, StoredTensor]:
    """The tensors of the optimizer state by name, from one file or from those of an index."""
    file, index = checkpoint / OPTIMIZER_FILE, checkpoint / OPTIMIZER_INDEX
    if not is_file(file) and not is_file(index):
        raise UserError(
            f"{checkpoint} holds no {OPTIMIZER_FILE}, nor PaddleNLP's optimizer state, as "
            "checkpoints with ignore_save_lr_and_optim do. Resume from another one, or set "
            "ignore_load_lr_and_optim to take only its weights."
        )
    try:
        return read_safetensors(file) if is_file(file) else read_file_shards(index)
    except UserError as error:
        path = file if is_file(file) else index
        raise UserError(f"{path} cannot be read: {error}. Resume from an older one.") from error


def _check_model(tensors: Mapping[str, StoredTensor], expected: Mapping[str, Shape]) -> None:
    """Raises UserError if a state tensor is missing or has another shape."""
    folder = next(iter(tensors.values())).file.parent
    for name, shape in expected.items():
        stored = tensors.get(name)
        if stored is None or stored.shape != shape:
            found = "does not hold" if stored is None else f"holds {list(stored.shape)} for"
            raise UserError(
                f"optimizer state of {folder} {found} {name} {list(shape)}: it belongs to another "
                "model or another optim. Set overwrite_output_dir to start anew, or choose another "
                "output_dir."
            )


def _read(tensor: StoredTensor, name: str, cut: Sequence[slice]) -> np.ndarray:
    return JoinedTensor((tensor,)).read(name, "float32", cut)
