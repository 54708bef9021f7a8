"""Normal random numbers by counter: their bits, and how normal and independent they are."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import references as ref

from pypkg import _native

KEY, STREAM = 0x0123456789ABCDEF, 0xFEDCBA9876543210
ISAS = _native.cpu_isas()


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    yield
    _native.set_cpu_isa("")
    _native.set_num_threads(0)


def drawn(count: int, first: int = 0, key: int = KEY, stream: int = STREAM) -> np.ndarray:
    out = np.full(count, np.nan, np.float32)
    _native.random_normal(out, key=key, stream_id=stream, first=first, cols=count)
    return out


# Of Random123, tests/kat_vectors: counter, key and the four words.
@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0), 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((2**64 - 1, 2**64 - 1), 2**64 - 1, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x85A308D3243F6A88, 0x0370734413198A2E),
            0x299F31D0A4093822,
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_the_reference_knows_philox(counter: tuple[int, int], key: int, words: str) -> None:
    found = ref.philox4x32(np.array([counter[0]], np.uint64), counter[1], key)
    assert " ".join(f"{int(word[0]):08x}" for word in found) == words


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("first", [0, 37, 2**36 - 100])  # counters beyond 32 bits
def test_against_float64(isa: str, first: int) -> None:
    _native.set_cpu_isa(isa)
    expected = ref.random_normal(first + np.arange(20_000), STREAM, KEY)
    np.testing.assert_allclose(drawn(20_000, first), expected, rtol=5e-7, atol=5e-8)


def test_bits_stay_as_they_are() -> None:
    """Weights of a seed are the same in every release."""
    bits = drawn(64, first=1000).view(np.uint32)
    found = [f"{each:08x}" for each in bits[::21]]
    assert found == ["be272e44", "bf923bce", "bd0c9d8a", "be0f2e3f"]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("isa", ISAS)
def test_every_version_and_number_of_threads_has_the_same_bits(dtype: str, isa: str) -> None:
    def bits(name: str, threads: int) -> np.ndarray:
        _native.set_cpu_isa(name)
        _native.set_num_threads(threads)
        out = np.zeros(70_001, np.uint32 if dtype == "float32" else np.uint16)
        _native.random_normal(
            (out.ctypes.data, out.shape, dtype, "cpu"),
            **{"key": KEY, "stream_id": STREAM, "cols": out.size, "deviation": 0.02},
        )
        return out

    np.testing.assert_array_equal(bits(isa, 3), bits(ISAS[0], 1))


def test_float16_is_rounded_to_nearest_even() -> None:
    """Down to the smallest of its numbers, and up to infinity."""
    for deviation in (0.02, 1e-5, 30000.0):
        out = np.empty(100_000, np.float16)
        _native.random_normal(out, key=KEY, stream_id=0, deviation=deviation, cols=out.size)
        exact = drawn(out.size, stream=0) * np.float32(deviation)
        with np.errstate(over="ignore"):
            np.testing.assert_array_equal(out, exact.astype(np.float16))
        assert np.isinf(out).any() == (deviation > 1)


def test_a_part_is_that_of_the_whole() -> None:
    whole = drawn(300 * 1000).reshape(300, 1000)
    for rows, columns in [((7, 9), (1, 1000)), ((0, 300), (129, 130)), ((31, 95), (64, 192))]:
        part = np.empty((rows[1] - rows[0], columns[1] - columns[0]), np.float32)
        _native.random_normal(
            part.reshape(-1),
            **{"key": KEY, "stream_id": STREAM, "first": rows[0] * 1000 + columns[0]},
            **{"rows": part.shape[0], "cols": part.shape[1], "out_stride": part.shape[1]},
            index_stride=1000,
        )
        np.testing.assert_array_equal(part, whole[slice(*rows), slice(*columns)])


COUNT = 2**22


@pytest.fixture(scope="module")
def sample() -> np.ndarray:
    return drawn(COUNT).astype(np.float64)


def test_moments(sample: np.ndarray) -> None:
    """Within five standard errors of those of the normal distribution."""
    for power, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10170)):
        error = 5 * math.sqrt(variance / COUNT)
        assert abs((sample**power).mean() - expected) < error, power


def test_the_distribution_is_normal(sample: np.ndarray) -> None:
    """The statistic of Kolmogorov and Smirnov exceeds 2.3 / sqrt(n) once in 20,000 samples."""
    ordered = np.sort(sample)[:: COUNT // 4096]
    cdf = np.array([0.5 * math.erfc(-each / math.sqrt(2)) for each in ordered])
    empirical = np.arange(0, COUNT, COUNT // 4096) / COUNT
    assert np.abs(cdf - empirical).max() < 2.3 / math.sqrt(COUNT)


@pytest.mark.parametrize("limit", [2.0, 3.0, 4.0, 4.5])
@pytest.mark.parametrize("sign", [1, -1])
def test_tails(sample: np.ndarray, limit: float, sign: int) -> None:
    expected = COUNT * 0.5 * math.erfc(limit / math.sqrt(2))
    found = int((sign * sample > limit).sum())
    assert abs(found - expected) < 5 * math.sqrt(expected), (found, expected)


@pytest.mark.parametrize("distance", [1, 15, 16, 17, 32, 48, 64, 1024, 4096])
def test_neighbours_are_independent(sample: np.ndarray, distance: int) -> None:
    """Correlation of numbers, and of their squares, which pairs of one radius would show."""
    near, far = sample[:-distance], sample[distance:]
    for values in ((near, far), (near**2 - 1, far**2 - 1), (np.abs(near), far)):
        correlation = np.corrcoef(*values)[0, 1]
        assert abs(correlation) < 5 / math.sqrt(COUNT)


@pytest.mark.parametrize(
    ("key", "stream"), [(KEY, STREAM + 1), (KEY + 1, STREAM), (KEY ^ 1 << 63, STREAM)]
)
def test_streams_are_independent(sample: np.ndarray, key: int, stream: int) -> None:
    other = drawn(COUNT // 4, key=key, stream=stream).astype(np.float64)
    mine = sample[: other.size]
    assert abs(np.corrcoef(mine, other)[0, 1]) < 5 / math.sqrt(other.size)
    assert abs(np.corrcoef(mine**2, other**2)[0, 1]) < 5 / math.sqrt(other.size)


def test_a_rectangle_outside_the_array_is_refused() -> None:
    out = np.zeros(100, np.float32)
    for changes in ({"cols": 101}, {"offset": -1}, {"rows": 2, "out_stride": 49}, {"first": -1}):
        with pytest.raises(ValueError, match="random_normal: rows"):
            _native.random_normal(out, **{"key": 0, "stream_id": 0, "cols": 50, **changes})
    assert not out.any()
