"""Errors that the user can fix, printed without a traceback."""

from __future__ import annotations


class UserError(Exception):
    """A setting, file or input that cannot be used.

    The message names what was found and where, what was expected, and a way out. Command lines
    print it as ``error: ...``, then its section of docs/guides/troubleshooting.md
    (``pypkg.console.troubleshooting``), and exit with code 2.
    """
