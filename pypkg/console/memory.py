"""What a command says when the memory of the GPU or of the machine is exhausted."""

from __future__ import annotations

import re

from pypkg.errors import UserError

# Of Paddle, CUDA and its libraries, and C++. Errors in a backward pass arrive as OSError.
_SIGNS = re.compile(r"ResourceExhausted|out of memory|std::bad_alloc|_ALLOC_FAILED", re.IGNORECASE)
# Paddle's sentence after its list of C++ frames; advice and the place in its sources follow.
_SENTENCE = re.compile(r"ResourceExhausted(?:Error)?:?\s*(.+?)\s*(?:\n\n|\(at |$)", re.DOTALL)


def memory_shortage(error: BaseException, way_out: str) -> UserError | None:
    """What the user is told if ``error`` says that memory ran out; None for other errors.

    Args:
        error: a MemoryError, or an error of Paddle, whose type depends on where it was raised.
        way_out: what to change, without a full stop.
    """
    text = str(error).strip()
    if not isinstance(error, MemoryError) and not _SIGNS.search(text):
        return None
    sentence = _SENTENCE.search(text)
    cause = sentence[1] if sentence else text.rpartition("\n")[2]
    cause = cause.rstrip(".") or "the process was refused more"
    return UserError(f"memory is exhausted: {cause}. {way_out}")
