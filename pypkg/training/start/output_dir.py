"""The folder that all ranks write checkpoints to."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from pypkg.errors import UserError
from pypkg.parallel import mesh
from pypkg.parallel.comm.collective import from_all_ranks, from_first_rank
from pypkg.training.checkpoint.folders import prepare_output_dir


def prepare_shared_output_dir(output_dir: str, saves: bool) -> None:
    """``prepare_output_dir`` on the first rank; then every rank looks whether it sees the folder.

    Args:
        saves: whether the run writes checkpoints; if not, the first rank alone needs the folder.

    Raises:
        UserError: the folder cannot be made or written, or a rank does not see it.
    """
    from_first_rank(lambda: prepare_output_dir(output_dir))
    if not saves or mesh.current().world_size == 1:
        return
    host, mark = from_first_rank(lambda: _leave_mark(Path(output_dir)))
    try:
        from_all_ranks(lambda: _look_for(Path(output_dir, mark), host))
    finally:
        from_first_rank(lambda: Path(output_dir, mark).unlink(missing_ok=True))


def _leave_mark(folder: Path) -> tuple[str, str]:
    mark = f".seen-by-all-ranks-{os.getpid()}"
    (folder / mark).touch()
    return socket.gethostname(), mark


def _look_for(mark: Path, host: str) -> None:
    """``host`` is that of the first rank."""
    if mark.is_file():
        return
    raise UserError(
        f"rank {mesh.current().rank} on {socket.gethostname()} does not see output_dir "
        f"{str(mark.parent)!r} of rank 0 on {host}. Every rank writes its part of a checkpoint "
        "there and reads it when the run goes on. Set output_dir to a folder that all machines "
        'share, or set save_strategy to "no".'
    )
