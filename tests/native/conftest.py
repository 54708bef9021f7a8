from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from pypkg import _native


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


@pytest.fixture
def every_thread_count() -> Iterator[tuple[int, ...]]:
    """Thread counts to run a kernel with; restores the default afterwards."""
    yield (1, 2, 3)
    _native.set_num_threads(0)
