"""A ``TensorWriter`` whose files another process writes, while this one goes on.

The tensors, one after another in the order of the files, pass through a ring in shared memory: a
block that says how a tensor lies there, then its bytes. Two counters say how many bytes the one
process has put in and the other has taken out. The other process knows names, shapes and order from
the start. It is started anew and is no fork, so it holds no GPU, and it imports no Paddle. It ends
when this process does.
"""

from __future__ import annotations

import json
import mmap
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from pypkg import progress
from pypkg.checksums import FileRecord
from pypkg.errors import UserError
from pypkg.models.weights.formats.safetensors import TensorSpec
from pypkg.models.weights.formats.stored_tensor import STORAGE
from pypkg.models.weights.tensor_writer import (
    BLOCK,
    FileSequence,
    FileToWrite,
    NotFiniteError,
    row_blocks,
)

_ALIGNMENT = 64  # bytes; of a tensor in the ring, so that no element lies across its end
_HEADER = mmap.PAGESIZE  # bytes before the ring
_PUT, _TAKEN = range(2)  # places of the counters in the header
_PAUSE = 0.002  # seconds between two looks at a counter
_SOURCES = Path(__file__).resolve().parents[3]  # the folder that the package lies in


class Ring:
    """The shared memory, as either process sees it.

    Args:
        descriptor: of the memory.
        capacity: bytes of the ring, a multiple of 64.
    """

    def __init__(self, descriptor: int, capacity: int) -> None:
        self._map = mmap.mmap(descriptor, _HEADER + capacity)
        memory = np.frombuffer(self._map, np.uint8)
        self._counters = memory[: 2 * 8].view(np.int64)
        self._bytes = memory[_HEADER:]

    def empty(self) -> None:
        """Resets the ring to its initial state."""
        self._counters[:] = 0

    def taken(self) -> int:
        """Bytes that have been taken out so far."""
        return int(self._counters[_TAKEN])

    def put(self, data: np.ndarray, writer_is_alive: Callable[[], bool]) -> None:
        """Appends bytes, of uint8; waits for room. Without a writer they go nowhere."""
        while data.size:
            position = int(self._counters[_PUT])
            room = self._bytes.size - (position - self.taken())
            if not room:
                if not writer_is_alive():
                    return
                time.sleep(_PAUSE)
                continue
            start = position % self._bytes.size
            count = min(room, data.size, self._bytes.size - start)
            self._bytes[start : start + count] = data[:count]
            self._counters[_PUT] = position + count
            data = data[count:]
            progress.report("handing over a checkpoint")

    def take(self, count: int, giver_is_alive: Callable[[], bool]) -> Iterator[np.ndarray]:
        """The next ``count`` bytes in pieces, each of which is valid until the next."""
        while count:
            position = self.taken()
            held = int(self._counters[_PUT]) - position
            if not held:
                if not giver_is_alive():
                    raise EOFError("the process that trains has ended")
                time.sleep(_PAUSE)
                continue
            start = position % self._bytes.size
            piece = min(held, count, self._bytes.size - start, BLOCK)
            if piece < count:  # whole elements
                piece -= piece % _ALIGNMENT
            if not piece:
                time.sleep(_PAUSE)
                continue
            yield self._bytes[start : start + piece]
            self._counters[_TAKEN] = position + piece
            count -= piece


class RingMemory:
    """The memory of a ring, kept from one ``ProcessWriter`` to the next: new pages cost time.

    Args:
        limit: bytes that it takes at most. It takes no more than the tensors of a writer do.
    """

    def __init__(self, limit: int) -> None:
        self._limit = max(_ALIGNMENT, limit - limit % _ALIGNMENT)
        self._capacity = 0
        self._descriptor = -1
        self._ring: Ring | None = None

    def ring_for(self, size: int) -> tuple[Ring, int, int]:
        """An empty ring for ``size`` bytes, the descriptor of its memory, and its capacity."""
        wanted = max(_ALIGNMENT, min(size, self._limit))
        if self._ring is None or self._capacity < wanted:
            self.release()
            self._descriptor, self._capacity = os.memfd_create("pypkg-writer"), wanted
            os.ftruncate(self._descriptor, _HEADER + wanted)
            self._ring = Ring(self._descriptor, wanted)
        self._ring.empty()
        return self._ring, self._descriptor, self._capacity

    def release(self) -> None:
        """Gives the memory back when the last writer no longer uses it."""
        self._ring = None
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1

    def __del__(self) -> None:
        self.release()


class ProcessWriter:
    """Hands the tensors of ``files`` to a process that writes them.

    ``put`` returns when the tensor is copied, and may change.

    Args:
        memory: of no other writer that is at work.
    """

    def __init__(self, files: Sequence[FileToWrite], memory: RingMemory) -> None:
        self._due = iter([item for file in files for item in file.specs.items()])
        specs = [spec for file in files for spec in file.specs.values()]
        size = sum(_ALIGNMENT + _aligned(spec.num_bytes) for spec in specs)
        self._ring, descriptor, capacity = memory.ring_for(size)
        path = os.pathsep.join([str(_SOURCES), *filter(None, [os.environ.get("PYTHONPATH")])])
        self._answer = tempfile.TemporaryFile()  # noqa: SIM115, which no pipe's size limits
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(descriptor), str(capacity), str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=self._answer,
            pass_fds=[descriptor],
            start_new_session=True,  # signals of the terminal are for the process that trains
            env={**os.environ, "PYTHONPATH": path},
        )
        assert self._process.stdin is not None  # it is a pipe
        self._process.stdin.write(json.dumps([_described(file) for file in files]).encode())
        self._process.stdin.close()

    def put(self, name: str, values: np.ndarray) -> None:
        due, spec = next(self._due)
        if (name, values.shape) != (due, tuple(spec.shape)):
            raise ValueError(f"expected {due} {spec.shape}, got {name} {values.shape}")
        is_turned = values.ndim == 2 and values.strides[0] < values.strides[1]
        self._ring.put(np.full(_ALIGNMENT, is_turned, np.uint8), self._is_alive)
        for block in row_blocks(values.T if is_turned else values):
            data = np.ascontiguousarray(block, STORAGE[spec.dtype]).reshape(-1)
            self._ring.put(data.view(np.uint8), self._is_alive)
        padding = _aligned(spec.num_bytes) - spec.num_bytes
        self._ring.put(np.zeros(padding, np.uint8), self._is_alive)

    def close(self) -> None:
        """Nothing: the other process knows which tensor is the last."""

    def is_done(self) -> bool:
        return not self._is_alive()

    def records(self) -> dict[str, FileRecord]:
        taken = -1
        while self._is_alive():
            if (now := self._ring.taken()) != taken:
                progress.report("waiting for the files of a checkpoint")
                taken = now
            time.sleep(_PAUSE)
        self._answer.seek(0)
        if not (answer := self._answer.read()):
            code = self._process.returncode
            raise UserError(f"the process that writes the files has ended with code {code}")
        result = json.loads(answer)
        if "errno" in result:
            raise OSError(result["errno"], result["message"])
        if "message" in result:
            raise NotFiniteError(result["message"])
        return {name: FileRecord(**record) for name, record in result.items()}

    def abandon(self) -> None:
        if self._is_alive():
            self._process.kill()
            self._process.wait()

    def _is_alive(self) -> bool:
        return self._process.poll() is None


def main() -> None:
    """The process that writes: ring, capacity and parent as arguments, the files on stdin."""
    descriptor, capacity, parent = map(int, sys.argv[1:])
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    files = [_from_description(each) for each in json.load(sys.stdin)]
    ring = Ring(descriptor, capacity)
    result: dict[str, Any]
    try:
        result = {name: asdict(each) for name, each in _write(files, ring, parent).items()}
    except OSError as error:
        result = {"errno": error.errno, "message": error.strerror or str(error)}
    except NotFiniteError as error:
        result = {"message": str(error)}
    except EOFError:
        sys.exit(1)
    json.dump(result, sys.stdout)


def _write(files: Sequence[FileToWrite], ring: Ring, parent: int) -> dict[str, FileRecord]:
    def is_alive() -> bool:
        return os.getppid() == parent

    sequence = FileSequence(files)
    for file in files:
        for name, spec in file.specs.items():
            (order,) = ring.take(_ALIGNMENT, is_alive)
            is_turned = bool(order[0])
            pieces = ring.take(spec.num_bytes, is_alive)
            if is_turned:
                sequence.write(name, _turned_back(pieces, spec))
            else:
                sequence.begin(name, tuple(spec.shape))
                for piece in pieces:
                    sequence.append(piece.view(STORAGE[spec.dtype]))
            for _ in ring.take(_aligned(spec.num_bytes) - spec.num_bytes, is_alive):
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


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


def _described(file: FileToWrite) -> dict[str, Any]:
    specs = {name: [spec.dtype, list(spec.shape)] for name, spec in file.specs.items()}
    return {"path": str(file.path), "specs": specs, "must_be_finite": file.must_be_finite}


def _from_description(described: dict[str, Any]) -> FileToWrite:
    specs = {
        name: TensorSpec(dtype, tuple(shape)) for name, (dtype, shape) in described["specs"].items()
    }
    return FileToWrite(Path(described["path"]), specs, described["must_be_finite"])


if __name__ == "__main__":
    main()
