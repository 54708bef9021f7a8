"""Imports of packages that only some inputs need."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

from pypkg.errors import UserError

_EXTRAS = {"zstandard": "data", "pyarrow": "data", "jieba": "segmentation", "nltk": "segmentation"}


def require(module: str, package: str, what: str | Path) -> ModuleType:
    """Imports ``module``.

    Args:
        package: the name of its package in the package index.
        what: the input that needs it, for the message.

    Raises:
        UserError: the package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        extra = _EXTRAS.get(package)
        command = f'pip install ".[{extra}]"' if extra else f"pip install {package}"
        raise UserError(
            f"{what} needs the package {package}, which is not installed; {command} brings it"
        ) from error
