"""Log lines of the commands, on standard error and above any progress bar.

A run does not depend on its log. Standard error may be a pipe whose reader has ended (such as
``2>&1 | tee``, which Ctrl-C ends too), or a file on a full disk. Lines are then lost, but the run
continues. The same holds for the summary on standard output.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
from contextlib import suppress

from tqdm import tqdm


class _AboveProgressBar(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError):
            tqdm.write(self.format(record), file=sys.stderr)
            sys.stderr.flush()


def say(text: str) -> None:
    """Writes a line to standard error at every log level. If that fails, the line is lost.

    It does not use Python's buffer, so a signal handler may call it.
    """
    with suppress(OSError):
        os.write(2, f"{text}\n".encode(errors="backslashreplace"))


def show(text: str) -> None:
    """Prints the result of a run on standard output. If that fails, the text is lost."""
    try:
        print(text, flush=True)
    except OSError:
        _discard_rest(1)


def configure_logging(rank: int = 0) -> None:
    """Sends the package's log lines to standard error. A second call has no effect.

    Ranks other than 0 only log warnings, unless the environment variable PYPKG_LOG_ALL_RANKS is 1.
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
    atexit.register(_forget_unwritten)


def _forget_unwritten() -> None:
    """Keeps the exit code of the process if standard error cannot be written."""
    try:
        sys.stderr.flush()
    except OSError:
        _discard_rest(2)


def _discard_rest(descriptor: int) -> None:
    """Redirects a descriptor to /dev/null, so that flushing its buffer at exit does not fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
