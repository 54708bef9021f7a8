"""What a checkpoint of a run is made of, and how a run gets it back."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from pypkg.errors import UserError
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
        tokenizer_files: read here, and written into each checkpoint.
        settings_json: the settings of the run.
        keep: number of checkpoints to keep; None or 0 keeps all.
        with_optimizer: whether optimizer state is saved.
        seq_length: tokens of a sample, for a checkpoint of PaddleNLP.
        check_output_dir: called before each save; raises UserError where the run may no longer
            write there.

    Raises:
        UserError: a file of the tokenizer cannot be read.
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
        check_output_dir: Callable[[], None] = lambda: None,
    ) -> None:
        self._output_dir = output_dir
        self._model, self._updater, self._samples = model, updater, samples
        self._tokenizer = {file.name: _read(file) for file in tokenizer_files if is_first_rank()}
        self._settings_json, self._keep = settings_json, keep
        self._with_optimizer = with_optimizer
        self._seq_length = seq_length
        self._check_output_dir = check_output_dir

    def save(self, state: TrainerState) -> Path:
        """Writes ``checkpoint-<global_step>`` and returns its folder; all ranks have to call it.

        ``state`` receives the order of samples and the loss scale.

        Raises:
            UserError: the disk is full or the folder cannot be written, or is no longer this
                run's; on every rank.
        """
        self._check_output_dir()
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
        for name, content in self._tokenizer.items():
            (folder / name).write_bytes(content)


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise UserError(
            f"{file}, a part of the tokenizer, cannot be read: {error.strerror}. Set "
            "tokenizer_name_or_path to a folder that stays while the run starts."
        ) from error
