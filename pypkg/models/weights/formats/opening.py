"""Opens the files that hold tensors, those on the disk of another machine as well.

Without a shared folder, each machine of a run holds some files of a checkpoint. A run says by
``read_elsewhere`` which ones lie on other machines, and how they are opened. All others are opened
under their paths. Nothing here imports Paddle.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from pypkg.files.links import check_link


class FileElsewhere(NamedTuple):
    """A file on another machine: its size in bytes, and what opens it for reading."""

    size: int
    open: Callable[[], io.RawIOBase]


_elsewhere: Mapping[Path, FileElsewhere] = {}


def read_elsewhere(files: Mapping[Path, FileElsewhere]) -> None:
    """From now on ``files``, and no others, are opened elsewhere, each under its path here."""
    global _elsewhere
    _elsewhere = files


def is_file(path: Path) -> bool:
    """Whether there is a file, here or elsewhere.

    Raises:
        UserError: it is a link that leads nowhere.
    """
    if path in _elsewhere:
        return True
    check_link(path)
    return path.is_file()


def open_file(path: Path) -> tuple[io.RawIOBase, int]:
    """The file, opened for reading without a buffer, and its size in bytes.

    Raises:
        OSError: it cannot be opened.
    """
    if path in _elsewhere:
        return _elsewhere[path].open(), _elsewhere[path].size
    file = open(path, "rb", buffering=0)  # noqa: SIM115
    return file, file.seek(0, io.SEEK_END)
