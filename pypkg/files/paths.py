"""Where the files that ship with the package are."""

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
    """The folder ``csrc`` beside the package in a checkout; None where the package is installed."""
    folder = _PACKAGE.parent / "csrc"
    return folder if (folder / "kernels").is_dir() else None
