"""Packages that only some inputs need."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

from pypkg.errors import UserError

_EXTRAS = {"zstandard": "data", "pyarrow": "data", "jieba": "segmentation", "nltk": "segmentation"}


def require(module: str, package: str, what: str | Path) -> ModuleType:
    """Imports ``module``.

    Args:
        package: that it comes in, by its name in the package index.
        what: needs it, for the message.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        extra = _EXTRAS.get(package)
        command = f'pip install ".[{extra}]"' if extra else f"pip install {package}"
        raise UserError(
            f"{what} needs the package {package}, which is not installed; {command} brings it"
        ) from error
