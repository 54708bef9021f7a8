"""Whole parameters and optimizer state, as tests hand them over."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np


class SlicesOf:
    """What ``Updater.load_state`` reads from, of whole arrays by key; it counts elements."""

    def __init__(self, values: Mapping[str, np.ndarray]) -> None:
        self._values = values
        self.elements = 0

    def __call__(self, key: str, cut: Sequence[slice] = ()) -> np.ndarray:
        found = self._values[key][tuple(cut)]
        self.elements += found.size
        return found


def slices_of(value: np.ndarray) -> Callable[[Sequence[slice]], np.ndarray]:
    """What ``TpSharding.read`` reads from, of a whole array."""
    return lambda cut: value[tuple(cut)]
