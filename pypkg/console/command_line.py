"""How a command line ends: its exit code and its last line on standard error."""

from __future__ import annotations

import sys
from collections.abc import Callable

from pypkg.console.troubleshooting import error_text
from pypkg.errors import UserError


def exit_code(run: Callable[[], int], interrupted: str) -> int:
    """Calls ``run`` and returns the exit code of the process.

    Args:
        run: does the work and returns the exit code of its end.
        interrupted: line to print when Ctrl-C stops it; says what is left.

    Returns:
        The code of ``run``; 2 after a UserError, which is printed with its section of the page on
        troubleshooting; 130 after Ctrl-C.
    """
    try:
        return run()
    except UserError as error:
        print(error_text(str(error)), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130
