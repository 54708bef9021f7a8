"""Arrays for kernels, and comparison with float64 references.

NumPy has no bfloat16: its bits are kept in uint16 arrays and described to the kernels by address.
"""

from __future__ import annotations

import numpy as np

DTYPES = ("float32", "bfloat16")


def store(values: np.ndarray, dtype: str) -> np.ndarray:
    """Values rounded to `dtype`; bfloat16 as its bits, rounded to nearest even."""
    single = np.ascontiguousarray(values, dtype=np.float32)
    if dtype == "float32":
        return single
    bits = single.view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(single), np.uint16(0x7FC0), rounded)


def load(storage: np.ndarray) -> np.ndarray:
    """What `store` made, as float64."""
    if storage.dtype == np.uint16:
        storage = (storage.astype(np.uint32) << 16).view(np.float32)
    return storage.astype(np.float64)


def poisoned(shape: tuple[int, ...], dtype: str = "float32") -> np.ndarray:
    """An output array full of NaN: whatever the kernel does not write shows."""
    return store(np.full(shape, np.nan), dtype)


def arg(storage: np.ndarray | None):
    """A kernel argument for `storage`, which must stay alive during the call."""
    if storage is None or storage.dtype != np.uint16:
        return storage
    assert storage.flags.c_contiguous
    return (storage.ctypes.data, storage.shape, "bfloat16", "cpu")


def assert_close(
    actual: np.ndarray, expected: np.ndarray, float32_units: float = 40.0, magnitude: float = 0.0
) -> None:
    """Compare a kernel's output with a float64 reference on the same, already rounded, inputs.

    The kernels compute in float32, so the error is a number of float32 roundings (2^-24): of the
    value itself and, where sums cancel, of the largest terms, taken to be the largest result or
    `magnitude`. A bfloat16 result is rounded once more (2^-8 at most). Below 1e-37 results may be
    flushed to zero. NaN and infinities have to agree.
    """
    output_rounding = 2.0**-8 if actual.dtype == np.uint16 else 0.0
    unit = 2.0**-24 * float32_units
    finite = expected[np.isfinite(expected)]
    largest = max(magnitude, np.abs(finite).max() if finite.size else 0.0)
    np.testing.assert_allclose(
        load(actual), expected, rtol=unit + output_rounding, atol=unit * largest + 1e-37
    )
