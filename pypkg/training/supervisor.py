"""Restarts a run after a crash or the loss of a host, as long as it makes progress.

It runs any launch line, such as ``pypkg pretrain run.json --nproc 4`` or
``python -m paddle.distributed.launch run_pretrain.py run.json``. On several hosts, each host has a
supervisor. Paddle's own launcher restarts ranks only with etcd. It restarts them at once, and does
not check for progress.

Progress is a newer checkpoint in output_dir, from which the next attempt resumes.
"""

from __future__ import annotations

import ctypes
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from pypkg.errors import UserError
from pypkg.parallel.launch import kills
from pypkg.training.checkpoint.folders import checkpoints
from pypkg.training.ledger import record

logger = logging.getLogger("pypkg")

_USER_ERROR = 2
# Exit codes of pypkg, and of Paddle's launcher, which exits with the number of the signal.
_STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM, int(signal.SIGTERM))
# Slurm sends SIGUSR1 ahead of the time limit: sbatch --signal=B:USR1@300.
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
# These kill the processes they started when they get SIGTERM, but forward SIGUSR1.
_STARTERS = ("srun", "mpirun", "mpiexec")
_SECONDS_TO_REPEAT = 10.0
_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


@dataclass(frozen=True)
class Policy:
    """When and how often a run is restarted.

    Attributes:
        max_restarts: limit of consecutive restarts without a new checkpoint; 0: no restarts.
        backoff: seconds before a restart; each restart without a new checkpoint doubles them.
        max_backoff: limit of the seconds before a restart.
    """

    max_restarts: int = 3
    backoff: float = 10.0
    max_backoff: float = 600.0

    def delay(self, fruitless: int) -> float:
        """Seconds before the next attempt, after ``fruitless`` attempts without a checkpoint."""
        return min(self.backoff * 2 ** min(fruitless, 30), self.max_backoff)


class Supervisor:
    """Runs ``command`` until it succeeds, is stopped, has invalid input or makes no progress.

    Restarts are recorded in ledger.jsonl of ``output_dir``. A signal is forwarded to the command,
    which saves a checkpoint and ends; it is not restarted then. ``srun`` and ``mpirun`` get SIGUSR1
    instead of any signal, repeated every 10 s, because ranks that are starting may miss it. Other
    commands get SIGTERM instead of SIGHUP and SIGUSR1. The Slurm job is requeued after SIGUSR1, and
    after a preemption, in which Slurm sends SIGTERM to the run.

    Args:
        command: the launch line of the run; it gets a process group and session of its own.
        output_dir: the output folder of the run.
    """

    def __init__(self, command: Sequence[str], output_dir: Path, policy: Policy) -> None:
        self._command = list(command)
        self._output_dir = output_dir
        self._policy = policy
        self._signals: list[int] = []
        self._signalled = threading.Event()
        self._child: subprocess.Popen | None = None

    def run(self) -> int:
        """Runs the command; returns its last exit code, or 128 + n if signal n ended it.

        Raises:
            UserError: the command cannot be started.
        """
        before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        _LIBC.prctl(_PR_SET_CHILD_SUBREAPER, 1)
        try:
            code = self._run_attempts()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if code in (0, _USER_ERROR):
            return code
        if self._signals[:1] == [signal.SIGUSR1] or (not self._signals and _is_preempted()):
            _requeue()
        return code

    def _run_attempts(self) -> int:
        first = newest = self._newest_step()
        fruitless = 0
        while True:
            before, out_of_memory = newest, kills.out_of_memory_kills()
            code = self._attempt()
            newest = self._newest_step()
            fruitless = 0 if newest > before else fruitless + 1
            if code == 0 or self._signals:
                return code
            if reason := _reason_to_end(code):
                logger.error("not started again: %s", reason)
                return code
            if number := kills.signal_of(code):
                logger.error("the run was ended by %s", kills.describe(number, out_of_memory))
            if newest <= first or fruitless >= self._policy.max_restarts:
                self._give_up(code, newest, fruitless)
                return code
            delay = self._policy.delay(fruitless)
            self._record("restart", newest, exit_code=code, fruitless=fruitless, delay=delay)
            logger.warning(
                "the run ended with exit code %d, its newest checkpoint is of step %d; it is "
                "started again in %g s",
                *(code, newest, delay),
            )
            if self._signalled.wait(delay):
                return 128 + self._signals[0]

    def _give_up(self, code: int, newest: int, fruitless: int) -> None:
        self._record("given_up", newest, exit_code=code, fruitless=fruitless)
        logger.error(
            "not started again after exit code %d: attempts in a row without a new checkpoint in "
            "%s: %d (--max_restarts %d). The output of the run says why it ended",
            *(code, self._output_dir, fruitless, self._policy.max_restarts),
        )

    def _attempt(self) -> int:
        """Starts the command and waits for its end; returns its exit code."""
        others = set(_children())
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # until they can be forwarded
        try:
            child = subprocess.Popen(self._command, start_new_session=True, preexec_fn=_in_child)
        except OSError as error:
            raise UserError(
                f"{self._command[0]!r} cannot be started: {error.strerror}. Give the launch line "
                "after --, as on a command line of its own."
            ) from error
        else:
            self._child = child
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        code = self._wait(child)
        self._child = None
        _kill_descendants(others)
        return code if code >= 0 else 128 - code

    def _wait(self, child: subprocess.Popen) -> int:
        while True:
            try:
                return child.wait(_SECONDS_TO_REPEAT)
            except subprocess.TimeoutExpired:
                # A signal just before a wait without a limit would wait for the end of the child.
                if self._signals and self._is_started_by_another:
                    self._forward(self._signals[0])

    @property
    def _is_started_by_another(self) -> bool:
        return os.path.basename(self._command[0]) in _STARTERS

    def _newest_step(self) -> int:
        found = checkpoints(self._output_dir)
        return found[-1][0] if found else -1

    def _record(self, event: str, newest: int, **fields: Any) -> None:
        step = newest if newest >= 0 else None
        try:
            record(self._output_dir, event, step=step, host=socket.gethostname(), **fields)
        except UserError as error:  # a full disk must not prevent a restart
            logger.warning("%s", error)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._signals.append(number)
        self._signalled.set()
        self._forward(number)

    def _forward(self, number: int) -> None:
        if self._child is None:
            return
        if self._is_started_by_another:
            self._child.send_signal(signal.SIGUSR1)
        else:
            ends = number in (signal.SIGHUP, signal.SIGUSR1)
            self._child.send_signal(signal.SIGTERM if ends else number)


def _reason_to_end(code: int) -> str:
    """The reason why an exit code forbids a restart; empty if it is the code of a crash."""
    if code == _USER_ERROR:
        return "exit code 2 is a mistake in settings or files, which the next attempt repeats"
    if code in _STOPPED:
        return f"exit code {code} says that somebody has stopped the run"
    return ""


def _in_child() -> None:
    """Runs in the child before the command: if the supervisor dies, the child gets SIGTERM."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)


def _kill_descendants(others: set[int]) -> None:
    """Kills the processes left over by an attempt, such as ranks whose launcher was killed.

    Args:
        others: ids of children that do not belong to the attempt.
    """
    while children := set(_children()) - others:
        for pid in children:
            os.kill(pid, signal.SIGKILL)  # the id of a child is not reused before it is waited for
            os.waitpid(pid, 0)


def _children() -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text(errors="replace").rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == os.getpid():
            found.append(int(entry.parent.name))
    return found


def _is_preempted() -> bool:
    """Whether Slurm preempts the job of this process.

    Slurm itself queues a preempted job again only if it still runs at the end of its GraceTime.
    """
    job, scontrol = os.environ.get("SLURM_JOB_ID"), shutil.which("scontrol")
    if job is None or scontrol is None:
        return False
    command = [scontrol, "show", "job", job]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return re.search(r"\bPreemptTime=\d", done.stdout) is not None


def _requeue() -> None:
    job = os.environ.get("SLURM_JOB_ID")
    scontrol = shutil.which("scontrol")
    if job is None or scontrol is None:
        logger.warning("SIGUSR1 came outside of a Slurm job: nothing was queued again")
        return
    done = subprocess.run([scontrol, "requeue", job], capture_output=True, text=True, check=False)
    if done.returncode:
        logger.error("scontrol requeue %s failed: %s", job, done.stderr.strip())
    else:
        logger.info("the Slurm job %s is queued again", job)
