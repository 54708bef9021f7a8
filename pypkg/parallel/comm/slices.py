"""What one rank holds of a parameter: its TP shard, or in ZeRO stage 3 a flat slice of that."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np


class ReadParameter(Protocol):
    """Makes what a rank holds of a parameter, and little more."""

    def __call__(
        self, name: str, shape: Sequence[int], elements: tuple[int, int] | None = None
    ) -> np.ndarray | None:
        """A parameter in its dtype (bfloat16 as its bits in uint16).

        Args:
            name: of the parameter in the model.
            shape: of the parameter, or of this rank's TP shard of it.
            elements: (start, stop) of the flattened shard; the result is flat, with zeros beyond
                the end of the shard. None: all, in ``shape``.

        Returns:
            None for a parameter with one axis that keeps its initial value.
        """


def read_elements(
    read_rows: Callable[[tuple[int, int]], np.ndarray],
    shape: Sequence[int],
    elements: tuple[int, int],
) -> np.ndarray:
    """Some elements of a flattened tensor, with zeros beyond its end.

    Args:
        read_rows: returns rows [start, stop) of the tensor.
        shape: of the tensor.
        elements: (start, stop).
    """
    start, stop = elements
    width = math.prod(shape[1:])
    first, end = (min(each, shape[0]) for each in (start // width, -(-stop // width)))
    rows = read_rows((first, end)).reshape(-1)
    held = rows[start - first * width : stop - first * width]
    return np.pad(held, (0, stop - start - held.size))
