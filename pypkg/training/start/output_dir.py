"""The folder that a run writes into, for as long as the run lasts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pypkg.parallel.comm.collective import from_first_rank
from pypkg.parallel.launch import watchdog
from pypkg.training.checkpoint.folders import prepare_output_dir, remove_unfinished
from pypkg.training.checkpoint.lock import OutputLock


@contextmanager
def held_output_dir(output_dir: str | Path) -> Iterator[Callable[[], None]]:
    """Makes ``output_dir`` and holds its lock until the end of the block; for all ranks.

    Evaluation alone needs it as well, since it rewrites metrics.jsonl.

    Yields:
        What makes sure, called by all ranks, that the run may still write there; else it raises
        UserError on each.

    Raises:
        UserError: it cannot be written, or another run holds it.
    """
    held: list[OutputLock] = []  # on the first rank one

    def take() -> None:
        prepare_output_dir(output_dir)
        held.append(OutputLock(output_dir, on_wait=_tell_watchdog))
        remove_unfinished(output_dir)

    try:
        from_first_rank(take)
        yield lambda: from_first_rank(lambda: held[0].check())
    finally:
        for lock in held:
            lock.release()


def _tell_watchdog() -> None:
    watchdog.at(0, "waiting for the lock of output_dir")
