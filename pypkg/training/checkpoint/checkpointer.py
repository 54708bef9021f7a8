"""What a checkpoint of a run is made of, and how a run gets it back."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from pypkg.models.pretrained import Model, model_config_json, model_tensors
from pypkg.models.weights.model_folder import (
    CONFIG_FILE,
    DEFAULT_SHARD_SIZE,
    parse_size,
    write_json,
)
from pypkg.parallel.optimizer.updater import Updater
from pypkg.training.checkpoint.reading import load_optimizer
from pypkg.training.checkpoint.writing import CheckpointWriting, optimizer_tensors
from pypkg.training.state import TrainerState

logger = logging.getLogger("pypkg")


class RecordsOrder(Protocol):
    def record(self, state: TrainerState) -> None:
        """Stores the order of samples in ``state.data_order``."""


class Checkpointer:
    """Saves and restores model, optimizer state, loss scale, order of samples and tokenizer.

    Args:
        output_dir: holds the checkpoints.
        model: this rank's, as ``save_pretrained`` takes it.
        updater: of that model.
        samples: knows the order of samples.
        tokenizer_files: copied into each checkpoint.
        settings_json: the settings of the run.
        keep: number of checkpoints to keep; None or 0 keeps all.
        with_optimizer: whether optimizer state is saved.
    """

    def __init__(
        self,
        output_dir: str | Path,
        model: Model,
        updater: Updater,
        samples: RecordsOrder,
        *,
        tokenizer_files: Sequence[Path],
        settings_json: str,
        keep: int | None,
        with_optimizer: bool = True,
    ) -> None:
        self._output_dir = output_dir
        self._model, self._updater, self._samples = model, updater, samples
        self._tokenizer_files = tokenizer_files
        self._settings_json, self._keep = settings_json, keep
        self._with_optimizer = with_optimizer

    def save(self, state: TrainerState) -> Path:
        """Writes ``checkpoint-<global_step>`` and returns its folder; all ranks have to call it.

        ``state`` receives the order of samples and the loss scale.

        Raises:
            UserError: the disk is full, the folder cannot be written, or a weight is NaN or
                infinite; on every rank.
        """
        self._samples.record(state)
        if self._updater.scaler is not None:
            state.loss_scale = self._updater.scaler.state()
        tensor_sets = [model_tensors(self._model, parse_size(DEFAULT_SHARD_SIZE))]
        if self._with_optimizer:
            tensor_sets.append(optimizer_tensors(self._updater))
        return CheckpointWriting(
            self._output_dir,
            state,
            tensor_sets=tensor_sets,
            add_files=self._add_files,
            settings_json=self._settings_json,
            keep=self._keep,
        ).finish()

    def restore(self, checkpoint: Path, state: TrainerState) -> None:
        """Loads optimizer state and loss scale, for a model that has the weights of ``checkpoint``.

        Args:
            state: of ``checkpoint``.

        Raises:
            UserError: optimizer.safetensors is missing, damaged, or of another model.
        """
        load_optimizer(checkpoint, self._updater, self._model.config)
        if self._updater.scaler is not None and state.loss_scale:
            self._updater.scaler.load_state(state.loss_scale)
        logger.info("resuming from %s at step %d", checkpoint, state.global_step)

    def _add_files(self, folder: Path) -> None:
        write_json(folder / CONFIG_FILE, model_config_json(self._model))
        for file in self._tokenizer_files:
            shutil.copy(file, folder)
