"""Paths of the files that are shipped with the package."""

from __future__ import annotations

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
