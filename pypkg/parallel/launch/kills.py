"""Finds out why a process was killed: the signal, and whether the kernel ran out of memory."""

from __future__ import annotations

import signal
from contextlib import suppress
from pathlib import Path

_COUNTERS = Path("/proc/vmstat")
_LOG = "dmesg | grep -i 'out of memory'"
_LESS_MEMORY = (
    "Less memory: a smaller per_device_train_batch_size with more gradient_accumulation_steps, "
    "recompute, fewer ranks on a machine"
)


def out_of_memory_kills() -> int | None:
    """Number of processes that the kernel has killed for lack of memory since the machine booted.

    It includes kills by the memory limit of a container. None: the kernel has no such counter.
    """
    with suppress(OSError, ValueError):
        for line in _COUNTERS.read_text(encoding="ascii").splitlines():
            name, _, value = line.partition(" ")
            if name == "oom_kill":
                return int(value)
    return None


def signal_of(exit_code: int) -> int | None:
    """The number of the signal that ended a rank, from the exit code of its launcher; or None.

    Shells and this package exit with 128 + n for signal n. Paddle's launcher exits with -n, which
    becomes 256 - n.
    """
    for number in (exit_code - 128, 256 - exit_code):
        if number in signal.valid_signals():
            return number
    return None


def describe(number: int, before: int | None) -> str:
    """The name of the signal that ended a process; for SIGKILL also how to find its sender.

    Args:
        number: number of the signal.
        before: ``out_of_memory_kills`` when the process was started.
    """
    try:
        name = signal.Signals(number).name
    except ValueError:  # a real-time signal
        name = f"signal {number}"
    if number != signal.SIGKILL:
        return name
    now = out_of_memory_kills()
    if before is not None and now is not None and now > before:
        return (
            f"{name}. The kernel has ended {now - before} of the processes of this machine since "
            f"the start because memory ran out; `{_LOG}` names them. {_LESS_MEMORY}"
        )
    return (
        f"{name}, which leaves no message. It comes from a person, from a scheduler, or from the "
        f"kernel when memory runs out: `{_LOG}` tells. {_LESS_MEMORY}"
    )
