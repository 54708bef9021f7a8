"""What a checkpoint of a run is made of, and how a run gets it back."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from pypkg.models.pretrained import Model, model_config_json, model_tensors
from pypkg.models.weights.model_folder import (
    CONFIG_FILE,
    DEFAULT_SHARD_SIZE,
    parse_size,
    write_json,
)
from pypkg.models.weights.tensor_writer import FileToWrite, TensorWriter, ThreadWriter
from pypkg.models.weights.writer_process import ProcessWriter, RingMemory
from pypkg.parallel.comm.collective import on_all_ranks
from pypkg.parallel.optimizer.updater import Updater
from pypkg.training.checkpoint.reading import load_optimizer
from pypkg.training.checkpoint.writing import CheckpointWriting, optimizer_tensors
from pypkg.training.state import TrainerState

logger = logging.getLogger("pypkg")


class RecordsOrder(Protocol):
    def record(self, state: TrainerState) -> None:
        """Stores the order of samples in ``state.data_order``."""


class _Pending(NamedTuple):
    """A checkpoint that is being written, when it began, and for how long training stood still."""

    writing: CheckpointWriting
    began: float
    stall: float


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
        async_memory: bytes of host memory in which a rank holds what it has yet to write while
            training goes on; None: training stands still until a checkpoint is complete.
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
        async_memory: int | None = None,
    ) -> None:
        self._output_dir = output_dir
        self._model, self._updater, self._samples = model, updater, samples
        self._tokenizer_files = tokenizer_files
        self._settings_json, self._keep = settings_json, keep
        self._with_optimizer = with_optimizer
        self._ring = None if async_memory is None else RingMemory(async_memory)
        self._pending: _Pending | None = None

    def save(self, state: TrainerState) -> None:
        """Writes ``checkpoint-<global_step>``, or begins to; all ranks have to call it.

        ``state`` receives the order of samples and the loss scale. A checkpoint that is still being
        written is completed first.

        Raises:
            UserError: the disk is full, the folder cannot be written, or a weight is NaN or
                infinite; on every rank.
        """
        self.wait()
        began = time.monotonic()
        self._samples.record(state)
        if self._updater.scaler is not None:
            state.loss_scale = self._updater.scaler.state()
        tensor_sets = [model_tensors(self._model, parse_size(DEFAULT_SHARD_SIZE))]
        if self._with_optimizer:
            tensor_sets.append(optimizer_tensors(self._updater))
        writing = CheckpointWriting(
            self._output_dir,
            state,
            tensor_sets=tensor_sets,
            add_files=self._add_files,
            settings_json=self._settings_json,
            keep=self._keep,
            make_writer=self._make_writer,
        )
        self._pending = _Pending(writing, began, time.monotonic() - began)
        if self._ring is None:
            self.wait()

    def poll(self) -> None:
        """Completes the checkpoint that is being written, if all ranks have written their files.

        All ranks have to call this at the same points of the run.

        Raises:
            UserError: as ``save``.
        """
        if self._pending is not None and on_all_ranks(self._pending.writing.is_done()):
            self.wait()

    def wait(self) -> None:
        """Completes the checkpoint that is being written, if there is one.

        All ranks have to call this at the same points of the run.

        Raises:
            UserError: as ``save``.
        """
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        folder = pending.writing.finish()
        seconds = time.monotonic() - pending.began
        if self._ring is None:
            logger.info("saved %s in %.1f s", folder, seconds)
        else:
            logger.info(
                "saved %s in %.1f s, of which training stood still for %.1f s",
                *(folder, seconds, pending.stall),
            )

    def _make_writer(self, files: Sequence[FileToWrite]) -> TensorWriter:
        return ThreadWriter(files) if self._ring is None else ProcessWriter(files, self._ring)

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
