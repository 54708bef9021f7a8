"""Decides which rank caused the failure of a run, and writes the message to the user.

The functions evaluate the states of the ranks that the coordinator keeps. Times are seconds of its
``RunningClock``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from pypkg.parallel.launch.message_stream import MessageStream
from pypkg.parallel.launch.rendezvous import named

# Errors of gloo, NCCL and pypkg.parallel.gloo's mailboxes that another rank causes.
_FAILED_WAIT = re.compile(
    r"gloo.*TIMEOUT|Timed out waiting|(Connection|Socket) closed|Connection reset|Broken pipe"
    r"|no message from rank|unhandled system error|remote error",
    re.IGNORECASE,
)
_SECONDS_OF_SILENCE = 5.0  # without a heartbeat; others may have waited in vain for such a rank
_LONGEST_LINE = 300


@dataclass
class Failure:
    """The failure that a rank reported.

    Attributes:
        details: a traceback, or empty.
        at: time at which the report arrived.
        lost_coordinator: whether the rank ended because rank 0 sent no heartbeat.
    """

    message: str
    exit_code: int
    details: str
    at: float
    lost_coordinator: bool = False


@dataclass
class Member:
    """The last known state of a rank.

    Attributes:
        heard: time of its last message.
        count: number of its progress reports.
        idle: seconds since the last progress report.
        waits: whether it waits at a barrier (``watchdog.wait_for_all``).
        arrivals: number of barriers that it has reached.
        gone: whether its connection is closed.
        left: whether it has finished without an error.
        answer: its answer to a stop request: the stop points that it has passed.
    """

    stream: MessageStream
    heard: float
    step: int | None = None
    operation: str = "starting"
    count: int = 0
    idle: float = 0.0
    waits: bool = False
    arrivals: int = 0
    settings: dict[str, Any] | None = None
    failure: Failure | None = None
    gone: bool = False
    left: bool = False
    answer: dict[str, Any] | None = None

    @property
    def place(self) -> str:
        """The rank's step and operation as text."""
        return place(self.step, self.operation)


class Verdict(NamedTuple):
    """How the run ends: sent to all ranks, each of which prints it and ends its process.

    Attributes:
        stacks: whether every rank prints its Python stacks.
    """

    message: str
    exit_code: int
    stacks: bool = False


Members = Mapping[int, Member]


def is_failed_wait(message: str) -> bool:
    """Whether an error message means that a collective failed because another rank was missing."""
    return _FAILED_WAIT.search(message) is not None


def line_of_wait(message: str) -> str:
    """The line of an error that names the failed wait, without Paddle's frame around it."""
    lines = [line.strip() for line in message.splitlines() if is_failed_wait(line)]
    return (lines or message.splitlines() or [""])[0][:_LONGEST_LINE]


def place(step: int | None, operation: str) -> str:
    """Step and operation as text."""
    return f"{'before the first step' if step is None else f'at step {step}'}, {operation}"


def of_silence(members: Members, now: float, limit: float) -> Verdict | None:
    """The verdict on ranks without a heartbeat for ``limit`` seconds; None: there are none."""
    silent = [
        rank
        for rank, member in members.items()
        if not member.left and not member.gone and now - member.heard > limit
    ]
    if not silent:
        return None
    return Verdict(
        f"no heartbeat from {named(silent)} for {limit:g} s: {_were(members, silent)}", 1
    )


def of_hang(members: Members, limit: float) -> Verdict | None:
    """The verdict if no rank has made progress for ``limit`` s; it names those furthest behind."""
    there = {rank: member for rank, member in members.items() if not member.left}
    if not limit or not there or any(member.idle <= limit for member in there.values()):
        return None
    behind = [rank for rank, member in there.items() if not member.waits] or list(there)
    first = min(there[rank].count for rank in behind)
    behind = [rank for rank in behind if there[rank].count == first]
    others = [rank for rank in there if rank not in behind]
    return Verdict(
        f"no progress for {limit:g} s. {_are(members, behind)}"
        + (f", and the others wait: {_are(members, others)}" if others else "")
        + ". Each rank has printed its Python stacks to its own output. PYPKG_HANG_SECONDS "
        "sets this limit.",
        1,
        stacks=True,
    )


def of_failures(members: Members, size: int, now: float, pause: float) -> Verdict:
    """The verdict after a rank has failed or died. It names the rank that caused the failure.

    The cause is the first that applies: rank 0, if other ranks got no heartbeat from it; ranks that
    died without a report; ranks without a heartbeat, or behind the others, for which a failed
    collective waited; the rank that reported a failure first.

    Args:
        size: number of ranks of the run.
        pause: seconds for which rank 0 was stopped shortly before; 0 if it was not.
    """
    failures = {rank: m.failure for rank, m in members.items() if m.failure is not None}
    lost = [rank for rank, failure in failures.items() if failure.lost_coordinator]
    if lost:
        return Verdict(f"{named(lost)} ended: {failures[lost[0]].message}", 1)
    dead = [r for r, m in members.items() if m.gone and not m.left and not m.failure]
    if dead:
        places = "; ".join(f"{named([r])} died {members[r].place}" for r in dead)
        text = (
            f"{places}. Its own output may say why. A kill leaves none; the kernel's log of its "
            "machine (dmesg) names processes that were killed because memory ran out."
        )
        return Verdict(_with_pause(text, pause), 1)
    causes = {r: failure for r, failure in failures.items() if not is_failed_wait(failure.message)}
    rank = min(causes or failures, key=lambda r: failures[r].at)
    failure, member = failures[rank], members[rank]
    awaited = "" if causes else _awaited(members, rank, now)
    if awaited or (pause and not causes):
        line = line_of_wait(failure.message)
        text = f"{awaited}{named([rank])}, {member.place}, waited and failed: {line}"
        return Verdict(_with_pause(text, pause), failure.exit_code)
    text = failure.message
    if len({each.message for each in failures.values()}) > 1 or len(failures) < size:
        text = f"{named([rank])}, {member.place}: {text}"
    if failure.details:
        text = f"{text}\n{failure.details}"
    return Verdict(text, failure.exit_code)


def _awaited(members: Members, waiting: int, now: float) -> str:
    """The ranks that the rank ``waiting`` waits for; empty if that is unknown."""
    others = {r: m for r, m in members.items() if m.failure is None and not (m.left or m.gone)}
    silence = {rank: now - member.heard for rank, member in others.items()}
    silent = [rank for rank in others if silence[rank] > _SECONDS_OF_SILENCE]
    if silent:
        longest = max(silence[rank] for rank in silent)
        return f"no heartbeat from {named(silent)} for {longest:.0f} s: {_were(members, silent)}; "
    behind = [r for r, m in others.items() if m.count < members[waiting].count and not m.waits]
    return f"{_are(members, behind)}; " if behind else ""


def _with_pause(text: str, pause: float) -> str:
    if not pause:
        return text
    return (
        f"{named([0])} did not run for {pause:.0f} s (it was stopped, or its machine was "
        f"suspended), and the other ranks may have ended because of that. {text}"
    )


def _are(members: Members, ranks: list[int]) -> str:
    return "; ".join(f"{named([rank])} is {members[rank].place}" for rank in ranks)


def _were(members: Members, ranks: list[int]) -> str:
    return "; ".join(f"{named([rank])} was last {members[rank].place}" for rank in ranks)
