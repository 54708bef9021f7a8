"""Ends the whole run, with one message, when a rank dies, fails or hangs.

A thread of every rank sends heartbeats with the rank's progress to the coordinator on rank 0
(coordinator.py). The thread ends the process when the coordinator sends a verdict or stops sending
heartbeats. Nothing else interrupts a rank that waits in a collective for a dead peer. In a run of
one process the functions of this module have no effect.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from pypkg import __version__
from pypkg.console import progress
from pypkg.console.logs import say
from pypkg.console.troubleshooting import error_text
from pypkg.parallel import mesh
from pypkg.parallel.launch.coordinator import Coordinator
from pypkg.parallel.launch.ports import check_fleet_port, join
from pypkg.parallel.launch.rendezvous import comparable, limits, named, rendezvous_endpoint
from pypkg.parallel.launch.verdicts import is_failed_wait, line_of_wait, place

_SECONDS_FOR_A_VERDICT = 10.0
_SECONDS_TO_LEAVE = 5.0  # limit of the wait until rank 0 has read this rank's last message


class Watchdog:
    """This rank's connection to the coordinator; rank 0 also runs the coordinator."""

    def __init__(self, rank: int, size: int) -> None:
        self._rank = rank
        self._limits = limits()
        address = rendezvous_endpoint()
        self._coordinator = Coordinator(address, size, self._limits) if rank == 0 else None
        self._stream = join(address, rank, self._limits)
        self._clock = self._limits.clock()
        self._place: tuple[int | None, str, int, float] = (None, "starting", 0, 0.0)
        self._heard = 0.0  # time of the coordinator's last message
        self._place_of_first = place(None, "starting")
        self._is_failing = False
        self._is_ending = False
        self._has_left = False
        self._points = 0  # number of stop points (``is_to_stop``) that this rank has reached
        self._pass = threading.Lock()  # guards the next three
        self._passed = 0  # number of stop points that this rank has passed
        self._has_finished = False
        self._is_asked = False
        self._asked = threading.Event()
        self._agreed = threading.Event()
        self._compared = threading.Event()
        self._decided = threading.Event()
        self._last_point: int | None = None
        self._stop_signal: int | None = None
        self._verdict = ""
        self._arrivals = 0  # number of barriers (``wait_for_all``) that this rank has reached
        self._is_waiting = False
        self._met = 0  # number of barriers that all ranks have reached
        self._meeting = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="pypkg-watchdog", daemon=True)
        self._thread.start()

    def at(self, step: int, operation: str) -> None:
        self._place = (step, operation, self._place[2] + 1, self._clock.seconds)

    def progress(self, operation: str) -> None:
        step, _, count, _ = self._place
        self._place = (step, operation, count + 1, self._clock.seconds)

    def compare_settings(self, settings_json: str) -> None:
        if self._coordinator is not None:
            check_fleet_port()
        self._stream.send("settings", settings=comparable(settings_json, __version__))
        self._compared.wait(2 * self._limits.start)  # the verdict arrives earlier

    def wait_for_all(self) -> None:
        self._arrivals += 1
        self._is_waiting = True
        self._stream.send("arrived", arrivals=self._arrivals)
        with self._meeting:
            self._meeting.wait_for(lambda: self._met >= self._arrivals)
        self._is_waiting = False

    def is_to_stop(self, signal_number: int | None) -> bool:
        if signal_number is not None and not self._asked.is_set():
            self._stream.send("stop", signal=signal_number)
            self._asked.wait(self._limits.start)
        self._points += 1
        with self._pass:
            if not self._is_asked:
                self._passed = self._points
                return False
        self._agreed.wait(self._limits.start)
        return self._last_point is not None and self._points > self._last_point

    def finish(self) -> int | None:
        with self._pass:
            self._has_finished = not self._is_asked
            if self._has_finished:
                return None
        self._agreed.wait(self._limits.start)
        return self._stop_signal

    def failed(self, message: str, exit_code: int, details: str) -> str:
        if self._is_ending:  # the thread has printed the cause and is about to end the process
            threading.Event().wait()
        self._is_failing = True
        self._report_failure(message, exit_code, details)
        self._decided.wait(_SECONDS_FOR_A_VERDICT)
        if self._coordinator is not None:
            self._coordinator.join()
        if self._verdict:
            return self._verdict
        silence = self._clock.seconds - self._heard
        if silence <= 2 * self._limits.heartbeat_interval or not is_failed_wait(message):
            return message
        line = line_of_wait(message)
        return f"{self._silence_of_first(silence)}; this rank waited and failed: {line}"

    def leave(self) -> None:
        self._has_left = True
        self._stream.send("left")
        self._stream.finish(_SECONDS_TO_LEAVE)
        if self._coordinator is not None:
            self._coordinator.close()

    def _answer(self) -> None:
        """Sends the number of stop points that this rank has passed."""
        with self._pass:
            self._is_asked = True
            passed, has_finished = self._passed, self._has_finished
        self._asked.set()
        self._stream.send("answer", passed=passed, finished=has_finished)

    def _heartbeat(self) -> dict[str, Any]:
        step, operation, count, since = self._place
        return {
            "step": step,
            "operation": operation,
            "count": count,
            "idle": self._clock.seconds - since,
            "waits": self._is_waiting,
        }

    def _report_failure(
        self, message: str, exit_code: int, details: str, lost_coordinator: bool = False
    ) -> None:
        self._stream.send(
            "failed", message=message, exit_code=exit_code, details=details,
            lost_coordinator=lost_coordinator, **self._heartbeat(),
        )  # fmt: skip

    def _run(self) -> None:
        due = 0.0
        while not self._has_left:
            try:
                ready = self._stream.wait(self._limits.heartbeat_interval / 4)
                messages = self._stream.receive() if ready else []
            except (OSError, ValueError):  # closed by leave()
                return
            now = self._clock.tick()
            if messages is None:
                self._lose_connection()
                return
            for message in messages:
                self._heard = now
                self._handle(message)
            if now - self._heard > self._limits.silence and not self._is_failing:
                self._lose_coordinator(now - self._heard)
            if time.monotonic() >= due:
                self._stream.send("heartbeat", **self._heartbeat())
                due = time.monotonic() + self._limits.heartbeat_interval

    def _handle(self, message: dict[str, Any]) -> None:
        kind = message["kind"]
        if kind == "heartbeat":
            self._place_of_first = message["place"]
        elif kind == "start":
            self._compared.set()
        elif kind == "ask":
            self._answer()
            if self._rank == 0 and message["rank"] != 0:  # rank 0 prints the output of the run
                name = signal.Signals(message["signal"]).name
                say(f"{named([message['rank']])} received {name}: the run ends")
        elif kind == "last_point":
            self._last_point, self._stop_signal = message["point"], message["signal"]
            self._agreed.set()
        elif kind == "met":
            with self._meeting:
                self._met = message["arrivals"]
                self._meeting.notify_all()
        elif kind == "closed":
            self._has_left = True
            self._stream.close()
        elif kind == "verdict":
            self._verdict = message["message"]
            self._decided.set()
            if not self._is_failing:
                self._end(message["message"], message["exit_code"], message["stacks"])

    def _lose_connection(self) -> None:
        if self._has_left or self._verdict:
            return
        text = (
            f"{named([0])} ended without a message, and was last {self._place_of_first}. Its own "
            "output may say why"
        )
        if self._is_failing:
            self._verdict = text
            self._decided.set()
        else:
            self._end(text, 1, False)

    def _lose_coordinator(self, silence: float) -> None:
        text = self._silence_of_first(silence)
        # Rank 0 may only be paused (SIGSTOP). When it continues, it reads this report.
        self._report_failure(text, 1, "", lost_coordinator=True)
        self._end(text, 1, False)

    def _silence_of_first(self, silence: float) -> str:
        first = named([0])
        return (
            f"no heartbeat from {first} for {silence:.0f} s: {first} was last "
            f"{self._place_of_first}"
        )

    def _end(self, message: str, exit_code: int, stacks: bool) -> None:
        """Prints the message and ends the process, even if its main thread waits in C++ code."""
        self._is_ending = True
        say(error_text(message) if exit_code == 2 else f"error: {message}")
        if stacks:
            faulthandler.dump_traceback(sys.stderr)
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        if self._coordinator is not None:
            self._coordinator.join()
        os._exit(exit_code)


_watchdog: Watchdog | None = None


def start() -> None:
    """Joins the rendezvous of a run of several processes and starts monitoring.

    Raises:
        UserError: rank 0 cannot listen at its port, or cannot be reached within the start limit.
    """
    global _watchdog
    if mesh.launched_processes() > 1:
        _watchdog = Watchdog(mesh.launched_rank(), mesh.launched_processes())
        progress.listen(_watchdog.progress)


def is_on() -> bool:
    """Whether this rank is monitored: the run has several processes."""
    return _watchdog is not None


def compare_settings(settings_json: str) -> None:
    """Waits until all ranks have sent equal settings; ends all ranks if settings differ.

    Raises:
        UserError: on rank 0, if another program holds the port of fleet's store.
    """
    if _watchdog is not None:
        _watchdog.compare_settings(settings_json)


@contextlib.contextmanager
def starting_fleet() -> Iterator[None]:
    """Ends this rank if the block takes longer than the start limit.

    Fleet's C++ code waits up to 15 minutes for a rank that may have ended. It holds the interpreter
    lock during that time, so the watchdog's thread cannot run. The thread of faulthandler can.
    """
    if _watchdog is None:
        yield
        return
    faulthandler.dump_traceback_later(limits().start, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def at(step: int, operation: str) -> None:
    """Records this rank's step and operation for its next heartbeat. The cost is one assignment."""
    if _watchdog is not None:
        _watchdog.at(step, operation)


def wait_for_all() -> None:
    """A barrier of all ranks without a time limit of its own. The silence and hang limits apply.

    Call it before a collective to which a rank may come later than the collective's time limit
    (30 s over gloo), for example because rank 0 writes a file first.
    """
    if _watchdog is not None:
        _watchdog.wait_for_all()


def is_to_stop(signal_number: int | None) -> bool:
    """Whether all ranks stop here because one of them received a signal.

    Every rank must call this at the same points of the run, the stop points.

    Args:
        signal_number: the signal that this rank received, or None.
    """
    if _watchdog is None:
        return signal_number is not None
    return _watchdog.is_to_stop(signal_number)


def finish(signal_number: int | None) -> int | None:
    """Records that this rank has done its last step; returns the signal that stops the run or None.

    A signal that arrives after a rank's last step does not stop the run.

    Args:
        signal_number: the signal that this rank received, or None. In a run of one process it is
            the result.
    """
    return signal_number if _watchdog is None else _watchdog.finish()


def failed(message: str, exit_code: int, details: str = "") -> str:
    """Reports the failure of this rank; returns the message about the run for the user."""
    return message if _watchdog is None else _watchdog.failed(message, exit_code, details)


def leave() -> None:
    """Reports that this rank has finished, and ends monitoring."""
    global _watchdog
    if _watchdog is not None:
        progress.listen(None)
        _watchdog.leave()
        _watchdog = None
