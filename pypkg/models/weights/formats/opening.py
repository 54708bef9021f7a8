"""Opens files of tensors, also those on the disk of another machine.

Without a shared folder, each machine of a run holds some files of a checkpoint. ``read_elsewhere``
registers the files on other machines and how to open them. All other files are opened locally.
Nothing here imports Paddle.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from pypkg.files.links import check_link


class FileElsewhere(NamedTuple):
    """A file on another machine: its size in bytes, and a function that opens it for reading."""

    size: int
    open: Callable[[], io.RawIOBase]


_elsewhere: Mapping[Path, FileElsewhere] = {}


def read_elsewhere(files: Mapping[Path, FileElsewhere]) -> None:
    """Registers ``files``, by their local paths, instead of those registered before."""
    global _elsewhere
    _elsewhere = files


def is_file(path: Path) -> bool:
    """Whether there is a file at ``path``, locally or on another machine.

    Raises:
        UserError: it is a broken symbolic link.
    """
    if path in _elsewhere:
        return True
    check_link(path)
    return path.is_file()


def open_file(path: Path) -> tuple[io.RawIOBase, int]:
    """Opens a file for unbuffered reading; returns it and its size in bytes.

    Raises:
        OSError: it cannot be opened.
    """
    if path in _elsewhere:
        return _elsewhere[path].open(), _elsewhere[path].size
    file = open(path, "rb", buffering=0)  # noqa: SIM115
    return file, file.seek(0, io.SEEK_END)
