"""The output folder of a run: writable, held by one run, and the same on every machine."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
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
def held_output_dir(output_dir: str | Path, saves: bool) -> Iterator[Callable[[], None]]:
    """Makes ``output_dir`` and holds its lock until the end of the block; for all ranks.

    Evaluation alone needs it as well, since it rewrites metrics.jsonl.

    Args:
        saves: whether the run writes checkpoints; if not, rank 0 alone needs the folder.

    Yields:
        What makes sure, called by all ranks, that the run may still write there; else it raises
        UserError on each.

    Raises:
        UserError: on every rank, if rank 0 cannot write the folder, another run holds it, or a rank
            does not see what rank 0 writes there.
    """
    held: list[OutputLock] = []  # on the first rank one

    def take() -> None:
        prepare_output_dir(output_dir)
        held.append(OutputLock(output_dir, on_wait=_tell_watchdog))
        remove_unfinished(output_dir)

    try:
        from_first_rank(take)
        if saves and mesh.current().world_size > 1:
            _check_shared(output_dir)
        yield lambda: from_first_rank(lambda: held[0].check())
    except (UserError, OSError):
        for lock in held:
            lock.check()  # a folder that is gone explains why a file cannot be written
        raise
    finally:
        for lock in held:
            lock.release()


def _tell_watchdog() -> None:
    watchdog.at(0, "waiting for the lock of output_dir")


def _check_shared(output_dir: str | Path) -> None:
    probe = Path(output_dir) / from_first_rank(lambda: _write_probe(output_dir))
    blind = ranks_where(not _appears(probe))
    if is_first_rank():
        probe.unlink(missing_ok=True)
    if blind:
        raise UserError(
            f"output_dir {str(output_dir)!r} is not the same folder on all machines: "
            f"{named(blind)} cannot see what {named([0])} writes there. Every rank writes "
            "its part of a checkpoint there, and reads it when the run goes on. Set output_dir to "
            'a folder that all machines share, or set save_strategy to "no".'
        )


def _write_probe(output_dir: str | Path) -> str:
    """The name of a file that no machine has looked for yet."""
    name = f".seen-by-all-{secrets.token_hex(8)}"
    Path(output_dir, name).touch()
    return name


def _appears(file: Path) -> bool:
    deadline = time.monotonic() + _SECONDS_TO_APPEAR
    while True:
        with suppress(OSError):
            os.listdir(file.parent)  # asks the server of a network file system for the folder anew
            if file.exists():
                return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
