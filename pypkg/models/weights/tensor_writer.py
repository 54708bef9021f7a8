"""Writes the files of a rank, with checksums, while another thread supplies the tensors.

Nothing here imports Paddle.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol

import numpy as np

from pypkg.console import progress
from pypkg.errors import UserError
from pypkg.files.block_file import BlockFile
from pypkg.files.checksums import Checksum, FileRecord
from pypkg.models.weights.area import Staging
from pypkg.models.weights.assembly import JoinedTensor
from pypkg.models.weights.formats.safetensors import TensorSpec, encoded_header
from pypkg.models.weights.formats.stored_tensor import STORAGE
from pypkg.models.weights.save_plan import PlannedUnit
from pypkg.models.weights.staging import Receiver, Sender

BLOCK = 16 << 20  # bytes that are rearranged to the order of the file at once
_PIECE = 1 << 20  # bytes that are checked, summed and written at once, in a core's cache
_AHEAD = 256 << 20  # bytes of tensors that wait for the disk
# All bits of the exponent are set only in NaN and infinity.
_EXPONENTS = {
    "float64": 0x7FF0_0000_0000_0000,
    "float32": 0x7F80_0000,
    "float16": 0x7C00,
    "bfloat16": 0x7F80,
}


class NotFiniteError(UserError):
    """A tensor holds NaN or infinity."""


@dataclass(frozen=True)
class FileToWrite:
    """A safetensors file of a rank.

    Attributes:
        specs: the specs of its tensors by name, in order.
    """

    path: Path
    specs: Mapping[str, TensorSpec]


class TensorWriter(Protocol):
    """Writes the files of a rank, and sends its parts of other tensors to their writers."""

    def put(self, unit: PlannedUnit, part: np.ndarray) -> None:
        """Adds this rank's part of the next unit; waits while too many bytes are pending."""

    def close(self) -> None:
        """Called after the last ``put``; waits for copies of the parts, if the writer makes any."""

    def is_done(self) -> bool:
        """Whether all work is done, after ``close``."""

    def records(self) -> dict[str, FileRecord]:
        """Waits until all files are on the disk; returns size and checksum of each, by name.

        Raises:
            OSError: the disk is full or a file cannot be written.
            NotFiniteError: a tensor holds NaN or infinity.
            LostRankError: a rank has ended before it sent all its parts.
            UserError: the process that writes has ended without a result.
        """

    def abandon(self) -> None:
        """Stops writing. Incomplete files are not removed."""


class FileSequence:
    """The files of a rank, one after another, written block by block."""

    def __init__(self, files: Sequence[FileToWrite]) -> None:
        self.records: dict[str, FileRecord] = {}
        self._tensors = self._walk(files)
        self._buffer = np.empty(0, np.uint8)

    def write(self, name: str, values: JoinedTensor) -> None:
        """Writes the next tensor.

        Raises:
            NotFiniteError: it holds NaN or infinity.
            ValueError: it is not the next tensor of the file.
        """
        file, due, spec = next(self._tensors)
        if (name, values.shape) != (due, tuple(spec.shape)):
            raise ValueError(f"expected {due} {spec.shape}, got {name} {values.shape}")
        for block in row_blocks(values):
            ordered = self._in_order(block, STORAGE[spec.dtype]).reshape(-1)
            count = _PIECE // ordered.itemsize
            for start in range(0, ordered.size, count):
                piece = ordered[start : start + count]
                if not all_finite(piece, spec.dtype):
                    raise NotFiniteError(
                        f"{name} holds values that are NaN or infinite; such values are not saved"
                    )
                file.append(piece)

    def _in_order(self, block: JoinedTensor, dtype: np.dtype) -> np.ndarray:
        """``block`` in C order; the array is valid until the next call."""
        found = block.in_order()
        if found is not None and found.dtype == dtype:
            return found
        if self._buffer.size < block.nbytes:
            self._buffer = np.empty(block.nbytes, np.uint8)
        ordered = self._buffer[: block.nbytes].view(dtype).reshape(block.shape)
        block.copy_to(ordered)
        return ordered

    def finish(self) -> None:
        """Completes the last file and syncs it to disk.

        Raises:
            ValueError: a tensor is missing.
        """
        if (missing := next(self._tensors, None)) is not None:
            raise ValueError(f"{missing[1]} is missing")

    def _walk(self, files: Sequence[FileToWrite]) -> Iterator[tuple[_File, str, TensorSpec]]:
        for each in files:
            with _File(each) as file:
                file.append(np.frombuffer(encoded_header(each.specs)[0], np.uint8))
                for name, spec in each.specs.items():
                    yield file, name, spec
                self.records[each.path.name] = file.finish()


class _File:
    """A file that is being written."""

    def __init__(self, what: FileToWrite) -> None:
        self._name = what.path.name
        self._checksum = Checksum()
        self._file = BlockFile(what.path)

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._file.close()

    def append(self, piece: np.ndarray) -> None:
        data = piece.view(np.uint8)
        self._checksum.update(data.data)
        self._file.append(data)
        progress.report(f"writing {self._name}")

    def finish(self) -> FileRecord:
        self._file.finish()
        return self._checksum.record()


def write_units(
    files: FileSequence,
    units: Sequence[PlannedUnit],
    take: Callable[[PlannedUnit, int], np.ndarray],
    release: Callable[[], None],
) -> None:
    """Writes all files of a rank.

    Args:
        units: the units that the rank writes, in order.
        take: returns the part of a unit from a rank, in the dtype of its storage.
        release: called when the parts that were taken are no longer needed.
    """
    for unit in units:
        parts = [take(unit, source) for source in unit.sources]
        for name, values in unit.tensors(parts).items():
            files.write(name, values)
        del parts
        release()
    files.finish()


class _AbandonedError(Exception):
    """The rank has given up the save."""


class ThreadWriter:
    """A ``TensorWriter`` in a thread of this process.

    Parts that this rank writes itself are not copied, so they must not change until ``records``
    returns.

    Args:
        files: the files that this rank writes, in order.
        units: the units that this rank writes, in order.
        staging: the areas through which ranks exchange parts; None: ranks exchange no parts.
    """

    def __init__(
        self,
        files: Sequence[FileToWrite],
        units: Sequence[PlannedUnit],
        staging: Staging | None = None,
    ) -> None:
        self._files, self._units = FileSequence(files), units
        self._rank = None if staging is None else staging.rank
        self._sender = self._receiver = self._area = None
        if staging is not None and staging.areas:
            self._sender, self._receiver = Sender(staging), Receiver(staging, self._check)
            self._area = staging.areas[staging.rank]
        self._waiting: deque[tuple[PlannedUnit, np.ndarray]] = deque()
        self._held = 0  # bytes of the waiting parts and of the one that is being written
        self._in_work = 0
        self._is_closed = self._is_done = False
        self._failure: BaseException | None = None
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="pypkg-writer", daemon=True)
        self._thread.start()

    def put(self, unit: PlannedUnit, part: np.ndarray) -> None:
        if self._rank not in (None, unit.writer):
            assert self._sender is not None  # a rank with parts for others has one
            self._sender.put(unit.number, unit.writer, part)
            self._sender.flush()  # this rank may wait for the writer of the part next
            return
        with self._changed:
            self._changed.wait_for(
                lambda: not self._held or self._held + part.nbytes <= _AHEAD or self._is_done
            )
            if self._is_done:  # it has failed; ``records`` raises the error
                return
            self._waiting.append((unit, part))
            self._held += part.nbytes
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def is_done(self) -> bool:
        return self._is_done

    def records(self) -> dict[str, FileRecord]:
        self.close()
        self._thread.join()
        if self._failure is not None:
            raise self._failure
        return self._files.records

    def abandon(self) -> None:
        if self._area is not None:
            self._area.give_up()
        with self._changed:
            self._is_done = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        try:
            write_units(self._files, self._units, self._take, self._release)
        except _AbandonedError:
            pass
        except BaseException as error:
            self._failure = error
        finally:
            if self._area is not None:
                self._area.take_nothing_more()
            with self._changed:
                self._is_done = True
                self._waiting.clear()
                self._changed.notify_all()

    def _take(self, unit: PlannedUnit, source: int) -> np.ndarray:
        if self._receiver is not None and source != self._rank:
            return self._receiver.take(unit.number, source).view(STORAGE[unit.dtype])
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._is_closed or self._is_done)
            self._check()
            if not self._waiting:
                raise ValueError(f"{unit.name} is missing")
            found, part = self._waiting.popleft()
        if found.number != unit.number:
            raise ValueError(f"expected {unit.name}, got {found.name}")
        self._in_work = part.nbytes
        return part

    def _release(self) -> None:
        if self._receiver is not None:
            self._receiver.release()
        with self._changed:
            self._held -= self._in_work
            self._in_work = 0
            self._changed.notify_all()

    def _check(self) -> None:
        if self._is_done:
            raise _AbandonedError


def row_blocks(values: JoinedTensor) -> Iterator[JoinedTensor]:
    """Slices along the first axis of at most ``BLOCK`` bytes, or of one row if it is larger."""
    if values.ndim == 0:
        yield values
        return
    rows = max(1, BLOCK * len(values) // max(values.nbytes, 1))
    for start in range(0, len(values), rows):
        yield values[start : start + rows]


def all_finite(values: np.ndarray, dtype: str) -> bool:
    """Whether no element is NaN or infinite; true for dtypes that have no such values.

    It compares the largest value of the bits, read as signed and as unsigned integers, with the
    bits of infinity. These two passes run at the speed of the caches for every dtype.

    Args:
        values: contiguous; bfloat16 as its bits in uint16.
    """
    exponent, size = _EXPONENTS.get(dtype), values.itemsize
    if exponent is None or not values.size:
        return True
    largest_positive = int(values.view(f"i{size}").max())
    largest = int(values.view(f"u{size}").max())  # of the negative values, if there are any
    return largest_positive < exponent and largest < exponent + (1 << 8 * size - 1)
