"""Progress reports of long phases, and times of the phases at the start of a run.

A phase without training steps (building indices, initializing, reading or writing weights) calls
``report`` for each file, tensor or stage. The watchdog of a rank listens
(``pypkg.parallel.launch.watchdog``): its hang limit counts from the last report, so it does not
limit the length of a phase. Without a listener a report has no effect.

``begin_start``, ``phase`` and ``end_start`` time a run from its command to its first step.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

logger = logging.getLogger("pypkg")

LOG_SECONDS = 10.0  # interval of the log lines about a loop

_Item = TypeVar("_Item")
_listener: Callable[[str], None] | None = None
_start: _Start | None = None


def listen(listener: Callable[[str], None] | None) -> None:
    """Passes all later reports to ``listener``; None: to no one."""
    global _listener
    _listener = listener


def report(activity: str) -> None:
    """Reports that this process makes progress.

    Args:
        activity: for messages, such as "writing model.safetensors".
    """
    if _listener is not None:
        _listener(activity)


def through(items: Sequence[tuple[str, _Item]], activity: str) -> Iterator[tuple[str, _Item]]:
    """Yields ``items``, pairs of a name and a value, and reports ``activity`` with each name.

    A line is logged every ``LOG_SECONDS``.
    """
    logged = time.monotonic()
    for number, (name, item) in enumerate(items, 1):
        report(f"{activity} {name}")
        yield name, item
        if time.monotonic() - logged > LOG_SECONDS:
            logged = time.monotonic()
            logger.info("%s %s: %d of %d parameters", activity, name, number, len(items))


class _Start:
    def __init__(self) -> None:
        self.begin = time.monotonic()
        self.seconds: dict[str, float] = {}
        self.inner: list[float] = []  # for each open phase, the seconds of the phases inside it


def begin_start() -> None:
    """Starts timing the start of a run; discards earlier times."""
    global _start
    _start = _Start()


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Adds the time of its block to the phase ``name``, without the phases inside the block."""
    start = _start
    if start is None:
        yield
        return
    report(name)
    begin = time.monotonic()
    start.inner.append(0.0)
    try:
        yield
    finally:
        total = time.monotonic() - begin
        own = total - start.inner.pop()
        start.seconds[name] = start.seconds.get(name, 0.0) + own
        if start.inner:
            start.inner[-1] += total


def is_starting() -> bool:
    """Whether the start is timed now: no training step has ended yet."""
    return _start is not None


def end_start() -> dict[str, float]:
    """Logs the time since ``begin_start`` and returns the seconds of each phase.

    Time outside of all phases is the phase "other". Empty without ``begin_start``.
    """
    global _start
    start, _start = _start, None
    if start is None:
        return {}
    total = time.monotonic() - start.begin
    seconds = start.seconds | {"other": total - sum(start.seconds.values())}
    told = " | ".join(f"{name} {value:.2f}" for name, value in seconds.items())
    logger.info("start, %.2f s to the end of the first step: %s", total, told)
    return seconds
