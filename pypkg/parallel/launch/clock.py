"""A clock that stands still while its process is stopped."""

from __future__ import annotations

import time

_LONG_PAUSE = 5.0  # seconds; a thread of a loaded machine may come late by less
_RECENT = 60.0  # seconds that a pause is remembered


class RunningClock:
    """Seconds for which this process has run.

    A process that was stopped (SIGSTOP, a suspended machine, a debugger) has heard nothing
    meanwhile and cannot blame others for it. So the time between two ticks counts up to a limit
    only. One thread ticks; any thread may read.

    Attributes:
        seconds: as of the last tick.

    Args:
        longest: seconds that the time between two ticks counts at most.
    """

    def __init__(self, longest: float) -> None:
        self.seconds = 0.0
        self._longest = longest
        self._pause = 0.0
        self._paused_at = 0.0
        self._ticked = time.monotonic()

    def tick(self) -> float:
        """Moves the clock on; returns ``seconds``."""
        now = time.monotonic()
        elapsed, self._ticked = now - self._ticked, now
        if elapsed > _LONG_PAUSE:
            self._pause, self._paused_at = elapsed, self.seconds
        self.seconds += min(elapsed, self._longest)
        return self.seconds

    def recent_pause(self) -> float:
        """Length in seconds of a long pause within the last minute; 0 if there was none."""
        return self._pause if self.seconds - self._paused_at < _RECENT else 0.0
