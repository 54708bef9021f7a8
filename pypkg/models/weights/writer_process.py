"""A ``TensorWriter`` whose files another process writes, while this one goes on.

The tensors, one after another in the order of the files, pass through a ring in shared memory: a
block that says how a tensor lies there, then its bytes. The other process is told names, shapes and
order. It is started anew and is no fork, so it holds no GPU, and it imports no Paddle. It waits for
the next files when it has written some, and ends when this process does.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from pypkg import progress
from pypkg.checksums import FileRecord
from pypkg.errors import UserError
from pypkg.models.weights.formats.safetensors import TensorSpec
from pypkg.models.weights.formats.stored_tensor import STORAGE
from pypkg.models.weights.ring import ALIGNMENT, PAUSE, Ring, aligned, size_of_memory
from pypkg.models.weights.tensor_writer import (
    FileSequence,
    FileToWrite,
    NotFiniteError,
    row_blocks,
)

_SOURCES = Path(__file__).resolve().parents[3]  # the folder that the package lies in


class WriterProcess:
    """The other process and the ring, kept from one ``ProcessWriter`` to the next.

    A process that starts and new pages of memory cost the time that a save should not take.

    Args:
        limit: bytes that the ring takes at most. It takes no more than the tensors do.
    """

    def __init__(self, limit: int) -> None:
        self._limit = max(ALIGNMENT, limit - limit % ALIGNMENT)
        self._capacity = 0
        self._process: subprocess.Popen | None = None

    def prepare(self, specs: Iterable[TensorSpec]) -> None:
        """Starts the process and, in a thread, allocates the memory for such tensors."""
        size = sum(ALIGNMENT + aligned(spec.num_bytes) for spec in specs)
        wanted = max(ALIGNMENT, min(size, self._limit))
        if self.returncode() is None and self._capacity >= wanted:
            return
        self.kill()
        self._capacity = wanted
        descriptor = os.memfd_create("pypkg-writer")
        os.ftruncate(descriptor, size_of_memory(wanted))
        self.ring = Ring(descriptor, wanted)
        path = os.pathsep.join([str(_SOURCES), *filter(None, [os.environ.get("PYTHONPATH")])])
        self._answer = tempfile.TemporaryFile()  # noqa: SIM115, which no pipe's size limits
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(descriptor), str(wanted), str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=self._answer,
            pass_fds=[descriptor],
            start_new_session=True,  # signals of the terminal are for the process that trains
            env={**os.environ, "PYTHONPATH": path},
        )
        os.close(descriptor)
        self._touching = threading.Thread(target=self.ring.touch, daemon=True)
        self._touching.start()

    def begin(self, files: Sequence[FileToWrite]) -> None:
        """Lets the process write ``files``, whose tensors come through the ring."""
        self.prepare(spec for file in files for spec in file.specs.values())
        self._touching.join()
        self.ring.empty()
        assert self._process is not None and self._process.stdin is not None  # it is prepared
        line = json.dumps([_described(file) for file in files]) + "\n"
        try:
            self._process.stdin.write(line.encode())
            self._process.stdin.flush()
        except BrokenPipeError:  # it has ended, which ``answer`` tells
            pass

    def is_writing(self) -> bool:
        """Whether it has yet to finish the files of ``begin``."""
        return not self.ring.is_finished() and self.returncode() is None

    def answer(self) -> Any:
        """What it said when it finished.

        Raises:
            UserError: it ended instead.
        """
        if not self.ring.is_finished():
            raise UserError(
                f"the process that writes the files has ended with code {self.returncode()}"
            )
        self._answer.seek(0)
        return json.loads(self._answer.read())

    def returncode(self) -> int | None:
        """Exit code of the process; None while it runs."""
        return 0 if self._process is None else self._process.poll()

    def kill(self) -> None:
        """Ends the process; the memory goes when nothing uses it."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            assert self._process.stdin is not None  # it is a pipe
            self._process.stdin.close()
            self._answer.close()

    def __del__(self) -> None:
        self.kill()


class ProcessWriter:
    """Hands the tensors of ``files`` to a process that writes them.

    ``put`` returns when the tensor is copied, and may change.

    Args:
        process: of no other writer that is at work.
    """

    def __init__(self, files: Sequence[FileToWrite], process: WriterProcess) -> None:
        self._due = iter([item for file in files for item in file.specs.items()])
        self._process = process
        process.begin(files)

    def put(self, name: str, values: np.ndarray) -> None:
        due, spec = next(self._due)
        if (name, values.shape) != (due, tuple(spec.shape)):
            raise ValueError(f"expected {due} {spec.shape}, got {name} {values.shape}")
        is_turned = values.ndim == 2 and values.strides[0] < values.strides[1]
        self._put(np.full(ALIGNMENT, is_turned, np.uint8))
        for block in row_blocks(values.T if is_turned else values):
            self._put(np.asarray(block, STORAGE[spec.dtype]))
        self._put(np.zeros(aligned(spec.num_bytes) - spec.num_bytes, np.uint8))

    def close(self) -> None:
        self._process.ring.let_take()

    def is_done(self) -> bool:
        return not self._process.is_writing()

    def records(self) -> dict[str, FileRecord]:
        self.close()
        taken = -1
        while self._process.is_writing():
            if (now := self._process.ring.taken()) != taken:
                progress.report("waiting for the files of a checkpoint")
                taken = now
            time.sleep(PAUSE)
        result = self._process.answer()
        if "errno" in result:
            raise OSError(result["errno"], result["message"])
        if "message" in result:
            raise NotFiniteError(result["message"])
        return {name: FileRecord(**record) for name, record in result.items()}

    def abandon(self) -> None:
        if self._process.is_writing():
            self._process.kill()

    def _put(self, data: np.ndarray) -> None:
        self._process.ring.put(data, self._process.is_writing)


def main() -> None:
    """The process that writes: ring, capacity and parent as arguments, files of a save a line."""
    descriptor, capacity, parent = map(int, sys.argv[1:])
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ring = Ring(descriptor, capacity)

    def is_alive() -> bool:
        return os.getppid() == parent

    while line := _next_line(is_alive):
        try:
            answer = _write([_from_description(each) for each in json.loads(line)], ring, is_alive)
        except EOFError:
            sys.exit(1)
        os.ftruncate(sys.stdout.fileno(), 0)
        os.pwrite(sys.stdout.fileno(), json.dumps(answer).encode(), 0)
        ring.finish()


def _next_line(is_alive: Callable[[], bool]) -> bytes:
    """Empty if the process that trains has ended; its other children may hold the pipe open."""
    while not select.select([sys.stdin], [], [], 1.0)[0]:
        if not is_alive():
            return b""
    return sys.stdin.buffer.readline()


def _write(files: Sequence[FileToWrite], ring: Ring, is_alive: Callable[[], bool]) -> Any:
    """Writes files; returns what ``ProcessWriter.records`` makes its result or exception of."""
    try:
        records = _write_files(files, ring, is_alive)
    except OSError as error:
        return {"errno": error.errno, "message": error.strerror or str(error)}
    except NotFiniteError as error:
        return {"message": str(error)}
    return {name: asdict(each) for name, each in records.items()}


def _write_files(
    files: Sequence[FileToWrite], ring: Ring, is_alive: Callable[[], bool]
) -> dict[str, FileRecord]:
    sequence = FileSequence(files)
    for file in files:
        for name, spec in file.specs.items():
            (order,) = ring.take(ALIGNMENT, is_alive)
            is_turned = bool(order[0])
            pieces = ring.take(spec.num_bytes, is_alive)
            if is_turned:
                sequence.write(name, _turned_back(pieces, spec))
            else:
                sequence.begin(name, tuple(spec.shape))
                for piece in pieces:
                    sequence.append(piece.view(STORAGE[spec.dtype]))
            for _ in ring.take(aligned(spec.num_bytes) - spec.num_bytes, is_alive):
                pass
    sequence.finish()
    return sequence.records


def _turned_back(pieces: Iterator[np.ndarray], spec: TensorSpec) -> np.ndarray:
    """A matrix from the bytes of its transpose. Turning it takes longer than copying it."""
    data, at = np.empty(spec.num_bytes, np.uint8), 0
    for piece in pieces:
        data[at : at + piece.size] = piece
        at += piece.size
    return data.view(STORAGE[spec.dtype]).reshape(spec.shape[::-1]).T


def _described(file: FileToWrite) -> dict[str, Any]:
    specs = {name: [spec.dtype, list(spec.shape)] for name, spec in file.specs.items()}
    return {"path": str(file.path), "specs": specs}


def _from_description(described: dict[str, Any]) -> FileToWrite:
    specs = {
        name: TensorSpec(dtype, tuple(shape)) for name, (dtype, shape) in described["specs"].items()
    }
    return FileToWrite(Path(described["path"]), specs)


if __name__ == "__main__":
    main()
