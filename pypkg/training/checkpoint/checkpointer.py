"""What a checkpoint of a run is made of, and how a run gets it back."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from pypkg.models import save_pretrained
from pypkg.models.pretrained import Model, model_dtype, weight_reader
from pypkg.parallel.comm.collective import is_first_rank
from pypkg.parallel.optimizer.updater import Updater
from pypkg.training.checkpoint.reading import load_optimizer, load_trainer_state
from pypkg.training.checkpoint.writing import save_checkpoint
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
        seq_length: tokens of a sample, for a checkpoint of PaddleNLP.
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
        seq_length: int = 0,
    ) -> None:
        self._output_dir = output_dir
        self._model, self._updater, self._samples = model, updater, samples
        self._tokenizer_files = tokenizer_files
        self._settings_json, self._keep = settings_json, keep
        self._with_optimizer = with_optimizer
        self._seq_length = seq_length

    def save(self, state: TrainerState) -> Path:
        """Writes ``checkpoint-<global_step>`` and returns its folder; all ranks have to call it.

        ``state`` receives the order of samples and the loss scale.

        Raises:
            UserError: the disk is full or the folder cannot be written; on every rank.
        """
        self._samples.record(state)
        if self._updater.scaler is not None:
            state.loss_scale = self._updater.scaler.state()
        return save_checkpoint(
            self._output_dir,
            state,
            save_model=self._save_model_and_tokenizer,
            updater=self._updater if self._with_optimizer else None,
            settings_json=self._settings_json,
            keep=self._keep,
        )

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

    def reload(self, checkpoint: Path) -> TrainerState:
        """Puts model, optimizer and loss scale back to ``checkpoint``, in place.

        All ranks have to call it, under the layout that the model has.

        Returns:
            The state of ``checkpoint``.

        Raises:
            UserError: a file is missing or damaged.
        """
        state = load_trainer_state(checkpoint, self._seq_length)
        config = self._model.config
        read = weight_reader(checkpoint, config, model_dtype(self._model))
        self._updater.assign_parameters(read)
        self.restore(checkpoint, state)
        return state

    def _save_model_and_tokenizer(self, folder: Path) -> None:
        save_pretrained(self._model, folder)
        if is_first_rank():
            for file in self._tokenizer_files:
                shutil.copy(file, folder)
