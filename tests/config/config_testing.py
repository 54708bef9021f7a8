"""Helpers of the tests of configuration files."""

from __future__ import annotations

from pathlib import Path

from pypkg.config import check_supported, load_settings
from pypkg.errors import UserError


def refused_names(file: Path) -> set[str]:
    """The settings in a pre-training file that this version refuses."""
    settings = load_settings([str(file)])
    try:
        check_supported(settings)
    except UserError as error:
        lines = str(error).splitlines()
        return {line.removeprefix("  - ").split(" is ")[0] for line in lines if " is " in line}
    return set()
