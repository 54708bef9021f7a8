"""Links that lead nowhere, which look like missing files.

The folders of Hugging Face's cache are links to files that may have been removed.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path

from pypkg.errors import UserError


def check_link(path: Path) -> None:
    """
    Raises:
        UserError: ``path`` is a link that leads nowhere.
    """
    if path.is_symlink() and not os.path.exists(path):
        raise UserError(
            f"{path} is a link to {os.readlink(path)}, which is not there; mend or remove the link"
        )


def files_named(folder: Path, patterns: Iterable[str]) -> list[Path]:
    """The files in ``folder`` whose names match a pattern, sorted; none if there is no folder.

    Raises:
        UserError: a name that matches is a link that leads nowhere, or the folder cannot be read.
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
