"""Rank 0's coordinator: monitors a heartbeat from every rank and decides when the run stops."""

from __future__ import annotations

import contextlib
import selectors
import threading
import time
from typing import Any

from pypkg.files import file_handles
from pypkg.parallel.launch import verdicts
from pypkg.parallel.launch.message_stream import MessageStream
from pypkg.parallel.launch.ports import listen
from pypkg.parallel.launch.rendezvous import Limits, differences, missing, named
from pypkg.parallel.launch.verdicts import Failure, Member, Verdict

# One failure makes other ranks fail too. The coordinator waits for their reports before it decides.
_SECONDS_FOR_THE_CAUSE = 1.5
_SECONDS_TO_END = 3.0  # after a verdict: limit of the wait until the other ranks have ended
_SECONDS_TO_CLOSE = 2.0  # limit of the wait until the ranks have read the last message


class Coordinator:
    """Monitors ``size`` ranks in a thread of its own, until ``close`` or a verdict.

    A rank that receives a verdict (``verdicts.Verdict``) ends its process. The coordinator also
    sends heartbeats to the ranks, with the step and operation of rank 0.
    """

    def __init__(self, address: tuple[str, int], size: int, limits: Limits) -> None:
        """
        Raises:
            UserError: the port is taken, or the limit of open files allows fewer connections.
        """
        # Every rank also connects to Paddle's store on rank 0.
        file_handles.require(2 * size, f"The connections of {size} ranks to rank 0")
        self._size = size
        self._limits = limits
        self._members: dict[int, Member] = {}
        self._ranks: dict[MessageStream, int] = {}
        self._clock = limits.clock()
        self._heartbeat_due = 0.0
        self._decide_at: float | None = None
        self._started = False
        self._stop_signal: int | None = None
        self._met = 0  # number of barriers (``wait_for_all``) that all ranks have reached
        self._over_at: float | None = None
        self._closing = False
        self._selector = selectors.DefaultSelector()
        self._server = listen(address)
        self._selector.register(self._server, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name="pypkg-coordinator", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Tells the remaining ranks that monitoring has ended, and stops the thread."""
        self._closing = True
        self._thread.join(_SECONDS_TO_END)

    def join(self) -> None:
        """Waits, after a verdict, until the ranks have received it."""
        self._thread.join(_SECONDS_TO_END + 1)

    def _run(self) -> None:
        tick = min(0.1, self._limits.heartbeat_interval)
        while not self._closing and not self._is_over():
            ready = self._selector.select(tick)
            self._clock.tick()
            for key, _ in ready:
                if isinstance(key.fileobj, MessageStream):
                    self._read(key.fileobj)
                else:
                    self._accept()
            if self._over_at is None:
                self._check_time_limits()
        if self._closing:
            self._send_to_all("closed")
        deadline = time.monotonic() + _SECONDS_TO_CLOSE
        for stream in self._ranks:
            stream.finish(max(deadline - time.monotonic(), 0.0))
        self._server.close()

    def _is_over(self) -> bool:
        if self._over_at is None:
            return False
        return time.monotonic() > self._over_at or all(
            member.gone for rank, member in self._members.items() if rank
        )

    def _accept(self) -> None:
        connection, _ = self._server.accept()
        # Messages are small; a send to a rank that does not read them fails after this time.
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
                member.heard = self._clock.seconds
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
            stream.send("verdict", **Verdict(text, 2)._asdict())
            return
        self._ranks[stream] = rank
        self._members[rank] = Member(stream, self._clock.seconds)
        stream.send("welcome")

    def _handle(self, member: Member, message: dict[str, Any]) -> None:
        kind = message["kind"]
        if kind in ("heartbeat", "failed"):
            for name in ("step", "operation", "count", "idle", "waits"):
                setattr(member, name, message[name])
        if kind == "settings":
            member.settings = message["settings"]
            self._compare_settings()
        elif kind == "failed":
            names = ("message", "exit_code", "details", "lost_coordinator")
            content = {name: message[name] for name in names}
            member.failure = Failure(**content, at=self._clock.seconds)
            self._decide_soon()
        elif kind == "stop" and self._stop_signal is None:
            self._stop_signal = message["signal"]
            rank = next(r for r, each in self._members.items() if each is member)
            self._send_to_all("ask", rank=rank, signal=self._stop_signal)
        elif kind == "answer":
            member.answer = message
            self._agree_on_the_last_point()
        elif kind == "arrived":
            member.arrivals = message["arrivals"]
            self._let_pass()
        elif kind == "left":
            member.left = True

    def _send_to_all(self, kind: str, **content: Any) -> None:
        for member in self._members.values():
            if not member.gone:
                member.stream.send(kind, **content)

    def _end(self, verdict: Verdict) -> None:
        self._over_at = time.monotonic() + _SECONDS_TO_END
        self._send_to_all("verdict", **verdict._asdict())

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
        self._end(
            Verdict(
                f"the ranks have different settings:\n{listed}\nStart all of them with the same "
                "settings file and command line.",
                2,
            )
        )

    def _agree_on_the_last_point(self) -> None:
        """Stops all ranks at the first stop point that no rank has passed.

        No rank stops if one has finished already.
        """
        members = self._members.values()
        answers = [member.answer for member in members if member.answer]
        if any(member.left for member in members) or any(each["finished"] for each in answers):
            self._send_to_all("last_point", point=None, signal=None)
        elif len(answers) == len(members):
            point = max(each["passed"] for each in answers)
            self._send_to_all("last_point", point=point, signal=self._stop_signal)

    def _let_pass(self) -> None:
        """Releases the ranks from a barrier when the last one has reached it."""
        arrivals = min(member.arrivals for member in self._members.values())
        if arrivals > self._met and len(self._members) == self._size:
            self._met = arrivals
            self._send_to_all("met", arrivals=arrivals)

    def _check_time_limits(self) -> None:
        now = self._clock.seconds
        if now > self._heartbeat_due:
            self._heartbeat_due = now + self._limits.heartbeat_interval
            first = self._members.get(0)
            self._send_to_all("heartbeat", place=first.place if first else "starting")
        if self._decide_at is not None:
            if time.monotonic() > self._decide_at or self._all_have_failed():
                pause = self._clock.recent_pause()
                self._end(verdicts.of_failures(self._members, self._size, now, pause))
        elif not self._started:
            if now > self._limits.start:
                text = missing(set(self._members), self._size, self._limits.start)
                if len(self._members) == self._size:
                    silent = [r for r, m in self._members.items() if m.settings is None]
                    text = f"{named(silent)} sent no settings within {self._limits.start:g} s"
                self._end(Verdict(text, 1))
        else:
            verdict = verdicts.of_silence(self._members, now, self._limits.silence)
            verdict = verdict or verdicts.of_hang(self._members, self._limits.hang)
            if verdict:
                self._end(verdict)

    def _decide_soon(self) -> None:
        if self._decide_at is None and self._over_at is None:
            self._decide_at = time.monotonic() + _SECONDS_FOR_THE_CAUSE

    def _all_have_failed(self) -> bool:
        failed = [member.failure is not None for member in self._members.values()]
        return len(failed) == self._size and all(failed)
