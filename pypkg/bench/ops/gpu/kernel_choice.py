"""Selection of one of the two sets of attention kernels."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

SETTING = "PYPKG_FLASH_ATTENTION"


@contextlib.contextmanager
def flash_attention_kernel(name: str) -> Iterator[None]:
    """Selects the kernels "auto", "ampere" or "hopper" for the calls in the block."""
    before = os.environ.get(SETTING)
    os.environ[SETTING] = name
    try:
        yield
    finally:
        os.environ.pop(SETTING)
        if before is not None:
            os.environ[SETTING] = before
