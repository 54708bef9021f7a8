"""Assembles the checkpoints of a run, and restores the run from one."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, TypeAlias

from pypkg.errors import UserError
from pypkg.models.pretrained import (
    Model,
    model_config_json,
    model_dtype,
    model_tensors,
    weight_reader,
)
from pypkg.models.weights.area import Staging
from pypkg.models.weights.model_folder import (
    CONFIG_FILE,
    DEFAULT_SHARD_SIZE,
    parse_size,
    write_json,
)
from pypkg.models.weights.save_plan import PlannedUnit, SavePlan
from pypkg.models.weights.tensor_writer import FileToWrite, TensorWriter, ThreadWriter
from pypkg.models.weights.writer_process import ProcessWriter, WriterProcess
from pypkg.parallel import mesh
from pypkg.parallel.comm.collective import on_all_ranks
from pypkg.parallel.optimizer.updater import Updater
from pypkg.training.checkpoint.parts import Parts
from pypkg.training.checkpoint.reading import load_optimizer, load_trainer_state
from pypkg.training.checkpoint.shared_memory import SharedMemory
from pypkg.training.checkpoint.writing import CheckpointWriting, optimizer_tensors
from pypkg.training.state import TrainerState

logger = logging.getLogger("pypkg")


# What a plan depends on: shapes of the optimizer state, and the ranks of each machine.
_PlannedFor: TypeAlias = tuple[Mapping[str, tuple[int, ...]], tuple[tuple[int, ...], ...]]


class RecordsOrder(Protocol):
    def record(self, state: TrainerState) -> None:
        """Stores the order of samples in ``state.data_order``."""


class _Pending(NamedTuple):
    """A checkpoint that is being written; its start time and the seconds that training paused."""

    writing: CheckpointWriting
    began: float
    stall: float


class Checkpointer:
    """Saves and restores model, optimizer state, loss scale, order of samples and tokenizer.

    Args:
        output_dir: the folder of the checkpoints.
        model: the model of this rank, as ``save_pretrained`` takes it.
        updater: the updater of that model.
        samples: records the order of samples.
        tokenizer_files: read at construction and written into each checkpoint.
        settings_json: the settings of the run, written into each checkpoint.
        keep: number of checkpoints to keep; None or 0 keeps all.
        with_optimizer: whether optimizer state is saved.
        async_memory: for asynchronous saves, the limit in bytes of host memory in which a rank
            keeps tensors that are not written yet. None: saves are synchronous, and training pauses
            until a checkpoint is complete.
        seq_length: tokens of a sample, to read a checkpoint of PaddleNLP.
        verify_checkpoint: how ``reload`` checks a checkpoint: "checksums", "sizes" or "no".
        check_output_dir: called before a checkpoint is written and before it is renamed to its
            final name; raises UserError if the run may no longer write to output_dir.
        parts: access to checkpoints whose files are spread over machines.

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
        async_memory: int | None = None,
        seq_length: int = 0,
        verify_checkpoint: str = "checksums",
        check_output_dir: Callable[[], None] = lambda: None,
        parts: Parts | None = None,
    ) -> None:
        self._output_dir = output_dir
        self._model, self._updater, self._samples = model, updater, samples
        self._parts = parts or Parts()
        is_leader = self._parts.places.is_leader
        self._tokenizer = {file.name: _read(file) for file in tokenizer_files if is_leader}
        self._settings_json, self._keep = settings_json, keep
        self._with_optimizer = with_optimizer
        self._seq_length, self._verify_checkpoint = seq_length, verify_checkpoint
        self._check_output_dir = check_output_dir
        self._writer = None if async_memory is None else WriterProcess()
        is_alone = mesh.current().world_size == 1
        self._memory = None if self._writer is None and is_alone else SharedMemory(async_memory)
        self._is_prepared = self._writer is None
        self._pending: _Pending | None = None
        self._planned: tuple[_PlannedFor, SavePlan] | None = None

    def save(self, state: TrainerState) -> Path:
        """Writes ``checkpoint-<global_step>``, or starts to write it. Every rank must call this.

        ``state`` receives the order of samples and the loss scale. A checkpoint that is still being
        written is completed first.

        Returns:
            The folder of the checkpoint. It exists once the checkpoint is complete.

        Raises:
            UserError: the disk is full, the folder cannot be written or is no longer this run's,
                or a weight is NaN or infinite; on every rank.
        """
        self._check_output_dir()
        self.wait()
        began = time.monotonic()
        self._samples.record(state)
        if self._updater.scaler is not None:
            state.loss_scale = self._updater.scaler.state()
        writing = CheckpointWriting(
            self._output_dir,
            state,
            plan=self._plan(),
            add_files=self._add_files,
            settings_json=self._settings_json,
            keep=self._keep,
            memory=self._memory,
            make_writer=self._make_writer,
            places=self._parts.places,
        )
        self._pending = _Pending(writing, began, time.monotonic() - began)
        if self._writer is None:
            self.wait()
        return writing.folder

    def poll(self) -> None:
        """Completes the checkpoint that is being written, if all ranks have written their files.

        After the first update it also starts the writer process and allocates the memory of
        asynchronous saves, so that the first save pauses training no longer than later ones. Every
        rank must call this at the same points of the run.

        Raises:
            UserError: as ``save``.
        """
        if self._pending is not None and on_all_ranks(self._pending.writing.is_done()):
            self.wait()
        if not self._is_prepared and self._updater.state_shapes():
            self._prepare()

    def wait(self) -> None:
        """Waits until the checkpoint that is being written is complete, if there is one.

        Every rank must call this at the same points of the run.

        Raises:
            UserError: as ``save``.
        """
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        try:
            self._check_output_dir()
        except BaseException:
            pending.writing.abandon()
            raise
        folder = pending.writing.finish()
        seconds = time.monotonic() - pending.began
        if self._writer is None:
            logger.info("saved %s in %.1f s", folder, seconds)
        else:
            logger.info(
                "saved %s in %.1f s, of which training stood still for %.1f s",
                *(folder, seconds, pending.stall),
            )

    def _plan(self) -> SavePlan:
        """The plan of a save. Training pauses to make it, so it is kept until the state changes."""
        neighbours = () if self._memory is None else self._memory.neighbours()
        planned_for = self._updater.state_shapes(), neighbours
        if self._planned is None or self._planned[0] != planned_for:
            sets = [model_tensors(self._model, parse_size(DEFAULT_SHARD_SIZE))]
            if self._with_optimizer:
                sets.append(optimizer_tensors(self._updater, self._model.config))
            self._planned = planned_for, SavePlan(sets, neighbours)
        return self._planned[1]

    def _prepare(self) -> None:
        assert self._writer is not None  # else there is nothing to prepare
        self._writer.start()
        assert self._memory is not None  # it exists if the writer does
        self._memory.prepare(self._plan())
        self._is_prepared = True

    def _make_writer(
        self, files: Sequence[FileToWrite], units: Sequence[PlannedUnit], staging: Staging
    ) -> TensorWriter:
        if self._writer is None:
            return ThreadWriter(files, units, staging)
        return ProcessWriter(files, units, staging, self._writer)

    def restore(self, checkpoint: Path, state: TrainerState) -> None:
        """Loads optimizer state and loss scale; the model must have the weights of ``checkpoint``.

        Args:
            state: the trainer's state in ``checkpoint``.

        Raises:
            UserError: optimizer.safetensors is missing, damaged, or of another model.
        """
        load_optimizer(checkpoint, self._updater, self._model.config)
        if self._updater.scaler is not None and state.loss_scale:
            self._updater.scaler.load_state(state.loss_scale)
        logger.info("resuming from %s at step %d", checkpoint, state.global_step)

    def reload(self, checkpoint: Path) -> TrainerState:
        """Restores model, optimizer and loss scale from ``checkpoint``, in place.

        Every rank must call this. The parallel layout of the model does not change.

        Returns:
            The trainer's state in ``checkpoint``.

        Raises:
            UserError: a file is missing or damaged.
        """
        self._parts.check_whole(checkpoint, self._verify_checkpoint)
        self._parts.open(checkpoint)
        state = load_trainer_state(checkpoint, self._seq_length)
        config = self._model.config
        read = weight_reader(checkpoint, config, model_dtype(self._model))
        self._updater.assign_parameters(read)
        self.restore(checkpoint, state)
        return state

    def _add_files(self, folder: Path) -> None:
        write_json(folder / CONFIG_FILE, model_config_json(self._model))
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
