"""Log lines of the command lines: to standard error, above any progress bar."""

from __future__ import annotations

import logging
import sys

from tqdm import tqdm


class _AboveProgressBar(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:

        tqdm.write(self.format(record), file=sys.stderr)
        sys.stderr.flush()


def configure_logging(level: int = logging.INFO) -> None:
    """Sends the package's log lines to standard error; a second call changes nothing."""
    logger = logging.getLogger("pypkg")
    if logger.handlers:
        return
    handler = _AboveProgressBar()
    handler.setFormatter(logging.Formatter("[%(asctime)s] %(message)s", datefmt="%H:%M:%S"))
    logger.addHandler(handler)
    logger.setLevel(level)
    logger.propagate = False
