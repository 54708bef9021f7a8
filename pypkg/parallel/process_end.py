"""Ends a process without running the destructors of static C++ objects.

A process that serves a TCPStore (rank 0; over gloo, the first member of each group) has a thread
that handles disconnecting clients. In Paddle 3.3.1 it still runs while exit() destroys objects that
it uses, such as the log. If clients disconnect at that moment, SIGABRT or SIGSEGV ends the process
after its work is done.
"""

from __future__ import annotations

import atexit
import ctypes


def skip_destructors() -> None:
    """Makes this process skip C++ destructors at its end, with the same exit code.

    Python's atexit functions still run, and files are flushed. It has no effect with a C library
    that lacks on_exit (glibc has it).
    """
    atexit.register(_register)


def _register() -> None:
    """Registers fflush and then _exit, after Python has ended."""
    library = ctypes.CDLL(None)
    if hasattr(library, "on_exit"):
        # exit() calls the function that was registered last first.
        library.on_exit(library._exit, None)  # on_exit passes the exit code
        library.__cxa_atexit(library.fflush, None, None)  # NULL: all C streams
