"""A ``TensorWriter`` whose files another process writes while this one trains.

The ranks of a machine copy their parts to areas of shared memory. The other process joins the parts
to tensors and writes its files. It is a new interpreter and not a fork, so it holds no GPU, and it
does not import Paddle. After a save it waits for the next one. It ends with this process.
"""

from __future__ import annotations

import json
import os
import pickle
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pypkg.console import progress
from pypkg.errors import UserError
from pypkg.files.checksums import FileRecord
from pypkg.models.weights.area import Area, AreaPlace, LostRankError, Staging
from pypkg.models.weights.formats.stored_tensor import STORAGE
from pypkg.models.weights.save_plan import PlannedUnit
from pypkg.models.weights.staging import PAUSE, Receiver, Sender
from pypkg.models.weights.tensor_writer import (
    FileSequence,
    FileToWrite,
    NotFiniteError,
    write_units,
)

_SOURCES = Path(__file__).resolve().parents[3]  # the folder that contains the package
# Bytes of parts that are copied in a row. Copies empty the caches of the code that finds parts.
_TOGETHER = 64 << 20
_LENGTH_BYTES = 8  # size of the number that precedes a task
_ERRORS = {each.__name__: each for each in (NotFiniteError, LostRankError)}  # that it reports


class _Task(NamedTuple):
    """The description of a save for the other process."""

    files: Sequence[FileToWrite]
    units: Sequence[PlannedUnit]
    rank: int
    places: dict[int, AreaPlace]


class WriterProcess:
    """The other process. It is kept for later saves, because starting a process takes time."""

    def __init__(self) -> None:
        self._process: subprocess.Popen | None = None

    def start(self) -> None:
        """Starts the process, unless it runs already."""
        if self.returncode() is None:
            return
        self.kill()
        path = os.pathsep.join([str(_SOURCES), *filter(None, [os.environ.get("PYTHONPATH")])])
        self._answer = tempfile.TemporaryFile()  # noqa: SIM115 (unlike a pipe, it has no size limit)
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=self._answer,
            start_new_session=True,  # signals of the terminal only reach the process that trains
            env={**os.environ, "PYTHONPATH": path},
        )

    def begin(self, task: _Task) -> None:
        """Sends a task to the process, which sets ``Area.finish`` of its rank at the end."""
        self.start()
        assert self._process is not None and self._process.stdin is not None  # it has started
        # The process unpickles only what comes through this pipe.
        content = pickle.dumps(task)
        try:
            self._process.stdin.write(len(content).to_bytes(_LENGTH_BYTES, "little") + content)
            self._process.stdin.flush()
        except BrokenPipeError:  # the process has ended; ``answer`` reports it
            pass

    def answer(self) -> Any:
        """The result of the last task."""
        self._answer.seek(0)
        return json.loads(self._answer.read())

    def returncode(self) -> int | None:
        """Exit code of the process; None while it runs."""
        return 0 if self._process is None else self._process.poll()

    def kill(self) -> None:
        """Kills the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            assert self._process.stdin is not None  # it is a pipe
            self._process.stdin.close()
            self._answer.close()

    def __del__(self) -> None:
        self.kill()


class ProcessWriter:
    """Copies the parts of this rank to shared memory, from which processes write the files.

    The parts may change after ``close`` returns. The process gets its task after the copies, or
    when the area is full. Earlier it would take a core from the threads that copy.

    Args:
        files: the files that this rank's process writes.
        units: the units that it writes, in order.
        staging: the areas of the save; that of this rank is empty.
        process: the process of this rank; no other writer may use it at the same time.
    """

    def __init__(
        self,
        files: Sequence[FileToWrite],
        units: Sequence[PlannedUnit],
        staging: Staging,
        process: WriterProcess,
    ) -> None:
        self._process, self._area = process, staging.areas[staging.rank]
        self._sender = Sender(staging, self._on_wait)
        self._task = _Task(list(files), list(units), staging.rank, dict(staging.places))
        self._is_begun = False
        self._waiting: list[tuple[PlannedUnit, np.ndarray]] = []
        self._held = 0  # bytes of the waiting parts
        process.start()

    def put(self, unit: PlannedUnit, part: np.ndarray) -> None:
        self._waiting.append((unit, np.asarray(part, STORAGE[unit.dtype])))
        self._held += part.nbytes
        if self._held > _TOGETHER:
            self._copy()

    def _copy(self) -> None:
        for unit, values in self._waiting:
            self._sender.put(unit.number, unit.writer, values)
        self._waiting.clear()
        self._held = 0

    def close(self) -> None:
        self._copy()
        self._sender.flush()
        self._area.let_take()
        self._begin()

    def is_done(self) -> bool:
        self._free_others()
        return self._area.is_finished() or self._process.returncode() is not None

    def records(self) -> dict[str, FileRecord]:
        self.close()
        taken = -1
        while not self.is_done():
            if (now := int(self._area.taken.sum())) != taken:
                progress.report("waiting for the files of a checkpoint")
                taken = now
            time.sleep(PAUSE)
        if not self._area.is_finished():
            code = self._process.returncode()
            raise UserError(f"the process that writes the files has ended with code {code}")
        result = self._process.answer()
        if "errno" in result:
            raise OSError(result["errno"], result["message"])
        if "error" in result:
            raise _ERRORS[result["error"]](result["message"])
        return {name: FileRecord(**record) for name, record in result.items()}

    def abandon(self) -> None:
        self._is_begun = True  # so that it does not begin later
        if not self._area.is_finished():
            self._process.kill()
            self._area.give_up()

    def _begin(self) -> None:
        if not self._is_begun:
            self._is_begun = True
            self._process.begin(self._task)

    def _on_wait(self) -> None:
        self._begin()
        self._free_others()

    def _free_others(self) -> None:
        """Releases ranks that wait for a process that has ended."""
        if self._process.returncode() is not None:
            self._area.take_nothing_more()


def main() -> None:
    """The main loop of the process that writes: reads a task for each save from its pipe."""
    parent = int(sys.argv[1])
    # Slurm sends signals to every process of a task; the process that trains handles them.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)

    def is_alive() -> bool:
        return os.getppid() == parent

    areas: dict[AreaPlace, Area] = {}
    while content := _next_task(is_alive):
        task: _Task = pickle.loads(content)
        areas = {place: areas[place] for place in task.places.values() if place in areas}
        try:
            own = task.places[task.rank]
            area = areas[own] = areas.get(own) or own.open()
        except OSError:  # the process that trains has ended
            sys.exit(1)
        try:
            answer = _write(task, areas, is_alive)
        except EOFError:
            sys.exit(1)
        finally:
            area.take_nothing_more()
        os.ftruncate(sys.stdout.fileno(), 0)
        os.pwrite(sys.stdout.fileno(), json.dumps(answer).encode(), 0)
        area.finish()


def _next_task(is_alive: Callable[[], bool]) -> bytes:
    """The next task; empty if the process that trains has ended, even if the pipe is open."""
    while not select.select([sys.stdin], [], [], 1.0)[0]:
        if not is_alive():
            return b""
    length = int.from_bytes(sys.stdin.buffer.read(_LENGTH_BYTES), "little")
    return sys.stdin.buffer.read(length)


def _write(task: _Task, areas: dict[AreaPlace, Area], is_alive: Callable[[], bool]) -> Any:
    """Writes the files of a task; returns the records or the error for ``ProcessWriter.records``.

    Args:
        areas: the open areas, by place; the missing areas of the task are added.
    """

    def check() -> None:
        if not is_alive():
            raise EOFError("the process that trains has ended")

    def take(unit: PlannedUnit, source: int) -> np.ndarray:
        return receiver.take(unit.number, source).view(STORAGE[unit.dtype])

    try:
        for rank, place in task.places.items():
            if place not in areas:
                areas[place] = _open(rank, place)
        shown = {rank: areas[place] for rank, place in task.places.items()}
        receiver = Receiver(Staging(task.rank, shown, task.places), check)
        receiver.wait_for_copies()
        files = FileSequence(task.files)
        write_units(files, task.units, take, receiver.release)
    except OSError as error:
        return {"errno": error.errno, "message": error.strerror or str(error)}
    except (NotFiniteError, LostRankError) as error:
        return {"error": type(error).__name__, "message": str(error)}
    return {name: asdict(each) for name, each in files.records.items()}


def _open(rank: int, place: AreaPlace) -> Area:
    try:
        return place.open()
    except OSError as error:
        raise LostRankError(
            f"rank {rank} of this machine has ended before it sent its parts"
        ) from error


if __name__ == "__main__":
    main()
