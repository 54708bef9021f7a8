"""Detects broken symbolic links, which otherwise look like missing files.

The folders of Hugging Face's cache contain links to files that may have been removed.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path

from pypkg.errors import UserError


def check_link(path: Path) -> None:
    """Checks that ``path`` is not a broken symbolic link.

    Raises:
        UserError: it is one.
    """
    if path.is_symlink() and not os.path.exists(path):
        raise UserError(
            f"{path} is a link to {os.readlink(path)}, which does not exist; repair or remove the "
            "link"
        )


def files_named(folder: Path, patterns: Iterable[str]) -> list[Path]:
    """The files in ``folder`` whose names match a pattern, sorted; none if there is no folder.

    Raises:
        UserError: a matching file is a broken symbolic link, or the folder cannot be read.
    """
    if not os.path.isdir(folder):  # False, not an error, for a name too long for a path
        return []
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise UserError(f"cannot read {folder}: {error.strerror}") from error
    kept = list(patterns)
    matching = [folder / name for name in names if any(fnmatchcase(name, each) for each in kept)]
    for file in matching:
        check_link(file)
    return [file for file in matching if file.is_file()]
