"""Cases of the kernels that keep optimizer state in 8 and 16 bits, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import references as ref
from checks import Backend, Case, Comparison

# Denser near zero, as the maps of optimizers are; signed ones are 128 below their place.
_POSITIVE = np.geomspace(1e-6, 1, 255)
TABLES = {
    True: np.concatenate([-_POSITIVE[::-2], [0], _POSITIVE[1::2]]).astype(np.float32),
    False: np.concatenate([[0], _POSITIVE]).astype(np.float32),
}


def narrow_state_case(
    size: int, block_size: int, is_signed: bool, misaligned: bool = False
) -> Case:
    """Blocks of magnitudes from 1e-9 to 1, the second of them zeros, and back; then bfloat16."""
    table, key = TABLES[is_signed], 0x9ABCDEF0

    def run(be: Backend, rng: np.random.Generator) -> Iterator[Comparison]:
        given = rng.standard_normal(size) * np.exp(np.linspace(-20, 0, size))
        given = given if is_signed else given**2
        given[block_size : 2 * block_size] = 0
        values = be.array(given, "float32", misaligned)
        exact = be.numpy(values).astype(np.float32)
        codes = be.array(np.full(size, 77), "uint8", misaligned)
        largest = be.poisoned((-(-size // block_size),), "float32", misaligned)
        options = {"block_size": block_size, "is_signed": is_signed, "stream": be.stream}
        be.kernels.quantize_blockwise(values, codes, largest, table, **options)
        places, factors = ref.quantize_blockwise(exact, table, block_size, is_signed)
        stored = places ^ 0x80 if is_signed else places
        yield Comparison("codes", be.numpy(codes), stored, 0.0)
        yield Comparison("largest", be.numpy(largest), factors, 0.0)

        found = be.poisoned((size,), "float32", misaligned)
        be.kernels.dequantize_blockwise(found, codes, largest, table, **options)
        wide = table[places] * np.repeat(factors, block_size)[:size]
        yield Comparison("values", be.numpy(found), wide, 0.0)

        out = be.poisoned((size,), "bfloat16", misaligned)
        be.kernels.stochastic_bfloat16(values, out, key=key, stream=be.stream)
        yield Comparison("bfloat16", be.numpy(out), ref.stochastic_bfloat16(exact, key), 0.0)

    suffix = f"{'-signed' if is_signed else ''}{'-misaligned' if misaligned else ''}"
    return Case("narrow_state", "float32", f"{size}by{block_size}{suffix}", run)
