"""Cases of the kernel that makes normal random numbers."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import references as ref
from checks import Backend, Case, Comparison, tolerance


def random_normal_case(
    dtype: str,
    rows: int,
    cols: int,
    *,
    first: int = 0,
    offset: int = 0,
    gap: int = 0,
    index_stride: int | None = None,
    misaligned: bool = False,
) -> Case:
    """A rectangle of ``out``, with ``gap`` elements that stay as they were behind each row."""
    key, stream, deviation = 0x8899AABBCCDDEEFF, 0x0123456789ABCDEF, 0.3
    stride = cols if index_stride is None else index_stride

    def run(be: Backend, rng: np.random.Generator) -> Iterator[Comparison]:
        elements = offset + rows * (cols + gap)
        out = be.poisoned((elements,), dtype, misaligned)
        be.kernels.random_normal(
            out,
            **{"key": key, "stream_id": stream, "deviation": deviation, "first": first},
            **{"offset": offset, "rows": rows, "cols": cols, "out_stride": cols + gap},
            index_stride=stride,
            stream=be.stream,
        )
        expected = np.full(elements, np.nan)
        indices = first + stride * np.arange(rows)[:, None] + np.arange(cols)
        inside = expected[offset:].reshape(rows, cols + gap)[:, :cols]
        inside[...] = np.float32(deviation) * ref.random_normal(indices, stream, key)
        yield Comparison("out", be.numpy(out), expected, tolerance(dtype))

    suffix = f"-at{first}-stride{stride}{f'-gap{gap}' if gap else ''}"
    suffix += "-misaligned" if misaligned else ""
    return Case("random_normal", dtype, f"{rows}x{cols}{suffix}", run)
