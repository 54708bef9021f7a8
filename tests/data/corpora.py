"""Documents for the data tests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).parents[1] / "golden" / "data"


def counting_documents(sizes: Sequence[int]) -> list[np.ndarray]:
    """Documents of the given sizes whose tokens count on from 0, so that each token is unique."""
    ends = np.cumsum(sizes)
    return [np.arange(end - size, end) for size, end in zip(sizes, ends)]
