"""Log lines of the command lines: to standard error, above any progress bar.

A run outlives its log. Standard error may be a pipe whose reader has ended (``2>&1 | tee``, which
Ctrl-C ends as well), or a file on a full disk: lines are lost then, and nothing else. So it is with
the summary on standard output.
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
    """Writes a line to standard error, whatever the log level; one that cannot be written is lost.

    It does not go through Python's buffer, so a signal handler may call it.
    """
    with suppress(OSError):
        os.write(2, f"{text}\n".encode(errors="backslashreplace"))


def show(text: str) -> None:
    """Prints what a run has come to; where standard output cannot be written it is lost."""
    try:
        print(text, flush=True)
    except OSError:
        _discard_rest(1)


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
    atexit.register(_forget_unwritten)


def _forget_unwritten() -> None:
    """Lets the process end with its own exit code where standard error cannot be written."""
    try:
        sys.stderr.flush()
    except OSError:
        _discard_rest(2)


def _discard_rest(descriptor: int) -> None:
    """Lets the end of the process write what is still in a buffer, to nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
