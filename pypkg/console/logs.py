"""Log lines of the command lines: to standard error, above any progress bar."""

from __future__ import annotations

import logging
import os
import sys

from tqdm import tqdm


class _AboveProgressBar(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)
        sys.stderr.flush()


def configure_logging(rank: int = 0) -> None:
    """Sends the package's log lines to standard error; a second call changes nothing.

    Ranks other than the first say no more than warnings, unless the environment variable
    PYPKG_LOG_ALL_RANKS is 1.
    """
    logger = logging.getLogger("pypkg")
    if logger.handlers:
        return
    handler = _AboveProgressBar()
    handler.setFormatter(logging.Formatter("[%(asctime)s] %(message)s", datefmt="%H:%M:%S"))
    logger.addHandler(handler)
    every = rank == 0 or os.environ.get("PYPKG_LOG_ALL_RANKS") == "1"
    logger.setLevel(logging.INFO if every else logging.WARNING)
    logger.propagate = False
