"""Storage of optimizer state that has the shape of its parameter.

A tensor is stored in float32, in bfloat16, or in 8 bits by blocks (Dettmers et al., "8-bit
Optimizers via Block-wise Quantization", 2022). Checkpoints always hold float32, so that any layout
reads them. Reading and writing again gives the same bits, so resuming under the same layout is
exact.

In 8 bits, the values of each block of ``MOMENT_BLOCK`` elements are divided by the largest
magnitude, and each is replaced by the nearest of 256 values. These are the dynamic map of
bitsandbytes, which is dense around zero. In the signed map -1 replaces the negative value nearest
to zero, so that the largest magnitude of a block is exact for either sign. A positive second moment
is never rounded to zero, which would make its update enormous.
"""

from __future__ import annotations

import functools
from math import prod
from typing import Any

import numpy as np
import paddle
from paddle import Tensor

from pypkg import ops
from pypkg.parallel.optimizer.rules.rounding import stochastic_bfloat16
from pypkg.parallel.update_rules import MOMENT_BLOCK, SMALLEST_8BIT

FORMS = ("float32", "bfloat16", "8bit")
_LARGEST = ".absmax"


def zeros(name: str, parameter: Tensor, whole: int, form: str) -> dict[str, Tensor]:
    """The tensors that store the state ``name`` of a parameter, all zero.

    Args:
        name: name of the state; "moment2" is stored unsigned.
        parameter: has the shape of the state.
        whole: number of elements of the whole parameter, independent of the layout.
        form: one of ``FORMS``.

    Raises:
        ValueError: another form.
    """
    if form not in FORMS:
        raise ValueError(f"moments in {form!r}; expected one of {', '.join(FORMS)}")
    if form != "8bit" or whole < SMALLEST_8BIT:
        dtype: Any = "float32" if form == "8bit" else form
        return {name: paddle.zeros(parameter.shape, dtype)}
    dtype = "uint8" if name == "moment2" else "int8"
    codes = paddle.full(parameter.shape, _zero_code(dtype), dtype)
    blocks = -(-prod(parameter.shape) // MOMENT_BLOCK)
    return {name: codes, name + _LARGEST: paddle.zeros([blocks])}


def read(state: dict[str, Tensor], name: str) -> Tensor:
    """The float32 values of ``name``; the stored tensor itself if it is float32."""
    kept = state[name]
    if kept.dtype == paddle.float32:  # at once, because a save asks while training pauses
        return kept
    return _converted(kept, state.get(name + _LARGEST))


@paddle.no_grad()
def _converted(kept: Tensor, largest: Tensor | None) -> Tensor:
    if largest is None:
        return kept.astype("float32")
    return ops.dequantize_blockwise(kept, largest, _map_of(kept), MOMENT_BLOCK)


@paddle.no_grad()
def write(
    state: dict[str, Tensor], name: str, values: Tensor, key: str = "", step: int = 0
) -> None:
    """Overwrites ``name`` in place with float32 ``values``, converted to its storage form.

    Args:
        key: seed, with ``step``, of stochastic rounding to bfloat16; if empty, bfloat16 values are
            rounded to nearest.
    """
    kept = state[name]
    if kept.dtype == paddle.float32:
        if kept is not values:
            paddle.assign(values, kept)
        return
    if kept.dtype == paddle.bfloat16:
        rounded = stochastic_bfloat16(values, key, step) if key else values.astype("bfloat16")
        paddle.assign(rounded, kept)
        return
    ops.quantize_blockwise_(kept, state[name + _LARGEST], values, _map_of(kept), MOMENT_BLOCK)


def _map_of(codes: Tensor) -> np.ndarray:
    return dynamic_map("int8" if codes.dtype == paddle.int8 else "uint8")


def _zero_code(dtype: str) -> int:
    code = int(np.searchsorted(dynamic_map(dtype), 0.0))
    return code - 128 if dtype == "int8" else code


@functools.cache
def dynamic_map(dtype: str) -> np.ndarray:
    """The 256 values of the codes, float32 in ascending order.

    For e = -6 to 0, the range from 0.1 x 10^e to 10^e is divided into 2^(e + 6) (int8) or
    2^(e + 7) (uint8) equal intervals. The values are 0, 1 and the midpoints (int8: of both signs).
    """
    values = [0.0, 1.0]
    for place in range(7):
        intervals = 2 ** (place + (dtype == "uint8"))
        edges = np.linspace(0.1, 1.0, intervals + 1)
        middles = (edges[1:] + edges[:-1]) / 2 * 10.0 ** (place - 6)
        values += list(middles)
        if dtype == "int8":
            values += list(-middles)
    table = np.sort(np.array(values, np.float32))
    if dtype == "int8":
        nearest = int(np.searchsorted(table, 0.0)) - 1
        table = np.concatenate([[np.float32(-1.0)], np.delete(table, nearest)])
    return table
