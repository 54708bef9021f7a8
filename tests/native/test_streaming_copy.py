"""Copies past the caches."""

from __future__ import annotations

import numpy as np
import pytest

from pypkg import _native

PAGE = 4096


@pytest.mark.parametrize("offset", [0, 1, 17, 64])
@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, PAGE, 4 * PAGE, 4 * PAGE + 1, 100_003])
def test_bytes_arrive_and_no_others_change(size: int, offset: int) -> None:
    """From and to any address."""
    values = np.random.default_rng(size).integers(0, 256, size + offset, np.uint8)[offset:]
    for start in (0, 7, 64):
        to = np.full(size + 200, 3, np.uint8)
        _native.streaming_copy(to[start : start + size], values)
        assert np.array_equal(to[start : start + size], values)
        assert (to[:start] == 3).all() and (to[start + size :] == 3).all()


def test_arrays_that_do_not_fit() -> None:
    to, values = np.zeros(8, np.uint8), np.zeros(7, np.uint8)
    with pytest.raises(ValueError, match="same size"):
        _native.streaming_copy(to, values)
    with pytest.raises(ValueError, match="wrong dtype"):
        _native.streaming_copy(np.zeros(7, np.int8), values)
    with pytest.raises(ValueError, match="contiguous"):
        _native.streaming_copy(to[::2], values[:4])
    to.flags.writeable = False
    with pytest.raises(ValueError, match="not writeable"):
        _native.streaming_copy(to, np.zeros(8, np.uint8))
