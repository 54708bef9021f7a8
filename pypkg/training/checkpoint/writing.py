"""Writes a checkpoint that is either complete or absent.

All ranks write. Each tensor has one writer, the only rank that copies it to host memory. Files are
written to a temporary folder. When all ranks have finished, rank 0 adds the small files and renames
the folder. Without a shared output_dir, the leader of each place does this.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import shutil
from collections import ChainMap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np

from pypkg.errors import UserError
from pypkg.files import replace_folder
from pypkg.files.checksums import FileRecord
from pypkg.models.architecture.config import ModelConfig
from pypkg.models.division import division
from pypkg.models.weights.area import AreaPlace, LostRankError, Staging
from pypkg.models.weights.assembly import Division
from pypkg.models.weights.formats.safetensors import TensorSpec
from pypkg.models.weights.model_folder import write_json
from pypkg.models.weights.save_plan import (
    PlannedUnit,
    SavePlan,
    TensorSet,
    Unit,
    as_it_is,
    no_memory_is_shared,
)
from pypkg.models.weights.tensor_writer import (
    FileToWrite,
    NotFiniteError,
    TensorWriter,
    ThreadWriter,
)
from pypkg.parallel import mesh
from pypkg.parallel.comm import gather
from pypkg.parallel.comm.collective import from_all_ranks
from pypkg.parallel.comm.places import Places
from pypkg.parallel.host_memory import to_host
from pypkg.parallel.launch.rendezvous import named
from pypkg.parallel.optimizer.updater import Updater
from pypkg.training.checkpoint.folders import (
    OPTIMIZER_STEM,
    SETTINGS_FILE,
    STATE_FILE,
    TEMPORARY_PREFIX,
    checkpoint_name,
    checkpoints,
    remove_checkpoint,
    surplus,
)
from pypkg.training.checkpoint.manifest import MANIFEST_FILE, MANIFEST_KEY, write_manifest
from pypkg.training.checkpoint.shared_memory import SharedMemory, SharedMemoryError
from pypkg.training.state import TrainerState

logger = logging.getLogger("pypkg")

# Creates the writer of a rank from its files, its units in order, and the areas of shared memory.
MakeWriter: TypeAlias = Callable[
    [Sequence[FileToWrite], Sequence[PlannedUnit], Staging], TensorWriter
]


def optimizer_tensors(updater: Updater, config: ModelConfig | None = None) -> TensorSet:
    """The optimizer state as the tensors of a checkpoint. Every rank must call this.

    Args:
        config: of the model. None: ranks do not exchange parts through shared memory.
    """
    places, shapes = updater.state_places(), updater.state_shapes()

    def read(key: str, writer: int) -> np.ndarray | None:
        return updater.read_state(key, writer)

    def part(key: str) -> np.ndarray:
        held = updater.held_state(key)
        assert held is not None  # otherwise there is no division
        return to_host(held.read())

    def parts(key: str) -> Division | None:
        held = updater.held_state(key)
        if config is None or held is None:
            return None
        return division(config, held.name, held.shape, held.num_bytes, held.is_sliced)

    def unit(key: str, found: Sequence[gather.Place]) -> Unit:
        specs = {key: TensorSpec("float32", shapes[key])}
        ranks, *copies = map(gather.possible_writers, found)
        return Unit(key, shapes[key], specs, ranks, parts(key), copies)

    units = [unit(key, found) for key, found in places.items()]
    return TensorSet(OPTIMIZER_STEM, units, read, as_it_is, part=part)


class _Ready(NamedTuple):
    """The message of a rank to all others before they exchange parts.

    Attributes:
        area: the rank's area of shared memory, or None.
        temporary: the temporary folder; the leader of a place has created it.
        state_json: the trainer's state; that of rank 0 is written.
    """

    area: AreaPlace | None
    temporary: Path
    state_json: str


class CheckpointWriting:
    """A checkpoint that is being written: ``checkpoint-<global_step>`` in ``output_dir``.

    Every rank creates one and calls ``finish``. ``finish`` also removes the oldest checkpoints
    beyond ``keep``, but never the newest and ``state.best_checkpoint``.

    Args:
        output_dir: the folder that this rank's place sees.
        plan: the tensors to write and their writers.
        add_files: writes further files into a folder; called on the leader of each place.
        settings_json: the content of settings.json.
        keep: number of checkpoints to keep; None or 0 keeps all.
        memory: shared memory through which the ranks of a machine exchange parts of tensors; None:
            they use process groups.
        make_writer: creates the writer of this rank. Tensors must not change until the writer's
            ``close`` returns, or until ``finish`` returns if the writer makes no copies.
        places: the ranks grouped by the ``output_dir`` that they see.

    Raises:
        UserError: on every rank, if the folder cannot be written. Earlier checkpoints are not
            changed, and incomplete files are removed.
    """

    def __init__(
        self,
        output_dir: str | Path,
        state: TrainerState,
        *,
        plan: SavePlan,
        add_files: Callable[[Path], None],
        settings_json: str,
        keep: int | None = None,
        memory: SharedMemory | None = None,
        make_writer: MakeWriter = ThreadWriter,
        places: Places = Places(),  # noqa: B008 (it is immutable)
    ) -> None:
        self.folder = Path(output_dir) / checkpoint_name(state)
        self._state = replace(state)  # training changes it before the manifest is written
        self._state_json = json.dumps({**asdict(state), MANIFEST_KEY: MANIFEST_FILE}, indent=2)
        self._add_files, self._settings_json, self._keep = add_files, settings_json, keep
        self._plan, self._memory, self._places = plan, memory, places
        name = f"{TEMPORARY_PREFIX}{state.global_step}-{os.getpid()}"
        self._temporary = self.folder.with_name(name)  # ``_hand_over`` replaces it by the leader's
        self._writer: TensorWriter | None = None
        try:
            self._hand_over(make_writer)
        except BaseException:
            self.abandon()
            raise

    def _hand_over(self, make_writer: MakeWriter) -> None:
        """Starts this rank's writer, and sends the parts that this rank holds to their writers."""
        rank, memory, places = mesh.current().rank, self._memory, self._places
        told = from_all_ranks(self._ready)  # one exchange, because training pauses
        self._state_json = told[0].state_json
        self._temporary = told[places.leaders[places.index]].temporary
        areas = [each.area for each in told if each.area is not None]
        staging = Staging(rank) if memory is None else memory.staging(areas)
        if memory is None or not memory.neighbours():
            self._plan = self._plan.without_neighbours()
        plan = self._plan
        units = plan.units(no_memory_is_shared if memory is None else memory.is_shared)
        files = [FileToWrite(self._temporary / f.name, f.specs) for f in plan.files_of(rank)]
        own = [unit for unit in units if unit.writer == rank]
        self._writer = writer = make_writer(files, own, staging)
        with self._errors():
            for unit, part in plan.parts_of(rank, units):
                writer.put(unit, part)
            writer.close()

    def _ready(self) -> _Ready:
        """Prepares the save on this rank."""
        with self._errors():
            area = None if self._memory is None else self._memory.emptied(self._plan)
            if self._places.is_leader:
                shutil.rmtree(self._temporary, ignore_errors=True)
                self._temporary.mkdir(parents=True)
        return _Ready(area, self._temporary, self._state_json)

    def num_bytes_of(self, rank: int) -> int:
        """Bytes of the tensors that ``rank`` writes."""
        return self._plan.num_bytes_of(rank)

    def is_done(self) -> bool:
        """Whether this rank has finished writing, with or without an error."""
        assert self._writer is not None  # since the construction
        return self._writer.is_done()

    def finish(self) -> Path:
        """Waits for the files of all ranks and renames the folder.

        Raises:
            UserError: on every rank, if the disk is full, the folder cannot be written, or a weight
                is NaN or infinite.
        """
        try:
            records = from_all_ranks(self._records)
            self._places.from_leader(lambda: self._complete(records))
            self._places.from_leader(self._publish)
        except BaseException:
            self.abandon()
            raise
        if self._places.is_leader:
            self._remove_surplus()
        return self.folder

    def _records(self) -> dict[str, FileRecord]:
        assert self._writer is not None  # since the construction
        with self._errors():
            return self._writer.records()

    def _complete(self, records: Sequence[dict[str, FileRecord]]) -> None:
        """Adds the small files and the manifest. Called on the leader of each place."""
        places = self._places
        by_place = [
            dict(ChainMap(*(records[rank] for rank in places.ranks(index))))
            for index in range(len(places.leaders))
        ]
        elsewhere = {
            named(places.ranks(index)): files
            for index, files in enumerate(by_place)
            if index != places.index
        }
        with self._errors():
            temporary = self._temporary
            for name, index in self._plan.indices().items():
                write_json(temporary / name, index)
            self._add_files(temporary)
            (temporary / SETTINGS_FILE).write_text(self._settings_json, encoding="utf-8")
            (temporary / STATE_FILE).write_text(self._state_json, encoding="utf-8")
            layout, own = asdict(mesh.current().degrees), by_place[places.index]
            write_manifest(temporary, self._state, layout, own, elsewhere)

    def _publish(self) -> None:
        with self._errors():
            replace_folder(self._temporary, self.folder)

    def _remove_surplus(self) -> None:
        if self._keep is None or self._keep <= 0:
            return
        for folder in surplus(self.folder.parent, self._keep, self._state.best_checkpoint):
            try:
                remove_checkpoint(folder)
            except UserError as error:
                logger.warning("%s", error)

    def abandon(self) -> None:
        """Stops the writer of this rank. A leader also removes the temporary folder."""
        if self._writer is not None:
            self._writer.abandon()
        if self._places.is_leader:
            shutil.rmtree(self._temporary, ignore_errors=True)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (OSError, UserError) as error:
            older = checkpoints(self.folder.parent)
            kept = f" The last complete checkpoint is {older[-1][1]}." if older else ""
            places = self._places
            where = "" if places.is_one else f" on {named(places.ranks(places.index))}"
            raise UserError(
                f"saving {self.folder}{where} failed: {_reason(error)}.{kept} {_way_out(error)}"
            ) from error


def _way_out(error: Exception) -> str:
    if isinstance(error, NotFiniteError):
        return "Lower learning_rate or lengthen the warm-up, then start the same command again."
    if isinstance(error, SharedMemoryError):
        return "Raise the limits of this process (ulimit -a), then start the same command again."
    if isinstance(error, LostRankError):
        return "The output of that rank may say why. Start the same command again."
    return "Free some space or set output_dir to another disk, then start the same command again."


def _reason(error: Exception) -> str:
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full"
    return getattr(error, "strerror", None) or str(error)
