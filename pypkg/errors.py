"""Errors that the user can fix, printed without a traceback."""

from __future__ import annotations

import re

# Of Paddle, CUDA and its libraries, and C++. Errors in a backward pass arrive as OSError.
_OUT_OF_MEMORY = re.compile(
    r"ResourceExhausted|out of memory|std::bad_alloc|_ALLOC_FAILED", re.IGNORECASE
)
# Paddle's sentence after its list of C++ frames; advice and the place in its sources follow.
_CAUSE = re.compile(r"ResourceExhausted(?:Error)?:?\s*(.+?)\s*(?:\n\n|\(at |$)", re.DOTALL)


class UserError(Exception):
    """A setting, file or input that cannot be used.

    The message names what was found and where, what was expected, and a way out. Command lines
    print it as ``error: ...``, then its section of docs/guides/troubleshooting.md
    (``pypkg.console.troubleshooting``), and exit with code 2.
    """


def memory_shortage(error: BaseException, way_out: str) -> UserError | None:
    """What the user is told if ``error`` says that memory ran out; None for other errors.

    Args:
        error: a MemoryError, or an error of Paddle, whose type depends on where it was raised.
        way_out: what to change, without a full stop.
    """
    text = str(error).strip()
    if not isinstance(error, MemoryError) and not _OUT_OF_MEMORY.search(text):
        return None
    found = _CAUSE.search(text)
    cause = found[1] if found else text.rpartition("\n")[2]
    cause = cause.rstrip(".") or "the process was refused more"
    return UserError(f"memory is exhausted: {cause}. {way_out}")
