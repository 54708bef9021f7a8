"""Rank 0's coordinator: monitors a heartbeat from every rank and decides when the run stops."""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
import time
from dataclasses import dataclass
from typing import Any

from pypkg.errors import UserError
from pypkg.parallel.launch.message_stream import MessageStream
from pypkg.parallel.launch.rendezvous import Limits, differences, missing, named

# One failure makes other ranks fail too. All reports are awaited before a rank is blamed.
_SECONDS_FOR_THE_CAUSE = 1.5
_SECONDS_FOR_LAST_WORDS = 3.0


@dataclass
class _Member:
    """The last known state of a rank."""

    stream: MessageStream
    heard: float
    step: int | None = None
    operation: str = "starting"
    count: int = 0
    idle: float = 0.0
    communicates: bool = False
    settings: dict[str, Any] | None = None
    failure: dict[str, Any] | None = None
    gone: bool = False
    left: bool = False
    begun: dict[str, Any] | None = None

    @property
    def place(self) -> str:
        step = "before the first step" if self.step is None else f"at step {self.step}"
        return f"{step}, {self.operation}"


class Coordinator:
    """Monitors ``size`` ranks in a thread of its own, until ``close`` or a verdict.

    A verdict is the message {"message", "exit_code", "ranks", "stacks"}, sent to all ranks. Each
    rank ends its process when it receives one. ``ranks`` lists the ranks at fault; ``stacks`` asks
    every rank to print its Python stacks.
    """

    def __init__(self, address: tuple[str, int], size: int, limits: Limits) -> None:
        """
        Raises:
            UserError: the port is taken.
        """
        self._size = size
        self._limits = limits
        self._members: dict[int, _Member] = {}
        self._ranks: dict[MessageStream, int] = {}
        self._started_at = self._ticked = time.monotonic()
        self._heartbeat_due = 0.0
        self._decide_at: float | None = None
        self._started = False
        self._stop_signal: int | None = None
        self._over_at: float | None = None
        self._closing = False
        self._selector = selectors.DefaultSelector()
        self._server = _listen(address)
        self._selector.register(self._server, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name="pypkg-coordinator", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Tells the remaining ranks that monitoring has ended, and stops the thread."""
        self._closing = True
        self._thread.join(_SECONDS_FOR_LAST_WORDS)

    def join(self) -> None:
        """Waits, after a verdict, until the ranks have received it."""
        self._thread.join(_SECONDS_FOR_LAST_WORDS + 1)

    def _run(self) -> None:
        tick = min(0.1, self._limits.heartbeat_interval)
        while not self._closing and not self._is_over():
            for key, _ in self._selector.select(tick):
                if isinstance(key.fileobj, MessageStream):
                    self._read(key.fileobj)
                else:
                    self._accept()
            if self._over_at is None:
                self._check_time_limits()
        if self._closing:
            self._send_to_all("closed")
        for stream in self._ranks:
            stream.close()
        self._server.close()

    def _is_over(self) -> bool:
        if self._over_at is None:
            return False
        return time.monotonic() > self._over_at or all(
            member.gone for rank, member in self._members.items() if rank
        )

    def _accept(self) -> None:
        connection, _ = self._server.accept()
        # Messages are small; a rank that does not read them is not waited for.
        connection.settimeout(1.0)
        self._selector.register(MessageStream(connection), selectors.EVENT_READ)

    def _read(self, stream: MessageStream) -> None:
        messages = stream.receive()
        if messages is None:
            self._selector.unregister(stream)
            self._disconnected(stream)
            stream.close()
            return
        for message in messages:
            if stream in self._ranks:
                member = self._members[self._ranks[stream]]
                member.heard = time.monotonic()
                with contextlib.suppress(KeyError):  # incomplete messages are ignored
                    self._handle(member, message)
            elif message.get("kind") == "join":
                self._join(stream, message)

    def _disconnected(self, stream: MessageStream) -> None:
        if stream not in self._ranks:
            return
        member = self._members[self._ranks[stream]]
        member.gone = True
        if not member.left and member.failure is None:
            self._decide_soon()

    def _join(self, stream: MessageStream, message: dict[str, Any]) -> None:
        rank = message.get("rank")
        if not isinstance(rank, int) or not 0 <= rank < self._size or rank in self._members:
            text = f"an unexpected rank {rank} joined a run of {self._size} ranks"
            stream.send("verdict", message=text, exit_code=2, ranks=[rank], stacks=False)
            return
        self._ranks[stream] = rank
        self._members[rank] = _Member(stream, time.monotonic())

    def _handle(self, member: _Member, message: dict[str, Any]) -> None:
        kind = message["kind"]
        if kind in ("heartbeat", "failed"):
            for name in ("step", "operation", "count", "idle", "communicates"):
                setattr(member, name, message[name])
        if kind == "settings":
            member.settings = message["settings"]
            self._compare_settings()
        elif kind == "failed":
            member.failure = {**message, "at": time.monotonic()}
            self._decide_soon()
        elif kind == "stop" and self._stop_signal is None:
            self._stop_signal = message["signal"]
            self._send_to_all("ask")
        elif kind == "begun":
            member.begun = message
            self._agree_on_the_last_step()
        elif kind == "left":
            member.left = True

    def _send_to_all(self, kind: str, **content: Any) -> None:
        for member in self._members.values():
            if not member.gone:
                member.stream.send(kind, **content)

    def _verdict(self, message: str, exit_code: int, ranks: list[int], stacks: bool) -> None:
        self._over_at = time.monotonic() + _SECONDS_FOR_LAST_WORDS
        self._send_to_all(
            "verdict", message=message, exit_code=exit_code, ranks=ranks, stacks=stacks
        )

    def _compare_settings(self) -> None:
        settings = {r: m.settings for r, m in self._members.items() if m.settings is not None}
        if self._over_at is not None or len(settings) < self._size:
            return
        found = differences(settings)
        if not found:
            self._started = True
            self._send_to_all("start")
            return
        listed = "\n".join(f"  - {line}" for line in found)
        self._verdict(
            f"the ranks have different settings:\n{listed}\nStart all of them with the same "
            "settings file and command line.",
            2, sorted(settings), stacks=False,
        )  # fmt: skip

    def _agree_on_the_last_step(self) -> None:
        """All ranks stop after the latest step that one of them has begun; none if one is done."""
        members = self._members.values()
        begun = [member.begun for member in members if member.begun]
        if any(member.left for member in members) or any(each.get("finished") for each in begun):
            self._send_to_all("last_step", step=None, signal=None)
        elif len(begun) == len(members):
            step = max(each["step"] for each in begun)
            self._send_to_all("last_step", step=step, signal=self._stop_signal)

    def _check_time_limits(self) -> None:
        now = time.monotonic()
        if now - self._ticked > self._limits.silence / 2:  # this process itself was suspended
            for member in self._members.values():
                member.heard = now
        self._ticked = now
        if now > self._heartbeat_due:
            self._heartbeat_due = now + self._limits.heartbeat_interval
            first = self._members.get(0)
            self._send_to_all("heartbeat", place=first.place if first else "starting")
        if self._decide_at is not None:
            if now > self._decide_at or self._all_have_failed():
                self._decide()
        elif not self._started:
            if now - self._started_at > self._limits.start:
                text = missing(set(self._members), self._size, self._limits.start)
                if len(self._members) == self._size:
                    silent = [r for r, m in self._members.items() if m.settings is None]
                    text = f"{named(silent)} sent no settings within {self._limits.start:g} s"
                self._verdict(text, 1, [], stacks=False)
        elif not self._find_silent(now):
            self._find_hanging()

    def _decide_soon(self) -> None:
        if self._decide_at is None and self._over_at is None:
            self._decide_at = time.monotonic() + _SECONDS_FOR_THE_CAUSE

    def _all_have_failed(self) -> bool:
        failed = [member.failure is not None for member in self._members.values()]
        return len(failed) == self._size and all(failed)

    def _decide(self) -> None:
        """Blames the ranks that died, or else the first rank that reported a failure."""
        dead = [r for r, m in self._members.items() if m.gone and not m.left and not m.failure]
        if dead:
            places = "; ".join(f"{named([r])} died {self._members[r].place}" for r in dead)
            text = f"{places}. Its own output may say why; a kill leaves none."
            self._verdict(text, 1, dead, stacks=False)
            return
        failures = {r: m.failure for r, m in self._members.items() if m.failure}
        rank = min(failures, key=lambda r: failures[r]["at"])
        failure = failures[rank]
        text = failure["message"]
        if len({each["message"] for each in failures.values()}) > 1 or len(failures) < self._size:
            text = f"{named([rank])}, {self._members[rank].place}: {text}"
        if failure["details"]:
            text = f"{text}\n{failure['details']}"
        self._verdict(text, failure["exit_code"], [rank], stacks=False)

    def _find_silent(self, now: float) -> bool:
        limit = self._limits.silence
        silent = [
            rank
            for rank, member in self._members.items()
            if not member.left and not member.gone and now - member.heard > limit
        ]
        if silent:
            places = "; ".join(f"rank {r} was last {self._members[r].place}" for r in silent)
            text = f"no heartbeat from {named(silent)} for {limit:g} s: {places}"
            self._verdict(text, 1, silent, stacks=False)
        return bool(silent)

    def _find_hanging(self) -> None:
        there = {r: m for r, m in self._members.items() if not m.left}
        limit = self._limits.hang
        if not limit or all(member.idle <= limit for member in there.values()):
            return
        first = min(member.count for member in there.values())
        behind = [r for r, m in there.items() if m.count == first]
        behind = [r for r in behind if not there[r].communicates] or behind
        places = "; ".join(f"{named([r])} is {there[r].place}" for r in behind)
        others = [f"{named([r])} {m.place}" for r, m in there.items() if r not in behind]
        text = (
            f"no progress for {limit:g} s. {places}"
            + (f", and the others wait: {'; '.join(others)}" if others else "")
            + ". Each rank has printed its Python stacks to its own output. PYPKG_HANG_SECONDS "
            "sets this limit."
        )
        self._verdict(text, 1, behind, stacks=True)


def _listen(address: tuple[str, int]) -> socket.socket:
    host, port = address
    local = host in ("127.0.0.1", "localhost")
    try:
        return socket.create_server((host if local else "", port), backlog=1024)
    except OSError as error:
        raise UserError(
            f"the first rank cannot listen at port {port}: {error.strerror}. Another run may use "
            "it; set PYPKG_WATCH_ENDPOINT to host:port with a free port, the same on all ranks."
        ) from error
