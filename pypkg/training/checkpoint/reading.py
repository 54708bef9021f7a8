"""Reading a checkpoint, of this trainer or of PaddleNLP's."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from pypkg.errors import UserError
from pypkg.models.architecture.config import ModelConfig
from pypkg.parallel.optimizer.updater import Updater
from pypkg.training.checkpoint import paddlenlp
from pypkg.training.checkpoint.folders import OPTIMIZER_FILE, STATE_FILE
from pypkg.training.state import TrainerState


def load_trainer_state(checkpoint: str | Path, seq_length: int = 0) -> TrainerState:
    """Reads trainer_state.json, ours or PaddleNLP's.

    Args:
        seq_length: tokens of a sample, from which those of a PaddleNLP run are counted.

    Raises:
        UserError: the folder is no checkpoint, or the file is damaged.
    """
    file = Path(checkpoint) / STATE_FILE
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if paddlenlp.is_trainer_state(content):
            return paddlenlp.trainer_state(content, file, seq_length)
        return TrainerState.from_json(content)
    except FileNotFoundError as error:
        raise UserError(
            f"{checkpoint} is not a checkpoint: it holds no {STATE_FILE}. resume_from_checkpoint "
            "takes a checkpoint-N folder of an earlier output_dir."
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
    file = Path(checkpoint) / OPTIMIZER_FILE
    if config is not None and paddlenlp.has_optimizer(Path(checkpoint)):
        stored = paddlenlp.OptimizerState(Path(checkpoint), config)
        updater.load_state(stored.read)
        stored.log_unread()
        return
    if not file.is_file():
        raise UserError(
            f"{checkpoint} holds no {OPTIMIZER_FILE}, nor PaddleNLP's optimizer state, as "
            "checkpoints with ignore_save_lr_and_optim do. Resume from another one, or set "
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
