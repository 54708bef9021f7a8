"""Reports the progress of a check of files to the log and the watchdog."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from pypkg.parallel.launch import watchdog

logger = logging.getLogger("pypkg")

_SECONDS_BETWEEN_LOG_LINES = 30.0


def read_progress(what: str) -> Callable[[int], None]:
    """A callback that takes the size in bytes of each block read. The log names ``what``."""
    total, logged = 0, time.monotonic()

    def on_read(count: int) -> None:
        nonlocal total, logged
        total += count
        watchdog.at(0, "verifying files")
        if time.monotonic() - logged > _SECONDS_BETWEEN_LOG_LINES:
            logged = time.monotonic()
            logger.info("verifying %s: %.1f GB read", what, total / 1e9)

    return on_read
