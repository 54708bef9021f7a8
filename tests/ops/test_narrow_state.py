"""8-bit blocks and stochastic rounding: the kernels' bits are those of the references."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import paddle
import pytest

from pypkg import _native, ops
from pypkg.parallel.optimizer.rules.moments import dynamic_map

DTYPES = ("int8", "uint8")
SIZES = (0, 1, 5, 255, 256, 257, 4096, 70_001)
ISAS = _native.cpu_isas()
Stored = tuple[np.ndarray, np.ndarray]


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    yield
    _native.set_cpu_isa("")
    _native.set_num_threads(0)
    ops.set_backend("auto")


def stored(backend: str, values: np.ndarray, dtype: str, block_size: int = 256) -> Stored:
    """Codes and factors of the values."""
    ops.set_backend(backend)
    codes = paddle.full(values.shape, 77, dtype)
    largest = paddle.full([-(-values.size // block_size)], np.nan)
    table = dynamic_map(dtype)
    ops.quantize_blockwise_(codes, largest, paddle.to_tensor(values), table, block_size)
    return codes.numpy(), largest.numpy()


def read(backend: str, codes: np.ndarray, largest: np.ndarray, block_size: int = 256) -> np.ndarray:
    ops.set_backend(backend)
    given = paddle.to_tensor(codes), paddle.to_tensor(largest)
    return ops.dequantize_blockwise(*given, dynamic_map(codes.dtype.name), block_size).numpy()


def assert_same_bits(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.shape == expected.shape
    is_nan = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(found), is_nan)
    np.testing.assert_array_equal(found.view(np.int32)[~is_nan], expected.view(np.int32)[~is_nan])


def assert_same(values: np.ndarray, dtype: str, block_size: int = 256) -> None:
    """Both ways, of the compiled kernels and the references."""
    expected = stored("reference", values, dtype, block_size)
    found = stored("compiled", values, dtype, block_size)
    np.testing.assert_array_equal(found[0], expected[0])
    assert_same_bits(found[1], expected[1])
    wide = read("reference", *expected, block_size)
    assert_same_bits(read("compiled", *expected, block_size), wide)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_bits_of_blocks(isa, dtype, size):
    _native.set_cpu_isa(isa)
    values = np.random.default_rng(size).normal(size=size).astype(np.float32)
    values *= np.exp(np.linspace(-30, 0, size)).astype(np.float32)
    values[::7] = 0
    for threads, block_size in ((1, 256), (3, 256), (2, 100), (2, 1000)):
        _native.set_num_threads(threads)
        assert_same(values, dtype, block_size)
    assert_same(np.square(values), dtype)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_boundary_between_codes(isa, dtype):
    """At the boundary, the lower code; the next float has the upper one."""
    _native.set_cpu_isa(isa)
    table = dynamic_map(dtype)
    middles = (table[1:] + table[:-1]) / 2
    near = [np.nextafter(middles, np.float32(side)) for side in (-2, 2)]
    values = np.concatenate([[np.float32(1)], table, middles, *near])
    whole = values.size
    assert_same(values, dtype, whole)
    codes, _ = stored("compiled", values, dtype, whole)
    places = codes[1:].astype(int) + (128 if dtype == "int8" else 0)
    least = 0 if dtype == "int8" else 1
    np.testing.assert_array_equal(places[:256], np.arange(256))
    expected = np.maximum(np.arange(255), least)
    np.testing.assert_array_equal(places[256 : 2 * 256 - 1], expected)
    np.testing.assert_array_equal(places[-255:], np.arange(1, 256))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("at", [0, 100, 255])
@pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf, 1e-45, -1e-45, -0.0, 3.4e38])
def test_what_is_not_finite_and_what_is_tiny(isa, dtype, at, special):
    _native.set_cpu_isa(isa)
    for others in (0.0, 1e-38, 3.0):
        values = np.random.default_rng(0).normal(size=512).astype(np.float32) * np.float32(others)
        values[at] = special
        assert_same(values, dtype)
    values[300] = np.inf  # beside NaN, the quotient
    values[301] = np.nan
    assert_same(values, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_code_is_read(dtype):
    codes = np.arange(256, dtype=np.uint8).view(dtype)
    for factor in (1.0, 0.3, 1e-44, 0.0, np.inf, np.nan):
        largest = np.array([factor], np.float32)
        assert_same_bits(read("compiled", codes, largest), read("reference", codes, largest))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("size", SIZES)
def test_bits_of_stochastic_rounding(isa, size):
    _native.set_cpu_isa(isa)
    values = np.random.default_rng(size).normal(size=size).astype(np.float32)
    values[::11] *= np.float32(1e-42)
    values[5:9] = (np.inf, -np.inf, np.nan, 3.4e38)[: len(values[5:9])]
    for key in (0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF):
        rounded = []
        for backend in ("reference", "compiled"):
            ops.set_backend(backend)
            rounded.append(ops.stochastic_bfloat16(paddle.to_tensor(values), key))
            assert rounded[-1].dtype == paddle.bfloat16
        np.testing.assert_array_equal(*(each.view("int16").numpy() for each in rounded))


def test_shapes_and_tensors_that_are_not_contiguous():
    values = paddle.to_tensor(np.random.default_rng(0).normal(size=(60, 50)).astype(np.float32))
    flat = ops.stochastic_bfloat16(values.T.contiguous().reshape([-1]), 3)
    found = ops.stochastic_bfloat16(values.T, 3)
    assert found.shape == [50, 60]
    np.testing.assert_array_equal(found.view("int16").numpy().ravel(), flat.view("int16").numpy())
    codes, largest = paddle.zeros([50, 60], "int8"), paddle.zeros([12])
    ops.quantize_blockwise_(codes, largest, values.T, dynamic_map("int8"), 256)
    expected, _ = stored("compiled", values.numpy().T.copy(), "int8")
    np.testing.assert_array_equal(codes.numpy(), expected)
    assert ops.dequantize_blockwise(codes, largest, dynamic_map("int8"), 256).shape == [50, 60]
    with pytest.raises(ValueError, match="must be contiguous"):
        ops.quantize_blockwise_(codes.T, largest, values, dynamic_map("int8"), 256)


def test_wrong_arguments():
    codes, largest, table = paddle.zeros([300], "int8"), paddle.zeros([2]), dynamic_map("int8")
    with pytest.raises(TypeError, match="codes must be int8 or uint8, got int32"):
        ops.dequantize_blockwise(codes.astype("int32"), largest, table, 256)
    with pytest.raises(ValueError, match=r"largest must have shape \[2\], got \[3\]"):
        ops.dequantize_blockwise(codes, paddle.zeros([3]), table, 256)
    with pytest.raises(ValueError, match=r"values must have shape \[300\], got \[299\]"):
        ops.quantize_blockwise_(codes, largest, paddle.zeros([299]), table, 256)
    with pytest.raises(TypeError, match="values must be float32, got bfloat16"):
        ops.stochastic_bfloat16(paddle.zeros([3], "bfloat16"), 0)


def test_the_kernels_check_their_arrays():
    values, codes, largest = np.zeros(300, np.float32), np.zeros(300, np.uint8), np.zeros(2, "f4")
    table, options = dynamic_map("uint8"), {"block_size": 256, "is_signed": False}
    with pytest.raises(ValueError, match="largest must have one element for each 256"):
        _native.quantize_blockwise(values, codes, np.zeros(1, np.float32), table, **options)
    with pytest.raises(ValueError, match="table must have 256 values"):
        _native.dequantize_blockwise(values, codes, largest, table[:255], **options)
    with pytest.raises(ValueError, match="values of the table lie too close"):
        dense = np.linspace(0.9, 1, 256, dtype=np.float32)
        _native.quantize_blockwise(values, codes, largest, dense, **options)
