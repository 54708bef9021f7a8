"""Stochastic rounding to bfloat16 with random numbers that depend on names and steps alone."""

from __future__ import annotations

import zlib

import paddle
from paddle import Tensor

_LOW_BITS = 0xFFFF


def stochastic_bfloat16(values: Tensor, name: str, step: int) -> Tensor:
    """Rounds float32 to bfloat16, up or down at random, so that the expected value is unchanged.

    The result depends on values, name and step only, so all ranks and resumed runs agree. The
    random bits of element i are a hash of ``name``, ``step`` and i.

    Args:
        values: float32 of any shape, finite. Values that bfloat16 represents are unchanged.
        name: name of the tensor.
        step: number of the update.
    """
    bits = paddle.view(values.contiguous(), "int32")
    noise = _noise(values.size, zlib.crc32(f"{name} {step}".encode())).reshape(values.shape)
    rounded = paddle.bitwise_and(bits + noise, _constant(~_LOW_BITS))
    return paddle.view(rounded, "float32").astype("bfloat16")


def _noise(count: int, key: int) -> Tensor:
    """int32 [count] in [0, 65535]: the finalizer of MurmurHash3 (Appleby, 2011) on a counter."""
    x = paddle.arange(count, dtype="int32") * _constant(0x9E3779B1) + _constant(key)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = _mixed(x, shift) * _constant(factor)
    return paddle.bitwise_and(_mixed(x, 16), _constant(_LOW_BITS))


def _mixed(x: Tensor, shift: int) -> Tensor:
    shifted = paddle.bitwise_right_shift(x, _constant(shift), is_arithmetic=False)
    return paddle.bitwise_xor(x, shifted)


def _constant(value: int) -> Tensor:
    """An int32 scalar with the bits of ``value``; its products wrap around."""
    value &= 0xFFFFFFFF
    return paddle.full([], value - (value >> 31 << 32), "int32")
