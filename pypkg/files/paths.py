"""Paths of the files that are shipped with the package, and suggestions for misspelt paths."""

from __future__ import annotations

import difflib
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]


def configs_dir() -> Path:
    """The shipped ``configs`` folder: inside an installed package, beside it in a checkout."""
    installed = _PACKAGE / "configs"
    return installed if installed.is_dir() else _PACKAGE.parent / "configs"


def library_dir() -> Path:
    """The folder of the compiled libraries and of build_info.json."""
    return _PACKAGE / "_lib"


def sources_dir() -> Path | None:
    """The folder ``csrc`` beside the package in a checkout; None in an installed package."""
    folder = _PACKAGE.parent / "csrc"
    return folder if (folder / "kernels").is_dir() else None


def similar_folder(name: str) -> str:
    """A suggestion for a missing folder, "; did you mean X?", of one beside it; or ""."""
    path = Path(name)
    try:
        beside = [each.name for each in path.parent.iterdir() if each.is_dir()]
    except OSError:  # the folder above is missing too, or cannot be read
        return ""
    close = difflib.get_close_matches(path.name, beside, n=1, cutoff=0.8)
    return f"; did you mean {str(path.with_name(close[0]))!r}?" if close else ""
