"""Ends the whole run, with one message, when a rank dies, fails or hangs.

A thread of every rank sends heartbeats with the rank's progress to the coordinator on rank 0
(coordinator.py), and ends the process when the coordinator decides so: a rank that waits in a
collective for a dead peer cannot be interrupted in another way. In a run of one process, all
functions do nothing.
"""

from __future__ import annotations

import faulthandler
import os
import select
import socket
import sys
import threading
import time
from typing import Any

from pypkg import __version__
from pypkg.errors import UserError
from pypkg.parallel import mesh
from pypkg.parallel.launch.coordinator import Coordinator
from pypkg.parallel.launch.message_stream import MessageStream
from pypkg.parallel.launch.rendezvous import (
    Limits,
    comparable,
    limits,
    loopback_hint,
    named,
    rendezvous_endpoint,
)

_SECONDS_FOR_A_VERDICT = 10.0


class Watchdog:
    """This rank's connection to the coordinator; rank 0 also runs the coordinator."""

    def __init__(self, rank: int, size: int) -> None:
        self._limits = limits()
        address = rendezvous_endpoint()
        self._coordinator = Coordinator(address, size, self._limits) if rank == 0 else None
        self._stream = MessageStream(_connect(address, self._limits))
        self._place: tuple[int | None, str, int, float] = (None, "starting", 0, time.monotonic())
        self._is_failing = False
        self._is_ending = False
        self._has_left = False
        self._steps = threading.Lock()  # guards the next three
        self._begun = 0  # the last step that this rank has begun
        self._has_finished = False
        self._is_asked = False
        self._asked = threading.Event()
        self._agreed = threading.Event()
        self._compared = threading.Event()
        self._decided = threading.Event()
        self._last_step: int | None = None
        self._stop_signal: int | None = None
        self._verdict = ""
        self._stream.send("join", rank=rank)
        self._thread = threading.Thread(target=self._run, name="pypkg-watchdog", daemon=True)
        self._thread.start()

    def at(self, step: int, operation: str) -> None:
        self._place = (step, operation, self._place[2] + 1, time.monotonic())

    def compare_settings(self, settings_json: str) -> None:
        self._stream.send("settings", settings=comparable(settings_json, __version__))
        self._compared.wait(2 * self._limits.start)  # the verdict arrives earlier

    def reached(self, step: int, signal_number: int | None) -> bool:
        if signal_number is not None and not self._asked.is_set():
            self._stream.send("stop", signal=signal_number)
            self._asked.wait(self._limits.start)
        with self._steps:
            if not self._is_asked:
                self._begun = step + 1
                return False
        self._agreed.wait(self._limits.start)
        return self._last_step is not None and step >= self._last_step

    def finish(self) -> int | None:
        with self._steps:
            self._has_finished = not self._is_asked
            if self._has_finished:
                return None
        self._agreed.wait(self._limits.start)
        return self._stop_signal

    def failed(self, message: str, exit_code: int, details: str) -> str:
        if self._is_ending:  # the watchdog thread has printed the cause already
            threading.Event().wait()
        self._is_failing = True
        self._stream.send(
            "failed", message=message, exit_code=exit_code, details=details, **self._heartbeat()
        )
        self._decided.wait(_SECONDS_FOR_A_VERDICT)
        if self._coordinator is not None:
            self._coordinator.join()
        return self._verdict or message

    def leave(self) -> None:
        self._has_left = True
        self._stream.send("left")
        if self._coordinator is not None:
            self._coordinator.close()
        self._stream.close()

    def _answer(self) -> None:
        """Sends the step that this rank has begun, in which its main thread may wait for others."""
        with self._steps:
            self._is_asked = True
            begun, has_finished = self._begun, self._has_finished
        self._asked.set()
        self._stream.send("begun", step=begun, finished=has_finished)

    def _heartbeat(self) -> dict[str, Any]:
        step, operation, count, since = self._place
        idle = time.monotonic() - since
        return {
            "step": step,
            "operation": operation,
            "count": count,
            "idle": idle,
            "communicates": False,
        }

    def _run(self) -> None:
        due = 0.0
        while not self._has_left:
            if time.monotonic() >= due:
                self._stream.send("heartbeat", **self._heartbeat())
                due = time.monotonic() + self._limits.heartbeat_interval
            try:
                ready, _, _ = select.select(
                    [self._stream], [], [], self._limits.heartbeat_interval / 4
                )
                messages = self._stream.receive() if ready else []
            except (OSError, ValueError):  # closed by leave()
                return
            if messages is None:
                if not (self._has_left or self._is_failing):
                    self._end(
                        f"{named([0])} ended without a message; its own output may say why",
                        1,
                        False,
                    )
                return
            for message in messages:
                self._handle(message)

    def _handle(self, message: dict[str, Any]) -> None:
        kind = message["kind"]
        if kind == "start":
            self._compared.set()
        elif kind == "ask":
            self._answer()
        elif kind == "last_step":
            self._last_step, self._stop_signal = message["step"], message["signal"]
            self._agreed.set()
        elif kind == "closed":
            self._has_left = True
        elif kind == "verdict":
            self._verdict = message["message"]
            self._decided.set()
            if not self._is_failing:
                self._end(message["message"], message["exit_code"], message["stacks"])

    def _end(self, message: str, exit_code: int, stacks: bool) -> None:
        """Ends the process, whatever its main thread is waiting for."""
        self._is_ending = True
        print(f"error: {message}", file=sys.stderr)
        if stacks:
            faulthandler.dump_traceback(sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        if self._coordinator is not None:
            self._coordinator.join()
        os._exit(exit_code)


_watchdog: Watchdog | None = None


def start() -> None:
    """Joins the rendezvous of a run of several processes and starts monitoring.

    Raises:
        UserError: rank 0 cannot be reached within the start limit.
    """
    global _watchdog
    if mesh.launched_processes() > 1:
        _watchdog = Watchdog(mesh.launched_rank(), mesh.launched_processes())


def is_on() -> bool:
    """Whether this rank is monitored: the run has several processes."""
    return _watchdog is not None


def compare_settings(settings_json: str) -> None:
    """Waits until all ranks have sent equal settings; ends all ranks if settings differ."""
    if _watchdog is not None:
        _watchdog.compare_settings(settings_json)


def at(step: int, operation: str) -> None:
    """Records the progress of this rank for its next heartbeat; costs one assignment."""
    if _watchdog is not None:
        _watchdog.at(step, operation)


def reached(step: int, signal_number: int | None) -> bool:
    """Whether all ranks stop before ``step + 1`` because one of them received a signal.

    Args:
        step: the last step that this rank has completed.
        signal_number: the signal that this rank received, or None.
    """
    if _watchdog is None:
        return signal_number is not None
    return _watchdog.reached(step, signal_number)


def finish(signal_number: int | None) -> int | None:
    """Ends the steps of this rank; returns the signal on which all ranks stop, or None.

    A signal that arrives after a rank's last step stops no rank.

    Args:
        signal_number: the signal that this rank received, or None. It decides alone in a run of
            one process.
    """
    return signal_number if _watchdog is None else _watchdog.finish()


def failed(message: str, exit_code: int, details: str = "") -> str:
    """Reports the failure of this rank; returns the message about the run to show to the user."""
    return message if _watchdog is None else _watchdog.failed(message, exit_code, details)


def leave() -> None:
    """Reports that this rank has finished, and ends monitoring."""
    global _watchdog
    if _watchdog is not None:
        _watchdog.leave()
        _watchdog = None


def _connect(address: tuple[str, int], waiting: Limits) -> socket.socket:
    deadline = time.monotonic() + waiting.start
    while True:
        try:
            connection = socket.create_connection(address, timeout=5)
            connection.settimeout(None)
            return connection
        except OSError as error:
            if time.monotonic() > deadline:
                host, port = address
                raise UserError(
                    f"rank {mesh.launched_rank()} could not reach rank 0 at {host}:{port} within "
                    f"{waiting.start:g} s ({error.strerror or error}). Is rank 0 running? "
                    f"PYPKG_START_SECONDS sets this limit.{loopback_hint()}"
                ) from error
            time.sleep(0.2)
