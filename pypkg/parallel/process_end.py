"""The end of a process that others are connected to: without destructors of static C++ objects.

A process that serves a TCPStore (rank 0; over gloo, one of each group) has a thread that hears when
a client goes. Paddle 3.3.1 lets it run while exit() destroys what it uses, such as the log: if the
last clients go just then, the process is killed by SIGABRT or SIGSEGV after all its work was done.
"""

from __future__ import annotations

import atexit
import ctypes


def skip_destructors() -> None:
    """Makes this process end without C++ destructors after Python has ended; keeps its exit code.

    Python's own end (its atexit functions, flushing of files) stays. Where the C library has no
    on_exit, which glibc has, nothing changes.
    """
    atexit.register(_register)


def _register() -> None:
    """At the end of Python: exit() calls what was registered last first."""
    library = ctypes.CDLL(None)
    if hasattr(library, "on_exit"):
        library.on_exit(library._exit, None)  # is given the exit code
        library.__cxa_atexit(library.fflush, None, None)  # of all C streams
