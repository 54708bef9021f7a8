"""The number of files and connections that this process may hold open."""

from __future__ import annotations

import os
import resource

from pypkg.errors import UserError

_RESERVE = 64  # for libraries, logs and files that are open for a short time
_ENOUGH = 1 << 20  # some libraries allocate memory in proportion to the limit


def raise_limit() -> None:
    """Raises the soft limit to the hard limit, or to ``_ENOUGH`` if that is lower."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _ENOUGH if hard == resource.RLIM_INFINITY else min(hard, _ENOUGH)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def require(count: int, purpose: str) -> None:
    """Checks that ``count`` more files or connections can be opened.

    Args:
        purpose: subject of the error message, in the plural, such as "the corpora".

    Raises:
        UserError: the limit is too low.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = count + len(os.listdir("/proc/self/fd")) + _RESERVE
    if soft != resource.RLIM_INFINITY and needed > soft:
        raise UserError(
            f"{purpose} need about {needed} open files in this process, whose limit is {soft} "
            f"(hard limit {hard}). Raise it: ulimit -n, LimitNOFILE= of systemd, nofile in "
            "/etc/security/limits.conf, or docker run --ulimit nofile=N"
        )
