"""Stochastic rounding to bfloat16 with random numbers that depend on names and steps alone."""

from __future__ import annotations

import zlib

from paddle import Tensor

from pypkg import ops


def stochastic_bfloat16(values: Tensor, name: str, step: int) -> Tensor:
    """Rounds float32 to bfloat16 as ``ops.stochastic_bfloat16`` does, keyed by name and step.

    The result depends on values, name and step only, so all ranks and resumed runs agree.

    Args:
        values: float32 of any shape, finite. Values that bfloat16 represents are unchanged.
        name: name of the tensor.
        step: number of the update.
    """
    return ops.stochastic_bfloat16(values, zlib.crc32(f"{name} {step}".encode()))
