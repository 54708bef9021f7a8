"""What the tests of configuration files share."""

from __future__ import annotations

from pathlib import Path

import pytest

from pypkg.config import check_supported, load_settings
from pypkg.errors import UserError


def refused_names(file: Path) -> set[str]:
    """The settings in a pre-training file that this version refuses; there must be some."""
    with pytest.raises(UserError) as caught:
        check_supported(load_settings([str(file)]))
    return {
        line.removeprefix("  - ").split(" is ")[0]
        for line in str(caught.value).splitlines()
        if " is " in line
    }
