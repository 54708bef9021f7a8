"""Copies of a weight file with changed bytes, and what its reader makes of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from pypkg.errors import UserError

COPIES = 250


def times_told(
    read: Callable[[Path], object], path: Path, content: bytes, places: Sequence[int], seed: int
) -> int:
    """In how many of ``COPIES`` damaged copies ``read`` names the file in an error.

    It reads the others; it raises no other error. One to three bytes at ``places`` change.
    """
    rng = np.random.default_rng(seed)
    told = 0
    for _ in range(COPIES):
        damaged = bytearray(content)
        for place in rng.choice(places, rng.integers(1, 4)):
            damaged[place] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            read(path)
        except UserError as error:
            assert str(path) in str(error)
            told += 1
    return told
