"""Optimizer state in fewer bits: 8-bit blocks, and bfloat16 rounded at random."""

from __future__ import annotations

import numpy as np
import paddle
from paddle import Tensor

from pypkg.ops.dispatch.checks import check_dtype, check_shape
from pypkg.ops.dispatch.library import implementation, raw_stream

_INT32 = 0xFFFFFFFF
_LOW_BITS = 0xFFFF


@paddle.no_grad()
def dequantize_blockwise(
    codes: Tensor, largest: Tensor, table: np.ndarray, block_size: int
) -> Tensor:
    """The values of 8-bit blocks (Dettmers et al., 2022): ``table[code] * largest[block]``.

    Args:
        codes: of any shape, taken as flat, contiguous; uint8 places in the table, or int8 ones,
            which are 128 below the places.
        largest: float32 [blocks], a factor for each ``block_size`` elements.
        table: float32 [256], in host memory.

    Returns:
        float32, shaped like codes.

    Raises:
        TypeError, ValueError: a tensor has another dtype or shape, or is not contiguous.
    """
    _check_blocks("dequantize_blockwise", codes, largest, block_size)
    run = implementation(_DEQUANTIZE, largest)
    return run(codes, largest, table, block_size)


@paddle.no_grad()
def quantize_blockwise_(
    codes: Tensor, largest: Tensor, values: Tensor, table: np.ndarray, block_size: int
) -> None:
    """Overwrites codes and factors with those nearest to values, see ``dequantize_blockwise``.

    The factor of a block is its largest magnitude. The code of a value is that of the nearest
    element of the table to its quotient, and that of the lower one of two that are as near. In
    uint8 a positive value has never the code 0. If a value of a block is NaN, so is the factor;
    quotients that are not finite have the last code. Every device gives the same bits.

    Args:
        codes, largest, block_size: as for ``dequantize_blockwise``.
        values: float32, shaped like codes.
        table: float32 [256], ascending from -1 or 0 to 1, in host memory. Neighbouring values
            differ by more than a 2^-7th of their size.

    Raises:
        TypeError, ValueError: as for ``dequantize_blockwise``, or the table is too dense.
    """
    _check_blocks("quantize_blockwise_", codes, largest, block_size)
    check_dtype("quantize_blockwise_", "values", values, (paddle.float32,))
    check_shape("quantize_blockwise_", "values", values, codes.shape)
    run = implementation(_QUANTIZE, values)
    run(codes, largest, values.contiguous(), table, block_size)


@paddle.no_grad()
def stochastic_bfloat16(values: Tensor, key: int) -> Tensor:
    """Rounds float32 to bfloat16, up or down at random, so that the expected value is unchanged.

    The random bits of element i are the lower 16 of the finalizer of MurmurHash3 (Appleby, 2011) of
    i * 0x9E3779B1 + key, so every device gives the same result.

    Args:
        values: float32 of any shape. Values that bfloat16 represents are unchanged.
        key: from 0 to 2^32 - 1.

    Returns:
        bfloat16, shaped like values.

    Raises:
        TypeError: values has another dtype.
    """
    check_dtype("stochastic_bfloat16", "values", values, (paddle.float32,))
    run = implementation(_STOCHASTIC, values)
    return run(values.contiguous(), key)


def _check_blocks(op: str, codes: Tensor, largest: Tensor, block_size: int) -> None:
    check_dtype(op, "codes", codes, (paddle.int8, paddle.uint8))
    check_dtype(op, "largest", largest, (paddle.float32,))
    check_shape(op, "largest", largest, [-(-codes.size // block_size)])
    if not (codes.is_contiguous() and largest.is_contiguous()):
        raise ValueError(f"{op}: codes and largest must be contiguous")


def _is_signed(codes: Tensor) -> bool:
    return codes.dtype == paddle.int8


def _dequantize_reference(
    codes: Tensor, largest: Tensor, table: np.ndarray, block_size: int
) -> Tensor:
    index = codes.reshape([-1]).astype("int32") + (128 if _is_signed(codes) else 0)
    values = _blocks(paddle.index_select(paddle.to_tensor(table), index), block_size)
    return (values * largest.unsqueeze(1)).reshape([-1])[: codes.size].reshape(codes.shape)


def _quantize_reference(
    codes: Tensor, largest: Tensor, values: Tensor, table: np.ndarray, block_size: int
) -> None:
    if not codes.size:
        return
    blocks = _blocks(values.reshape([-1]), block_size)
    found = blocks.abs().max(axis=1)
    scaled = blocks / paddle.where(found > 0, found, paddle.ones_like(found)).unsqueeze(1)
    scaled = scaled.reshape([-1])[: codes.size]
    middles = paddle.to_tensor((table[1:] + table[:-1]) / 2)
    places = paddle.bucketize(scaled, middles, out_int32=True)
    if _is_signed(codes):
        places = places - 128
    else:
        places = paddle.maximum(places, (scaled > 0).astype("int32"))
    paddle.assign(places.astype(codes.dtype).reshape(codes.shape), codes)
    paddle.assign(found, largest)


def _blocks(flat: Tensor, block_size: int) -> Tensor:
    """``flat`` as [blocks, block_size], padded with zeros."""
    missing = -flat.shape[0] % block_size
    if missing:
        flat = paddle.concat([flat, paddle.zeros([missing], flat.dtype)])
    return flat.reshape([-1, block_size])


def _stochastic_reference(values: Tensor, key: int) -> Tensor:
    bits = paddle.view(values, "int32")
    x = paddle.arange(values.size, dtype="int32") * _constant(0x9E3779B1) + _constant(key)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = _mixed(x, shift) * _constant(factor)
    noise = paddle.bitwise_and(_mixed(x, 16), _constant(_LOW_BITS)).reshape(values.shape)
    rounded = paddle.bitwise_and(bits + noise, _constant(~_LOW_BITS))
    return paddle.view(rounded, "float32").astype("bfloat16")


def _mixed(x: Tensor, shift: int) -> Tensor:
    shifted = paddle.bitwise_right_shift(x, _constant(shift), is_arithmetic=False)
    return paddle.bitwise_xor(x, shifted)


def _constant(value: int) -> Tensor:
    """An int32 scalar with the bits of ``value``; its products wrap around."""
    value &= _INT32
    return paddle.full([], value - (value >> 31 << 32), "int32")


def _dequantize_compiled(
    codes: Tensor, largest: Tensor, table: np.ndarray, block_size: int
) -> Tensor:
    from pypkg import _native

    values = paddle.empty(codes.shape, "float32")
    _native.dequantize_blockwise(
        *(_flat(values), _flat(codes, "uint8"), _flat(largest), table),
        block_size=block_size, is_signed=_is_signed(codes), stream=raw_stream(codes) or 0,
    )  # fmt: skip
    return values


def _quantize_compiled(
    codes: Tensor, largest: Tensor, values: Tensor, table: np.ndarray, block_size: int
) -> None:
    from pypkg import _native

    _native.quantize_blockwise(
        *(_flat(values), _flat(codes, "uint8"), _flat(largest), table),
        block_size=block_size, is_signed=_is_signed(codes), stream=raw_stream(codes) or 0,
    )  # fmt: skip


def _stochastic_compiled(values: Tensor, key: int) -> Tensor:
    from pypkg import _native

    out = paddle.empty(values.shape, "bfloat16")
    _native.stochastic_bfloat16(
        _flat(values), _flat(out, "bfloat16"), key=key, stream=raw_stream(values) or 0
    )
    return out


def _flat(tensor: Tensor, dtype: str = "float32") -> tuple[int, list[int], str, str]:
    """The tensor as an argument of a kernel, a vector."""
    device = "cpu" if tensor.place.is_cpu_place() else "cuda"
    return tensor.data_ptr(), [tensor.size], dtype, device


_DEQUANTIZE = {
    "compiled": _dequantize_compiled,
    "triton": _dequantize_reference,
    "reference": _dequantize_reference,
}
_QUANTIZE = {
    "compiled": _quantize_compiled,
    "triton": _quantize_reference,
    "reference": _quantize_reference,
}
_STOCHASTIC = {
    "compiled": _stochastic_compiled,
    "triton": _stochastic_reference,
    "reference": _stochastic_reference,
}
