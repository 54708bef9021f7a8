"""How a command line ends: its exit code and its last line on standard error."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from pypkg.console.troubleshooting import error_text
from pypkg.errors import UserError, memory_shortage

_READER_HAS_ENDED = 141  # 128 + SIGPIPE, as a shell reports it
_LESS_MEMORY = "Use a smaller batch, shorter sequences, or a machine with more memory"


def exit_code(run: Callable[[], int], interrupted: str) -> int:
    """Calls ``run`` and returns the exit code of the process.

    Args:
        run: does the work and returns the exit code of its end.
        interrupted: line to print when Ctrl-C stops it; says what is left.

    Returns:
        The code of ``run``; 2 after a UserError, which is printed with its section of the page on
        troubleshooting, if memory is exhausted, or if standard output takes no more, as on a full
        disk; 130 after Ctrl-C; 141 if the reader of standard output has ended, as ``head`` does.
    """
    try:
        code = run()
        if sys.stdout is not None:  # it is None if the shell has closed it
            sys.stdout.flush()  # an error of the output is one of this command
        return code
    except UserError as error:
        print(error_text(str(error)), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130
    except Exception as error:
        if shortage := memory_shortage(error, _LESS_MEMORY):
            print(error_text(str(shortage)), file=sys.stderr)
            return 2
        reason = _error_of_output() if isinstance(error, OSError) else None
        if reason is None:  # no error of the command's output
            raise
        if isinstance(reason, BrokenPipeError):
            return _READER_HAS_ENDED
        text = f"standard output cannot be written: {reason.strerror}; free some space"
        print(error_text(text), file=sys.stderr)
        return 2


def _error_of_output() -> OSError | None:
    """Why standard output takes nothing; None if it takes a newline, which is then written.

    What is left of the output goes to /dev/null, or the end of the process would fail once more.
    """
    if sys.stdout is None:
        return None
    try:
        print(flush=True)  # what has failed is no longer in the buffer
        return None
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return error
