"""A clock that does not advance while its process is stopped."""

from __future__ import annotations

import time

_LONG_PAUSE = 5.0  # seconds; a loaded machine delays a thread by less
_RECENT = 60.0  # seconds for which ``recent_pause`` reports a pause


class RunningClock:
    """Seconds for which this process has run.

    A process that was stopped (SIGSTOP, a suspended machine, a debugger) did not read heartbeats
    during that time, although the senders were alive. The time between two ticks therefore counts
    only up to a limit. One thread calls ``tick``; any thread may read ``seconds``.

    Attributes:
        seconds: the time at the last tick.

    Args:
        longest: the limit of the time between two ticks, in seconds.
    """

    def __init__(self, longest: float) -> None:
        self.seconds = 0.0
        self._longest = longest
        self._pause = 0.0
        self._paused_at = 0.0
        self._ticked = time.monotonic()

    def tick(self) -> float:
        """Advances the clock; returns ``seconds``."""
        now = time.monotonic()
        elapsed, self._ticked = now - self._ticked, now
        if elapsed > _LONG_PAUSE:
            self._pause, self._paused_at = elapsed, self.seconds
        self.seconds += min(elapsed, self._longest)
        return self.seconds

    def recent_pause(self) -> float:
        """Length in seconds of a long pause within the last minute; 0 if there was none."""
        return self._pause if self.seconds - self._paused_at < _RECENT else 0.0
