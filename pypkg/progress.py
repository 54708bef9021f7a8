"""Where a long phase says that it makes progress.

A phase without training steps (building indices, drawing, reading or writing weights) calls
``report`` for each file, tensor or stage. The watchdog of a rank listens
(``pypkg.parallel.launch.watchdog``): its hang limit counts from the last report, so it measures
standing still and not the length of the phase. Without a listener a report does nothing.
"""

from __future__ import annotations

from collections.abc import Callable

_listener: Callable[[str], None] | None = None


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
