"""Starts a run as several CPU processes on this machine and waits for them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from pypkg.console.logs import say
from pypkg.errors import UserError
from pypkg.parallel.endpoints import free_ports
from pypkg.parallel.launch import kills
from pypkg.parallel.launch.rendezvous import ENDPOINT

_LAUNCHER = "PYPKG_LAUNCHER_PID"
_SECONDS_AFTER_A_FAILURE = 15.0  # in which the other ranks can end by themselves
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_PR_SET_PDEATHSIG = 1
_LINES_SHOWN = 30


def take_nproc(arguments: Sequence[str]) -> tuple[list[str], int]:
    """``arguments`` without ``--nproc N``, and N (default 1).

    Raises:
        UserError: N is not a positive integer.
    """
    rest, number, words = [], "1", iter(arguments)
    for word in words:
        key, equals, value = word.partition("=")
        if key != "--nproc":
            rest.append(word)
            continue
        number = value if equals else next(words, "")
    if not number.isdecimal() or int(number) < 1:
        raise UserError(f"--nproc is {number!r}; expected how many processes to start, 1 or more")
    return rest, int(number)


def launch(
    arguments: Sequence[str], processes: int, log_folder: Path, module: str = "pypkg.pretrain"
) -> int:
    """Runs ``python -m module *arguments`` as ``processes`` ranks on the CPU; waits for them.

    Rank 0 writes to this terminal. Rank N writes to ``log_folder``/workerlog.N, and the launcher
    prints the end of this file if the rank is killed. The launcher forwards signals. All ranks end
    with the launcher.

    Returns:
        0, the exit code of the first rank that failed, or 128 + n if signal n ended the run.

    Raises:
        UserError: the log folder cannot be written.
    """
    ports = free_ports(processes + 2)
    signals: list[int] = []
    before = {each: signal.signal(each, lambda n, _: signals.append(n)) for each in _SIGNALS}
    ranks: list[subprocess.Popen] = []
    out_of_memory = kills.out_of_memory_kills()
    try:
        for rank in range(processes):
            # A later option overrides an earlier one.
            command = [sys.executable, "-m", module, *arguments, "--device", "cpu"]
            ranks.append(_start(command, rank_environment(rank, ports), rank, log_folder))
        _wait(ranks, signals)
    finally:
        codes = [_end(process) for process in ranks]
        for number, handler in before.items():
            signal.signal(number, handler)
    for rank, code in enumerate(codes):
        if code < 0 and not signals:
            _show_death(rank, kills.describe(-code, out_of_memory), log_folder)
    failed = [code for code in codes if code]
    if failed and signals:
        return 128 + signals[0]
    return 0 if not failed else failed[0] if failed[0] > 0 else 128 - failed[0]


def end_with_launcher() -> None:
    """Asks the kernel to kill this rank when its launcher dies; does nothing without a launcher."""
    launcher = os.environ.get(_LAUNCHER)
    if launcher is None:
        return
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(launcher):
        os.kill(os.getpid(), signal.SIGKILL)


def rank_environment(rank: int, ports: Sequence[int]) -> dict[str, str]:
    """Environment variables of a rank.

    Args:
        ports: the port of fleet's store, that of the coordinator, and then one port for each rank.
    """
    master, watch, *endpoints = (f"127.0.0.1:{port}" for port in ports)
    return {
        **os.environ,
        "PADDLE_TRAINER_ID": str(rank),
        "PADDLE_RANK_IN_NODE": str(rank),
        "PADDLE_TRAINERS_NUM": str(len(endpoints)),
        "PADDLE_LOCAL_SIZE": str(len(endpoints)),
        "PADDLE_TRAINER_ENDPOINTS": ",".join(endpoints),
        "PADDLE_CURRENT_ENDPOINT": endpoints[rank],
        "PADDLE_MASTER": master,
        "PADDLE_DISTRI_BACKEND": "gloo",
        "CUDA_VISIBLE_DEVICES": "",
        ENDPOINT: watch,
        _LAUNCHER: str(os.getpid()),
    }


def _start(
    command: Sequence[str], environment: dict[str, str], rank: int, log_folder: Path
) -> subprocess.Popen:
    # Each rank leads a process group, so that its workers end with it.
    with contextlib.ExitStack() as stack:
        log = None
        if rank:
            try:
                log_folder.mkdir(parents=True, exist_ok=True)
                log = stack.enter_context(_log(log_folder, rank).open("wb"))
            except OSError as error:
                raise UserError(
                    f"the log folder {log_folder} cannot be written: {error.strerror}. Set "
                    "output_dir to a folder you may write."
                ) from error
        return subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=log,
            stderr=subprocess.STDOUT if rank else None, start_new_session=True,
        )  # fmt: skip


def _wait(ranks: Sequence[subprocess.Popen], signals: list[int]) -> None:
    """Waits for all ranks; after a failure or a second Ctrl-C only for a grace period."""
    forwarded, deadline = 0, None
    while any(not _has_ended(process) for process in ranks):
        while forwarded < len(signals):
            for process in ranks:
                if not _has_ended(process):
                    number = signals[forwarded]
                    process.send_signal(signal.SIGTERM if number == signal.SIGHUP else number)
            forwarded += 1
        failed = any(_has_ended(process, failed=True) for process in ranks)
        if deadline is None and (failed or signals.count(signal.SIGINT) > 1):
            deadline = time.monotonic() + _SECONDS_AFTER_A_FAILURE
        if deadline is not None and time.monotonic() > deadline:
            return
        time.sleep(0.05)


def _has_ended(process: subprocess.Popen, failed: bool = False) -> bool:
    """Whether the process has ended (``failed``: with an error). It stays a zombie."""
    found = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)
    return found is not None and not (failed and found.si_status == 0)


def _end(process: subprocess.Popen) -> int:
    """Kills the rest of a rank's process group; returns the rank's exit code."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    return process.wait()


def _show_death(rank: int, kill: str, log_folder: Path) -> None:
    say(f"rank {rank} was ended by {kill}")
    if rank:
        text = _log(log_folder, rank).read_text(errors="replace").splitlines()[-_LINES_SHOWN:]
        say("\n".join(f"[rank {rank}] {line}" for line in text))


def _log(folder: Path, rank: int) -> Path:
    return folder / f"workerlog.{rank}"
