"""Where long phases say that they make progress, and how long those of the start take.

A phase without training steps (building indices, drawing, reading or writing weights) calls
``report`` for each file, tensor or stage. The watchdog of a rank listens
(``pypkg.parallel.launch.watchdog``): its hang limit counts from the last report, so it measures
standing still and not the length of the phase. Without a listener a report does nothing.

``begin_start``, ``phase`` and ``end_start`` time a run from its command to its first step.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

logger = logging.getLogger("pypkg")

LOG_SECONDS = 10.0  # between two lines about one loop

_Item = TypeVar("_Item")
_listener: Callable[[str], None] | None = None
_start: _Start | None = None


def listen(listener: Callable[[str], None] | None) -> None:
    """Hands all later reports to ``listener``; None ends that."""
    global _listener
    _listener = listener


def report(activity: str) -> None:
    """Says that this process has just got on with ``activity``.

    Args:
        activity: as a message names it, such as "writing model.safetensors".
    """
    if _listener is not None:
        _listener(activity)


def through(items: Sequence[tuple[str, _Item]], activity: str) -> Iterator[tuple[str, _Item]]:
    """``items``, pairs of a name and anything, each reported as ``activity`` and its name.

    The log has a line every ``LOG_SECONDS``.
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
        self.inner: list[float] = []  # seconds of phases within each phase that is open


def begin_start() -> None:
    """A run begins; what was timed before is forgotten."""
    global _start
    _start = _Start()


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Adds the time of its body to the phase ``name``, without phases inside it."""
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


def end_start() -> dict[str, float]:
    """Logs the time since ``begin_start``, by phase, and returns it in seconds.

    What belongs to no phase is the phase "other". Empty if no run began.
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
