"""The part of a parameter on one rank: a TP shard, or in ZeRO stage 3 a flat slice of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from paddle import Tensor


class ReadParameter(Protocol):
    """A function that writes a rank's part of a parameter into a tensor."""

    def __call__(
        self,
        name: str,
        shape: Sequence[int],
        out: Tensor,
        elements: tuple[int, int] | None = None,
    ) -> None:
        """Overwrites ``out``; a parameter with one axis may keep its initial value.

        Args:
            name: the parameter's name in the model.
            shape: of the parameter, or of this rank's TP shard of it.
            out: contiguous, in the dtype of the parameter; of ``shape``, or [stop - start].
            elements: (start, stop), the range of the flattened shard to write; elements beyond the
                end of the shard become zero. None: the whole shard.
        """


def read_elements(
    read_rows: Callable[[tuple[int, int]], np.ndarray],
    shape: Sequence[int],
    elements: tuple[int, int],
) -> np.ndarray:
    """A range of elements of a flattened tensor; elements beyond its end are zero.

    Args:
        read_rows: returns rows [start, stop) of the tensor.
        shape: of the tensor.
        elements: (start, stop) in the flattened tensor.

    Returns:
        [stop - start], in the dtype of the rows.
    """
    start, stop = elements
    width = math.prod(shape[1:])
    first, end = (min(each, shape[0]) for each in (start // width, -(-stop // width)))
    rows = read_rows((first, end)).reshape(-1)
    held = rows[start - first * width : stop - first * width]
    return np.pad(held, (0, stop - start - held.size))
