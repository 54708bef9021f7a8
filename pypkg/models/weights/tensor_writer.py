"""Writes the files of a rank, with their checksums, beside the thread that brings the tensors.

Nothing here imports Paddle.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol

import numpy as np

from pypkg import progress
from pypkg.checksums import Checksum, FileRecord
from pypkg.errors import UserError
from pypkg.models.weights.formats.safetensors import TensorSpec, encoded_header
from pypkg.models.weights.formats.stored_tensor import STORAGE

BLOCK = 16 << 20  # bytes that are checked, summed and written at once
_AHEAD = 256 << 20  # bytes of tensors that wait for the disk
_WRITE_BACK = 32 << 20  # bytes after which the kernel is told to begin with writing


class NotFiniteError(UserError):
    """A tensor holds NaN or infinity."""


@dataclass(frozen=True)
class FileToWrite:
    """A safetensors file of a rank.

    Attributes:
        specs: of its tensors by name, in order.
    """

    path: Path
    specs: Mapping[str, TensorSpec]


class TensorWriter(Protocol):
    """Writes files as their tensors come."""

    def put(self, name: str, values: np.ndarray) -> None:
        """Hands over the next tensor; waits while too many are on their way to the disk."""

    def close(self) -> None:
        """Says that all tensors have been handed over."""

    def is_done(self) -> bool:
        """Whether nothing is left to do, after ``close``."""

    def records(self) -> dict[str, FileRecord]:
        """Size and checksum of each file by name, all on the disk; waits for them.

        Raises:
            OSError: the disk is full or a file cannot be written.
            NotFiniteError: a tensor holds NaN or infinity.
            UserError: the writing has ended without a result.
        """

    def abandon(self) -> None:
        """Ends the writing; files stay as they are."""


class FileSequence:
    """The files of a rank, one after another, written block by block."""

    def __init__(self, files: Sequence[FileToWrite]) -> None:
        self.records: dict[str, FileRecord] = {}
        self._tensors = self._walk(files)
        self._file: _File | None = None

    def write(self, name: str, values: np.ndarray) -> None:
        """Writes the next tensor.

        Raises:
            NotFiniteError: it holds NaN or infinity.
            ValueError: it is not the tensor that is due.
        """
        spec = self.begin(name, values.shape)
        for block in row_blocks(values):
            self.append(np.ascontiguousarray(block, STORAGE[spec.dtype]))

    def begin(self, name: str, shape: tuple[int, ...]) -> TensorSpec:
        """Makes ready for the blocks of the next tensor."""
        self._file, self._name, self._spec = next(self._tensors)
        if (name, shape) != (self._name, tuple(self._spec.shape)):
            raise ValueError(f"expected {self._name} {self._spec.shape}, got {name} {shape}")
        return self._spec

    def append(self, block: np.ndarray) -> None:
        """The next block of the tensor, C-contiguous, in its dtype."""
        assert self._file is not None  # ``begin`` has been called
        if not all_finite(block, self._spec.dtype):
            raise NotFiniteError(
                f"{self._name} holds values that are NaN or infinite; such values are not saved"
            )
        self._file.append(block)

    def finish(self) -> None:
        """Brings the last file to the disk.

        Raises:
            ValueError: a tensor is missing.
        """
        if (missing := next(self._tensors, None)) is not None:
            raise ValueError(f"{missing[1]} is missing")

    def _walk(self, files: Sequence[FileToWrite]) -> Iterator[tuple[_File, str, TensorSpec]]:
        for each in files:
            with _File(each) as file:
                for name, spec in each.specs.items():
                    yield file, name, spec
                self.records[each.path.name] = file.finish()


class _File:
    """A file that is being written."""

    def __init__(self, what: FileToWrite) -> None:
        self._name = what.path.name
        self._checksum = Checksum()
        self._file = open(what.path, "wb", buffering=0)  # noqa: SIM115
        self._written = self._handed = 0
        self._write(encoded_header(what.specs)[0])

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._file.close()

    def append(self, block: np.ndarray) -> None:
        self._write(block.reshape(-1).view(np.uint8).data)

    def finish(self) -> FileRecord:
        os.fsync(self._file.fileno())
        return self._checksum.record()

    def _write(self, data: bytes | memoryview) -> None:
        self._checksum.update(data)
        left = memoryview(data)
        while left:  # one call may write less than it was given
            left = left[self._file.write(left) :]
        self._written += len(data)
        progress.report(f"writing {self._name}")
        if self._written - self._handed >= _WRITE_BACK:
            # Otherwise all of it waits for the fsync at the end, and the disk with it.
            length = self._written - self._handed
            os.posix_fadvise(self._file.fileno(), self._handed, length, os.POSIX_FADV_DONTNEED)
            self._handed = self._written


class ThreadWriter:
    """A ``TensorWriter`` in a thread of this process.

    Arrays are written as they are when their turn comes, so they must not change before.
    """

    def __init__(self, files: Sequence[FileToWrite]) -> None:
        self._files = FileSequence(files)
        self._waiting: deque[tuple[str, np.ndarray]] = deque()
        self._held = 0  # bytes of the waiting tensors and the one in work
        self._is_closed = self._is_done = False
        self._failure: BaseException | None = None
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="pypkg-writer", daemon=True)
        self._thread.start()

    def put(self, name: str, values: np.ndarray) -> None:
        with self._changed:
            self._changed.wait_for(
                lambda: not self._held or self._held + values.nbytes <= _AHEAD or self._is_done
            )
            if self._is_done:  # it has failed, which ``records`` tells
                return
            self._waiting.append((name, values))
            self._held += values.nbytes
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
        with self._changed:
            self._is_done = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        try:
            while (item := self._next()) is not None:
                self._files.write(*item)
                with self._changed:
                    self._held -= item[1].nbytes
                    self._changed.notify_all()
            if not self._is_done:
                self._files.finish()
        except BaseException as error:
            self._failure = error
        finally:
            with self._changed:
                self._is_done = True
                self._waiting.clear()
                self._changed.notify_all()

    def _next(self) -> tuple[str, np.ndarray] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._is_closed or self._is_done)
            return self._waiting.popleft() if self._waiting and not self._is_done else None


def row_blocks(values: np.ndarray) -> Iterator[np.ndarray]:
    """Slices of the first axis, of at most ``BLOCK`` bytes where a row is not larger."""
    if values.ndim == 0:
        yield values
        return
    rows = max(1, BLOCK * len(values) // max(values.nbytes, 1))
    for start in range(0, len(values), rows):
        yield values[start : start + rows]


def all_finite(values: np.ndarray, dtype: str) -> bool:
    """Whether no element is NaN or infinite.

    Args:
        values: in the storage of ``dtype``: bfloat16 as its bits.
    """
    if dtype == "bfloat16":
        return not ((values & 0x7F80) == 0x7F80).any()
    with np.errstate(over="ignore", invalid="ignore"):
        total = values.sum(dtype=np.float32 if dtype == "float16" else None)
    # A sum of finite numbers may still overflow.
    return bool(np.isfinite(total)) or bool(np.isfinite(values).all())
