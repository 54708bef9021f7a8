"""Durable, atomic writes: a file or folder appears under its name only when it is complete.

Data is written under a temporary name, brought to the disk with fsync and renamed; an fsync of the
parent folder makes the rename itself durable. After a crash at any moment the final name holds
either the old contents or all of the new ones. Everything in this package that has to survive a
crash is written by one of these functions.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from pypkg.console import progress
from pypkg.errors import UserError


class OutputFile:
    """A file written under the temporary name ``<path><suffix>``, renamed by :meth:`publish`.

    The temporary name is the same in every run, so that the next run overwrites what a killed one
    left behind. A lock keeps two processes from writing the same file at the same time. As a
    context manager it discards what was not published::

        with OutputFile(Path("corpus.bin")) as file:
            file.write(b"...")
            file.publish()

    Args:
        path: final name; missing parent folders are made.
        suffix: of the temporary name.

    Raises:
        UserError: the disk is full, the path cannot be written, or another process is writing it.
            The temporary file is removed.
    """

    def __init__(self, path: Path, suffix: str = ".tmp") -> None:
        if not path.name:  # ".", "/" or an empty name
            raise UserError(f"cannot write {path}: it is a folder; name a file to write in it")
        self.path = path
        self.temporary = path.with_name(path.name + suffix)
        with self._errors():
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.temporary, os.O_RDWR | os.O_CREAT, 0o666)
            self._file = os.fdopen(descriptor, "r+b", buffering=1 << 20)
        self._lock()
        with self._errors():
            self._file.truncate(0)

    def __enter__(self) -> OutputFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.discard()

    def write(self, data: bytes | memoryview) -> None:
        """Appends ``data``; it may stay in a buffer until :meth:`sync`."""
        with self._errors():
            self._file.write(data)

    def sync(self) -> None:
        """Brings what was written to the disk."""
        with self._errors():
            self._file.flush()
            os.fsync(self._file.fileno())

    def publish(self, durable: bool = True) -> None:
        """Brings the file to the disk and gives it its final name.

        A writer of several files calls :meth:`sync` on each before it publishes the first, so that
        a full disk leaves all of the old ones.

        Args:
            durable: False does not wait for the disk. A crash of the machine may then leave a file
                without its contents: for files whose readers compare a checksum.
        """
        if durable:
            self.sync()
        with self._errors():
            self._file.flush()
            os.replace(self.temporary, self.path)
            self._file.close()
            if durable:
                sync(self.path.parent)

    def discard(self) -> None:
        """Removes the temporary file, unless it has been published."""
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


def write_file(
    path: Path, *blocks: bytes | memoryview, suffix: str = ".tmp", durable: bool = True
) -> None:
    """Replaces ``path`` by the concatenation of ``blocks`` in one step.

    Args:
        suffix: of the temporary name.
        durable: as of ``OutputFile.publish``.

    Raises:
        UserError: it cannot be written; the old contents are untouched.
    """
    with OutputFile(path, suffix) as file:
        for block in blocks:
            file.write(block)
        file.publish(durable)


def append_line(path: Path, line: bytes) -> None:
    """Appends ``line`` and a newline to a file, which is made if it is missing.

    What a crash has left of a last line is removed first. The line is on the disk when this
    returns. Several processes may append to one file.

    Raises:
        OSError: the disk is full or the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    with path.open("a+b", buffering=0) as file:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        _remove_torn_line(file.fileno())
        file.write(line + b"\n")
        os.fsync(file.fileno())
    if is_new:
        sync(path.parent)


def _remove_torn_line(descriptor: int) -> None:
    """Cuts off what follows the last newline."""
    end = size = os.fstat(descriptor).st_size
    while end > 0:
        start = max(end - 4096, 0)
        newline = os.pread(descriptor, end - start, start).rfind(b"\n")
        if newline >= 0:
            end = start + newline + 1
            break
        end = start
    if end < size:
        os.ftruncate(descriptor, end)


def read_lines(path: Path, way_out: str) -> tuple[list[bytes], bytes]:
    """The lines of a file to which lines are appended; none if the file is missing.

    Args:
        path: of the file.
        way_out: a sentence that ends the error.

    Returns:
        The complete lines without their newlines, and what follows the last newline: empty, or a
        line that a crash has cut short.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        *lines, torn = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return [], b""
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}. {way_out}") from error
    return lines, torn


def publish_files(files: Mapping[Path, Path]) -> None:
    """Renames complete temporary files to their final names, in order.

    All of them are on the disk before the first is renamed.

    Args:
        files: final name of each temporary file; both lie in the same file system.

    Raises:
        OSError: the disk is full or a folder cannot be written.
    """
    for temporary in files:
        sync(temporary)
    for temporary, final in files.items():
        os.replace(temporary, final)
    for folder in {final.parent for final in files.values()}:
        sync(folder)


@contextmanager
def new_folder(final: Path, temporary: Path) -> Iterator[None]:
    """``temporary``, made anew for the block, takes the place of ``final`` at its end.

    If anything fails, ``final`` is as it was and ``temporary`` is gone.

    Raises:
        UserError: a folder or file cannot be written.
    """
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield
        replace_folder(temporary, final)
    except OSError as error:
        raise UserError(
            f"cannot write {final}: {error.strerror}; choose a folder that can be written to and "
            "has room"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def replace_folder(temporary: Path, final: Path) -> None:
    """Gives a complete folder its final name; a folder of that name is removed afterwards.

    All files below ``temporary`` are on the disk before the rename. The old folder is moved aside
    to ``<temporary>.old`` for the moment of the rename, and comes back if the rename fails.

    Raises:
        OSError: the disk is full or the parent folder cannot be written; ``final`` is as it was.
    """
    for folder, _, names in os.walk(temporary, topdown=False):
        for name in names:
            sync(Path(folder, name))
        sync(Path(folder))
    aside = temporary.with_name(temporary.name + ".old")
    try:
        if final.is_dir():
            os.rename(final, aside)
        os.rename(temporary, final)
    except BaseException:
        if aside.is_dir() and not final.exists():
            os.rename(aside, final)
        raise
    try:
        sync(final.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def sync(path: Path) -> None:
    """Brings a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    progress.report(f"bringing {path.name} to the disk")
