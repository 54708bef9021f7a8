"""The work that benchmarks count."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pypkg.bench.ops import work
from pypkg.bench.ops.work import Work, visible_pairs

MASKS: dict[str, Callable[[int, int, int], bool]] = {
    "full": lambda query, key, size: True,
    "causal": lambda query, key, size: key <= query,
    "alibi": lambda query, key, size: key <= query,
    "prefix": lambda query, key, size: key <= query or key < size,
    "window": lambda query, key, size: query - size < key <= query,
    "documents": lambda query, key, size: key <= query and key // size == query // size,
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("sequence", "size"), [(1, 1), (9, 4), (8, 4), (7, 7)])
def test_visible_pairs_are_those_of_the_mask(mask, sequence, size) -> None:
    pairs = sum(MASKS[mask](i, j, size) for i in range(sequence) for j in range(sequence))
    assert visible_pairs(mask, sequence, size) == pairs


def test_a_window_may_be_longer_than_the_sequence() -> None:
    assert visible_pairs("window", 5, 8) == visible_pairs("causal", 5)


def test_bytes_of_tensors_in_the_dtype_of_the_case_and_of_others() -> None:
    assert Work(elements=3, other_bytes=5).bytes(4) == 17
    both = work.cross_entropy(2, 10)
    assert both["forward"].bytes(2) == 2 * 10 * 2 + 2 * (8 + 4)
    assert (both["forward"] + both["backward"]).bytes(2) == 3 * 2 * 10 * 2 + 2 * 2 * (8 + 4)
