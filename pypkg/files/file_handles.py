"""The number of files and connections that this process may hold open."""

from __future__ import annotations

import os
import resource

from pypkg.errors import UserError

_RESERVE = 64  # for libraries, logs and files that are open for a moment
_ENOUGH = 1 << 20  # some libraries take memory for as many as the limit allows


def raise_limit() -> None:
    """Raises the soft limit towards the hard one, as a process may do by itself."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _ENOUGH if hard == resource.RLIM_INFINITY else min(hard, _ENOUGH)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def require(count: int, purpose: str) -> None:
    """Checks that ``count`` more can be opened.

    Args:
        purpose: what they are for, as a noun phrase.

    Raises:
        UserError: the limit is too low; names it and what is needed.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = count + len(os.listdir("/proc/self/fd")) + _RESERVE
    if soft != resource.RLIM_INFINITY and needed > soft:
        raise UserError(
            f"{purpose} need about {needed} open files in this process, whose limit is {soft} "
            f"(hard limit {hard}). Raise it: ulimit -n, LimitNOFILE= of systemd, nofile in "
            "/etc/security/limits.conf, or docker run --ulimit nofile=N"
        )
