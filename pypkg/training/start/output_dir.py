"""The output folder of a run: writable, the same on every machine, and held until the run ends."""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pypkg.errors import UserError
from pypkg.parallel import mesh
from pypkg.parallel.comm.collective import from_first_rank, is_first_rank, ranks_where
from pypkg.parallel.launch import watchdog
from pypkg.parallel.launch.rendezvous import named
from pypkg.training.checkpoint.folders import prepare_output_dir, remove_unfinished
from pypkg.training.checkpoint.lock import OutputLock

# In which a network file system shows on one machine what another has written.
_SECONDS_TO_APPEAR = 10.0


@contextmanager
def held_output_dir(output_dir: str | Path) -> Iterator[Callable[[], None]]:
    """Makes ``output_dir`` and holds its lock until the end of the block; for all ranks.

    Evaluation alone needs it as well, since it rewrites metrics.jsonl.

    Yields:
        What makes sure, called by all ranks, that the run may still write there; else it raises
        UserError on each.

    Raises:
        UserError: it cannot be written, a rank does not see it, or another run holds it.
    """
    held: list[OutputLock] = []  # on the first rank one

    def take() -> None:
        held.append(OutputLock(output_dir, on_wait=_tell_watchdog))
        remove_unfinished(output_dir)

    prepare_shared_output_dir(output_dir)
    try:
        from_first_rank(take)
        yield lambda: from_first_rank(lambda: held[0].check())
    finally:
        for lock in held:
            lock.release()


def prepare_shared_output_dir(output_dir: str | Path) -> None:
    """Makes the folder as ``prepare_output_dir`` does, and looks for it on every rank.

    Every rank must call this.

    Raises:
        UserError: on every rank, if rank 0 cannot write the folder, or if a rank does not see what
            rank 0 writes there.
    """
    from_first_rank(lambda: prepare_output_dir(output_dir))
    if mesh.current().world_size == 1:
        return
    probe = Path(output_dir) / from_first_rank(lambda: _write_probe(output_dir))
    blind = ranks_where(not _appears(probe))
    if is_first_rank():
        probe.unlink(missing_ok=True)
    if blind:
        raise UserError(
            f"output_dir {str(output_dir)!r} is not the same folder on all machines: "
            f"{named(blind)} cannot see what {named([0])} writes there. All ranks read checkpoints "
            "from it, so a run could not go on from them. Set output_dir to a folder on a file "
            "system that all machines share."
        )


def _write_probe(output_dir: str | Path) -> str:
    """The name of a file that no machine has looked for yet."""
    name = f".seen-by-all-{secrets.token_hex(8)}"
    Path(output_dir, name).touch()
    return name


def _appears(file: Path) -> bool:
    deadline = time.monotonic() + _SECONDS_TO_APPEAR
    while True:
        with contextlib.suppress(OSError):
            os.listdir(file.parent)  # asks the server of a network file system for the folder anew
            if file.exists():
                return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)


def _tell_watchdog() -> None:
    watchdog.at(0, "waiting for the lock of output_dir")
