"""A lock on a folder: one process at a time builds in it, and a dead process holds no lock."""

from __future__ import annotations

import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pypkg.errors import UserError

logger = logging.getLogger("pypkg")

LOCK_FILE = "build.lock"
_LOG_EVERY = 30.0  # seconds
_LONGEST_PAUSE = 1.0


@contextmanager
def try_lock(folder: Path) -> Iterator[bool]:
    """Yields whether this process holds the lock of the folder, until the end of the block.

    The system releases the lock of a process that ends for any reason. On a file system without
    locks every process may build, which costs time and does no harm (see
    :mod:`pypkg.data.index.cache_files`).

    Raises:
        OSError: the folder cannot be written to.
    """
    descriptor = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        mine = _lock(descriptor)
        if mine:
            _sign(descriptor)
        yield mine
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        pass
    return True


def _sign(descriptor: int) -> None:
    """Writes the name of this process into the lock file, if the disk has room."""
    with suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)


def holder(folder: Path) -> str:
    """The name of the process that holds the lock, or held it last."""
    try:
        return (folder / LOCK_FILE).read_text("utf-8", "replace") or "another process"
    except OSError:
        return "another process"


class Wait:
    """The pauses of a process that waits for another one to build.

    Args:
        what: the awaited object, for messages.
        folder: the locked folder.
        time_limit: seconds after which :meth:`pause` raises.
    """

    def __init__(self, what: str, folder: Path, time_limit: float) -> None:
        self._what = what
        self._folder = folder
        self._time_limit = time_limit
        self._start = time.monotonic()
        self._logged = 0.0
        self._pause = 0.02

    @property
    def seconds(self) -> float:
        """Seconds since the wait began."""
        return time.monotonic() - self._start

    def pause(self) -> None:
        """Sleeps; pauses grow longer with time.

        Raises:
            UserError: the wait has reached ``time_limit``.
        """
        waited = self.seconds
        if waited > self._time_limit:
            raise UserError(
                f"waited {waited:.0f} s for {self._what}, which {holder(self._folder)} was to "
                f"write to {self._folder}. If it hangs, end it and start again; or name another "
                "folder as data_cache"
            )
        if waited - self._logged >= _LOG_EVERY:
            self._logged = waited
            logger.info(
                "waiting for %s, which %s builds (%d s)", self._what, holder(self._folder), waited
            )
        time.sleep(self._pause)
        self._pause = min(1.5 * self._pause, _LONGEST_PAUSE)
