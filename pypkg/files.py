"""Files that appear under their name only when they are complete."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pypkg.errors import UserError


class OutputFile:
    """A file written as ``<path>.tmp`` and renamed to ``path`` by :meth:`publish`.

    The temporary name is the same every time, so that what a killed run left behind is
    overwritten by the next one; a lock keeps two runs from writing it at the same time.

    Raises:
        UserError: on whatever goes wrong with the disk; the temporary file is removed then.
    """

    def __init__(self, path: Path, suffix: str = ".tmp") -> None:
        self.path = path
        self.temporary = path.with_name(path.name + suffix)
        with self._errors():
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.temporary, os.O_RDWR | os.O_CREAT, 0o666)
            self._file = os.fdopen(descriptor, "r+b", buffering=1 << 20)
        self._lock()
        with self._errors():
            self._file.truncate(0)

    def write(self, data: bytes | memoryview) -> None:
        with self._errors():
            self._file.write(data)

    def sync(self) -> None:
        """Brings what was written to the disk."""
        with self._errors():
            self._file.flush()
            os.fsync(self._file.fileno())

    def publish(self) -> None:
        """Gives the file its name. Call :meth:`sync` first."""
        with self._errors():
            os.replace(self.temporary, self.path)
            self._file.close()
            folder = os.open(self.path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    def discard(self) -> None:
        """Removes the temporary file, if it has not been published."""
        if self._file.closed:
            return
        with suppress(OSError):
            self.temporary.unlink()
        with suppress(OSError):  # closing writes what is buffered, which a full disk refuses
            self._file.close()

    def _lock(self) -> None:
        taken = False
        try:
            fcntl.flock(self._file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            taken = True
        except OSError:  # a file system without locks
            pass
        # The other process may have renamed the file after it was opened here.
        if taken or not _is_open_file(self.temporary, self._file.fileno()):
            self._file.close()
            raise UserError(
                f"another process is writing {self.path} (as {self.temporary}); wait for it or "
                "choose another output"
            )

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if hasattr(self, "_file"):
                self.discard()
            raise UserError(
                f"cannot write {self.path}: {error.strerror}. Nothing was left under that name "
                "by this run; free some space or choose a folder that can be written"
            ) from error


def _is_open_file(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def write_file(path: Path, data: bytes) -> None:
    """Replaces ``path`` by ``data`` in one step.

    Raises:
        UserError: it cannot be written; what was there is untouched.
    """
    file = OutputFile(path)
    file.write(data)
    file.sync()
    file.publish()
