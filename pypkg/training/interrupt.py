"""Turns Ctrl-C, SIGTERM and SIGUSR1 into a request to stop, which the run checks between steps.

SIGUSR1 means the same as SIGTERM. ``srun`` and ``mpirun`` forward SIGUSR1 to the run, but kill the
run at SIGTERM. Paddle's launcher kills its ranks 30 s after SIGTERM, but can ignore SIGUSR1.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType

from pypkg.console.logs import say
from pypkg.errors import UserError
from pypkg.parallel.launch import watchdog

_Handler = Callable[[int, FrameType | None], object] | int | None  # as ``signal.signal`` has it
GRACE = "PYPKG_GRACE_SECONDS"


def grace_seconds() -> float | None:
    """PYPKG_GRACE_SECONDS: seconds from a signal to the end of the process; None: no limit.

    Raises:
        UserError: it is not a positive number.
    """
    text = os.environ.get(GRACE)
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < threading.TIMEOUT_MAX:
        raise UserError(
            f"the environment variable {GRACE} is {text!r}; expected a number of seconds above 0"
        )
    return seconds


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGUSR1 arrived before there was anything to save."""


def raise_on_sigterm() -> None:
    """Makes SIGTERM and SIGUSR1 raise ``Terminated``, as Ctrl-C raises KeyboardInterrupt.

    The import of Paddle replaces this handler by one that prints a C++ traceback.
    """

    def handle(number: int, frame: FrameType | None) -> None:
        ignore_sigterm()
        raise Terminated

    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, handle)


def ignore_sigterm() -> None:
    """Makes SIGTERM and SIGUSR1 do nothing, for the end of a process that one of them has stopped.

    Python removes its own handlers early at exit. Launchers repeat their signal, which would then
    kill the process and change its exit code.
    """
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


class InterruptRequest:
    """Context manager in which a signal sets :attr:`signal_number` and is acknowledged on stderr.

    SIGUSR1 counts as SIGTERM. A second Ctrl-C raises KeyboardInterrupt. A second SIGTERM is
    ignored, because paddle.distributed.launch sends three within a second. If the block has not
    ended ``grace_seconds`` after the first signal, all ranks are ended, and a save in progress is
    abandoned.

    Args:
        then: what the run does after a signal, for the message on stderr.

    Raises:
        UserError: from ``grace_seconds``.
    """

    def __init__(self, then: str) -> None:
        self.signal_number: int | None = None
        self._then = then
        self._grace = grace_seconds()
        self._timer: threading.Timer | None = None
        self._previous: dict[int, _Handler] = {}

    def __enter__(self) -> InterruptRequest:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        if self._timer is not None:
            self._timer.cancel()
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def __bool__(self) -> bool:
        return self.signal_number is not None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGUSR1:
            number = signal.SIGTERM
        if self.signal_number is None:
            self.signal_number = number
            within = ""
            if self._grace is not None:
                within = f", within {self._grace:g} s"
                self._timer = threading.Timer(self._grace, self._give_up)
                self._timer.daemon = True
                self._timer.start()
            say(f"\n{signal.Signals(number).name}: {self._then}{within}")
        elif number == signal.SIGINT:
            raise KeyboardInterrupt

    def _give_up(self) -> None:
        assert self.signal_number is not None and self._grace is not None
        code = 128 + self.signal_number
        message = watchdog.failed(
            f"{signal.Signals(self.signal_number).name} came {self._grace:g} s ago ({GRACE}), and "
            "the run has not ended: what it was saving is given up; earlier checkpoints are "
            "untouched",
            code,
        )
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        say(f"\nerror: {message}")
        os._exit(code)
