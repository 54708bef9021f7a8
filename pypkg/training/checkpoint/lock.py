"""The lock of an output_dir, so that only one run at a time writes there.

``output_dir/.lock`` names the process that holds it, which touches the file every 15 seconds (a
heartbeat). The file is created exclusively, which is atomic on local file systems and NFS. A holder
is considered dead:

- on the same machine as soon as no process has its process id and start time;
- on another machine or in another container after 120 seconds without a heartbeat, by the clock of
  the file system. The clocks of the machines need not agree. The clock of the file system may have
  been set forward, so two heartbeats (30 seconds by this process's clock) must also be missed. If
  it was set back, the last heartbeat lies in the future; then 120 seconds of this process's clock
  must pass.

Nothing here imports Paddle.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from pypkg.errors import UserError

logger = logging.getLogger("pypkg")

LOCK_FILE = ".lock"
BEAT_SECONDS = 15.0
SILENCE_SECONDS = 120.0
WATCH_SECONDS = 2 * BEAT_SECONDS  # shortest observation of a lock before it is removed
_LOOK_SECONDS = 1.0  # interval at which a lock is read whose holder may be dead


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock.

    Attributes:
        host: name of the machine.
        pid: process id in ``pid_namespace``.
        started: start time of the process, in clock ticks since the machine booted.
        boot_id: the kernel's boot id, different after each boot.
        pid_namespace: the namespace of ``pid``; a container has its own.
        since: local time at which the lock was taken.
        token: random; identifies this acquisition of the lock.
    """

    host: str
    pid: int
    started: int | None
    boot_id: str | None
    pid_namespace: str | None
    since: str
    token: str

    @classmethod
    def of_this_process(cls) -> Holder:
        """This process as a holder, with a new token."""
        return cls(
            host=socket.gethostname(),
            pid=os.getpid(),
            started=_start_of(os.getpid()),
            boot_id=_boot_id(),
            pid_namespace=_pid_namespace(),
            since=time.strftime("%Y-%m-%d %H:%M:%S"),
            token=uuid.uuid4().hex,
        )

    def is_alive(self) -> bool | None:
        """Whether the process runs; None if this machine cannot find out."""
        if None in (self.boot_id, self.pid_namespace, self.started):
            return None
        if (self.boot_id, self.pid_namespace) != (_boot_id(), _pid_namespace()):
            return None
        return _start_of(self.pid) == self.started

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since}"


class OutputLock:
    """The lock of ``output_dir``, held from construction until :meth:`release`.

    Args:
        on_wait: called every second while another holder may still be alive.

    Raises:
        UserError: another process holds the lock, or it cannot be written.
    """

    def __init__(self, output_dir: str | Path, on_wait: Callable[[], None] = lambda: None) -> None:
        self._folder = Path(output_dir)
        self._path = self._folder / LOCK_FILE
        self._holder = Holder.of_this_process()
        self._on_wait = on_wait
        try:
            while not self._create():
                self._take_from_the_dead()
            # An open descriptor prevents that another folder gets the inode number (``check``).
            self._descriptor = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            raise UserError(
                f"the lock {self._path} cannot be taken: {error.strerror}. Set output_dir to a "
                "folder you may write."
            ) from error
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._beat_on, name="pypkg-lock", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Checks that this run may still write to output_dir.

        A lock file that was removed is created again.

        Raises:
            UserError: output_dir was removed or replaced, or another run has taken it over.
        """
        try:
            is_same = os.path.samestat(os.stat(self._folder), os.fstat(self._descriptor))
            if is_same and (self._is_mine() or self._create()):
                return
            holder = _holder(self._path)
        except OSError:
            is_same = False
        if not is_same:
            raise UserError(
                f"output_dir {str(self._folder)!r} was removed or replaced while the run wrote "
                "into it, so its earlier contents are gone. Find out what removed it, or set "
                "output_dir to another folder, then start the run again."
            )
        raise UserError(
            f"output_dir {str(self._folder)!r} was taken over by {holder or 'another run'}, "
            "because this run did not touch its lock for too long. This run writes nothing more "
            "there. Wait for the other run, or set output_dir to another folder."
        )

    def release(self) -> None:
        """Releases the lock, if this run still holds it."""
        self._released.set()
        self._thread.join()
        os.close(self._descriptor)
        if self._is_mine():
            with suppress(OSError):
                self._path.unlink()

    def beat(self) -> None:
        """Touches the lock file."""
        with suppress(OSError):  # the next ``check`` reports the problem
            if self._is_mine():
                os.utime(self._path)  # without an argument: the clock of the file system

    def _beat_on(self) -> None:
        while not self._released.wait(BEAT_SECONDS):
            self.beat()

    def _is_mine(self) -> bool:
        holder = _holder(self._path)
        return holder is not None and holder.token == self._holder.token

    def _create(self) -> bool:
        """Creates the lock file; returns False if it exists."""
        try:
            descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            return False
        try:
            os.write(descriptor, json.dumps(asdict(self._holder), indent=2).encode())
            os.fsync(descriptor)
        except OSError:
            self._path.unlink(missing_ok=True)
            raise
        finally:
            os.close(descriptor)
        return True

    def _take_from_the_dead(self) -> None:
        """Removes a lock whose holder is dead.

        Raises:
            UserError: the holder is alive.
        """
        first_touch, began = _touched(self._path), time.monotonic()
        has_logged = False
        while (touched := _touched(self._path)) is not None:
            holder = _holder(self._path)
            alive = None if holder is None else holder.is_alive()
            if alive or touched != first_touch:
                raise UserError(_refusal(self._path, holder))
            watched = time.monotonic() - began
            silence = max(self._now() - touched, watched)
            is_silent = silence > SILENCE_SECONDS and watched > WATCH_SECONDS
            if alive is False or is_silent:
                if self._remove(holder, touched):
                    return
            elif not has_logged:
                logger.info(
                    "%s is held by %s; waiting for a heartbeat for up to %d s",
                    *(self._path, holder or "a run", SILENCE_SECONDS),
                )
                has_logged = True
            self._on_wait()
            time.sleep(_LOOK_SECONDS)

    def _remove(self, holder: Holder | None, touched: float) -> bool:
        """Removes the lock of ``holder``, which is dead, but never a newer lock.

        Only the process that creates the file ``.lock.<token of the holder>`` removes the lock.

        Returns:
            False while another process is removing it.
        """
        claim = self._path.with_name(f"{LOCK_FILE}.{holder.token if holder else 'unreadable'}")
        try:
            os.close(os.open(claim, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        except FileExistsError:
            claimed = _touched(claim)
            # A process that has created the file may have died before it removed it.
            if claimed is not None and self._now() - claimed > SILENCE_SECONDS:
                claim.unlink(missing_ok=True)
            return False
        try:
            if _holder(self._path) == holder and _touched(self._path) == touched:
                logger.info("removing %s of %s, which has ended", self._path, holder or "a run")
                self._path.unlink(missing_ok=True)
        finally:
            claim.unlink(missing_ok=True)
        return True

    def _now(self) -> float:
        """The current time by the clock of the file system, in seconds since the epoch."""
        probe = self._path.with_name(f"{LOCK_FILE}.{self._holder.token}")
        probe.touch()
        try:
            return probe.stat().st_mtime
        finally:
            probe.unlink()


def refuse_if_in_use(output_dir: str | Path) -> None:
    """Checks, before anything is written, that no process of this machine holds the lock.

    Raises:
        UserError: a process holds it, or output_dir exists and is not a folder.
    """
    folder = Path(output_dir)
    path = folder / LOCK_FILE
    if os.path.lexists(folder) and not folder.is_dir():
        raise not_writable(folder, "it is a file, or a link that leads to no folder")
    try:
        holder = _holder(path)
    except OSError as error:  # such as a file in place of a folder above
        raise not_writable(folder, error.strerror) from error
    if holder is not None and holder.is_alive():
        raise UserError(_refusal(path, holder))


def not_writable(output_dir: str | Path, reason: str | None) -> UserError:
    """The error for an ``output_dir`` in which nothing can be written."""
    return UserError(
        f"output_dir {str(output_dir)!r} cannot be written: {reason}. Set output_dir to a folder "
        "you may write."
    )


def _refusal(path: Path, holder: Holder | None) -> str:
    return (
        f"output_dir {str(path.parent)!r} is in use by {holder or 'another run'}, which writes its "
        "checkpoints and metrics there. Wait until it ends, stop it, or set output_dir to another "
        "folder; a checkpoint of it can be named in resume_from_checkpoint. If it does not run any "
        f"more, remove {path}."
    )


def _holder(path: Path) -> Holder | None:
    """The holder of the lock; None if there is no lock file, or its content is invalid."""
    try:
        return Holder(**json.loads(path.read_bytes()))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def _touched(path: Path) -> float | None:
    """Modification time of a file; None if it does not exist."""
    try:
        with open(path, "rb") as file:  # opening it makes NFS ask the server
            return os.fstat(file.fileno()).st_mtime
    except FileNotFoundError:
        return None


def _start_of(pid: int) -> int | None:
    """Start time of a process of this machine, in clock ticks; None if it does not run."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    state, started = fields[0], fields[19]  # fields 3 and 22 of proc(5)
    return None if state in "ZX" else int(started)


def _boot_id() -> str | None:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None


def _pid_namespace() -> str | None:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return None
