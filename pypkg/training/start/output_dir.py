"""The output folder of a run: writable, held by one run, and the same on every machine."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from pypkg.errors import UserError
from pypkg.parallel import endpoints, mesh
from pypkg.parallel.comm.collective import from_all_ranks, from_first_rank
from pypkg.parallel.comm.places import Places
from pypkg.parallel.launch import watchdog
from pypkg.parallel.launch.rendezvous import named
from pypkg.training.checkpoint.folders import (
    prepare_output_dir,
    remove_unfinished,
    require_writable,
)
from pypkg.training.checkpoint.lock import OutputLock
from pypkg.training.checkpoint.parts import Parts

# Within this time a network file system shows a folder that another machine has created.
_SECONDS_TO_APPEAR = 10.0


@dataclass(frozen=True)
class HeldOutput:
    """The output folder while the run holds it.

    Attributes:
        parts: access to its checkpoints.
        check: raises UserError, on every rank, if the run may no longer write there. Every rank
            must call it.
    """

    parts: Parts
    check: Callable[[], None]


@contextmanager
def held_output_dir(
    output_dir: str | Path, saves: bool, allow_local: bool = False
) -> Iterator[HeldOutput]:
    """Creates ``output_dir`` and holds its lock until the end of the block. For every rank.

    A run that only evaluates needs the lock too, because it rewrites metrics.jsonl.

    Args:
        saves: whether the run writes checkpoints; if not, rank 0 alone needs the folder.
        allow_local: whether each machine may have a folder of its own, which is then created and
            locked like that of rank 0.

    Raises:
        UserError: on every rank, if rank 0 cannot write the folder, another run holds it, or a rank
            does not see what rank 0 writes there.
    """
    held: list[OutputLock] = []  # one lock on the first rank of each folder
    parts = Parts()

    def take() -> None:
        if not held:
            with _naming_own_rank():
                prepare_output_dir(output_dir)
            held.append(OutputLock(output_dir, on_wait=_tell_watchdog))
            remove_unfinished(output_dir)

    try:
        from_first_rank(take)
        if (saves or allow_local) and mesh.current().world_size > 1:
            places = find_places(Path(output_dir), allow_local)
            places.from_leaders(take)
            parts = Parts(places)
        yield HeldOutput(parts, lambda: parts.places.from_leader(lambda: _check(held[0], parts)))
        parts.wait()
    except (UserError, OSError):
        for lock in held:
            _check(lock, parts)  # a removed folder explains why a file cannot be written
        raise
    finally:
        parts.close()
        for lock in held:
            lock.release()


def _check(lock: OutputLock, parts: Parts) -> None:
    """Checks a lock. With several folders, the error names the ranks of this one."""
    try:
        lock.check()
    except UserError as error:
        if parts.places.is_one:
            raise
        raise UserError(f"{named(parts.places.ranks(parts.places.index))}: {error}") from error


@contextmanager
def _naming_own_rank() -> Iterator[None]:
    """In a run on several hosts, an error of the block names this rank and its host."""
    try:
        yield
    except UserError as error:
        if len(set(endpoints.hosts())) < 2:
            raise
        raise UserError(f"{named([mesh.current().rank])}: {error}") from error


def require_on_all_ranks(check: Callable[[], None]) -> None:
    """Calls ``check`` on every rank. Every rank must call this.

    Raises:
        UserError: on every rank, if ``check`` raises it on any. In a run of several ranks the
            message names all on which it does, and goes on with that of the first.
    """
    if mesh.current().world_size == 1:
        check()
        return

    def attempt() -> str:
        try:
            check()
        except UserError as error:
            return str(error)
        return ""

    told = from_all_ranks(attempt)
    if failed := [rank for rank, text in enumerate(told) if text]:
        raise UserError(f"{named(failed)}: {told[failed[0]]}")


def _tell_watchdog() -> None:
    watchdog.at(0, "waiting for the lock of output_dir")


def find_places(output_dir: Path, allow_local: bool) -> Places:
    """Finds which ranks see the same folder: those that read the same mark in it.

    Raises:
        UserError: a rank has no such folder, or cannot write there, or, unless ``allow_local``, has
            another one than rank 0.
    """
    if allow_local:
        require_on_all_ranks(lambda: prepare_output_dir(output_dir))
    name = f".place-{from_first_rank(lambda: secrets.token_hex(8))}"
    mark = output_dir / name
    from_all_ranks(lambda: _make_mark(mark))
    seen = from_all_ranks(lambda: _read_mark(mark))
    if mesh.current().rank == seen.index(seen[mesh.current().rank]):
        mark.unlink(missing_ok=True)
    blind = [rank for rank, each in enumerate(seen) if each is None or each != seen[0]]
    if blind and (not allow_local or None in seen):
        raise UserError(
            f"output_dir {str(output_dir)!r} is not the same folder on all machines: "
            f"{named(blind)} cannot see what {named([0])} writes there. Every rank writes "
            "its part of a checkpoint there, and reads it when the run goes on. Set output_dir to "
            "a folder that all machines share, set allow_local_output to let each machine keep "
            'its own part, or set save_strategy to "no".'
        )
    # A machine may have mounted the shared folder for reading alone.
    require_on_all_ranks(lambda: require_writable(output_dir))
    return Places(tuple(seen.index(each) for each in seen) if blind else ())


def _make_mark(mark: Path) -> None:
    """Creates a file with a random mark, unless another rank that sees the folder has done so."""
    deadline = time.monotonic() + _SECONDS_TO_APPEAR
    while not mark.parent.is_dir() and time.monotonic() < deadline:
        time.sleep(0.1)
    with suppress(OSError), open(mark, "x", encoding="ascii") as file:
        file.write(secrets.token_hex(8))


def _read_mark(mark: Path) -> str | None:
    with suppress(OSError):
        return mark.read_text(encoding="ascii")
    return None
