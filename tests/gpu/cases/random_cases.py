"""Cases of each kernel at random sizes and settings.

A draw takes a random generator, a dtype and how many elements the largest array may have, and
returns one of the cases of ``kernel_cases``.
"""

from __future__ import annotations

from collections.abc import Callable

import attention_cases
import kernel_cases as kc
import numpy as np
from adamw_cases import adamw_case
from checks import Case
from narrow_state_cases import narrow_state_case
from random_normal_cases import random_normal_case

# A query with one key has no gradient, nor has the norm of one column, and with few theirs is
# small: rounding is all that is left of it, and there is no size to hold that against.
FEWEST_KEYS, FEWEST_COLUMNS = 16, 8

Draw = Callable[[np.random.Generator, str, int], Case]


def size(rng: np.random.Generator, largest: int, smallest: int = 1) -> int:
    """Every order of magnitude alike; half of them a multiple of 8, which the fast forms want."""
    value = int(np.exp(rng.uniform(np.log(smallest), np.log(largest + 1))))
    if value >= 8 and rng.random() < 0.5:
        value -= value % 8
    return min(max(value, smallest), largest)


def rms_norm(rng: np.random.Generator, dtype: str, elements: int) -> Case:
    cols = size(rng, min(20000, elements), FEWEST_COLUMNS)
    rows = size(rng, min(4000, max(1, elements // cols)))
    weight_dtype = "float32" if rng.random() < 0.3 else dtype
    return kc.rms_norm_case(dtype, rows, cols, _flip(rng), weight_dtype, rng.random() < 0.2)


def rotary_embedding(rng: np.random.Generator, dtype: str, elements: int) -> Case:
    head_dim = 2 * size(rng, 96)
    rotary_dim = 2 * int(rng.integers(1, head_dim // 2 + 1))
    if _flip(rng):
        rotary_dim = head_dim
    heads = size(rng, 40), size(rng, 40) if rng.random() < 0.8 else 0
    sequence = size(rng, max(1, min(2000, elements // (head_dim * sum(heads)))))
    return kc.rotary_case(
        *(dtype, heads, head_dim, rotary_dim),
        offset=int(rng.integers(0, head_dim - rotary_dim + 1)),
        interleaved=_flip(rng),
        positions=_flip(rng),
        misaligned=rng.random() < 0.2,
        batch=int(rng.integers(1, 4)),
        sequence=sequence,
    )


def gated_activation(rng: np.random.Generator, dtype: str, elements: int) -> Case:
    name = str(rng.choice(["silu", "gelu", "gelu_tanh"]))
    if name == "gelu":  # erf, element by element on the host
        elements = min(elements, 2**18)
    cols = size(rng, min(30000, elements))
    rows = size(rng, max(1, elements // cols))
    return kc.gated_activation_case(dtype, name, rows, cols, _flip(rng), rng.random() < 0.2)


def cross_entropy(rng: np.random.Generator, dtype: str, elements: int) -> Case:
    cols = size(rng, min(160000, elements))
    rows = size(rng, min(2000, max(1, elements // cols)))
    if _flip(rng):
        return kc.cross_entropy_case(dtype, rows, cols, shift=_flip(rng))
    shards = int(rng.integers(1, 5))
    start = cols * int(rng.integers(0, shards))
    return kc.cross_entropy_case(dtype, rows, cols, start, cols * shards, shift=_flip(rng))


def flash_attention(rng: np.random.Generator, dtype: str, elements: int) -> Case:
    heads_k, head_dim = int(rng.integers(1, 4)), 8 * int(rng.integers(1, 33))
    heads_q, batch = heads_k * int(rng.integers(1, 4)), int(rng.integers(1, 4))
    # The float64 reference holds [batch, heads, seq_q, seq_k].
    longest = max(2 * FEWEST_KEYS, int((elements / (heads_q * batch)) ** 0.5))
    words = [str(rng.choice(["full", "causal"]))]
    if rng.random() < 0.3:
        words.append(f"window{size(rng, longest, FEWEST_KEYS)}")
    if words[0] == "causal" and rng.random() < 0.3:
        words.append("prefix")
    if rng.random() < 0.3:
        words.append("documents")
    if rng.random() < 0.3:
        words.append("alibi")
        if "prefix" in words or "full" in words:
            # To keys ahead it adds up to half of their distance, whose rounding p takes over.
            longest = min(longest, 512)
    seq_q = size(rng, longest)
    seq_k = size(rng, longest, FEWEST_KEYS)
    if "documents" in words or (seq_q >= FEWEST_KEYS and _flip(rng)):
        seq_q = seq_k
    if rng.random() < 0.3:
        words.append(f"softcap{rng.choice([1, 2, 30])}")
    mask, heads = "+".join(words), (heads_q, heads_k)
    return attention_cases.attention_case(dtype, mask, seq_q, seq_k, heads, head_dim, batch)


def adamw(rng: np.random.Generator, dtype: str, elements: int) -> Case:
    sizes = tuple(size(rng, elements // 4) for _ in range(int(rng.integers(1, 80))))
    while sum(sizes) > elements:
        sizes = sizes[: len(sizes) // 2]
    grad_dtype = dtype if _flip(rng) else "float32"
    masters = dtype != "float32" and _flip(rng)
    return adamw_case(dtype, sizes, grad_dtype, masters, rng.random() < 0.2)


def random_normal(rng: np.random.Generator, dtype: str, elements: int) -> Case:
    cols = size(rng, elements // 2)
    rows = size(rng, max(1, elements // (2 * cols)))
    return random_normal_case(
        *(dtype, rows, cols),
        first=size(rng, 2**40) - 1,
        offset=size(rng, 100) - 1,
        gap=0 if _flip(rng) else size(rng, cols),
        index_stride=cols + (0 if _flip(rng) else size(rng, 2**20)),
        misaligned=rng.random() < 0.2,
    )


def narrow_state(rng: np.random.Generator, _: str, elements: int) -> Case:
    block_size = 256 if _flip(rng) else size(rng, 5000)
    return narrow_state_case(size(rng, elements), block_size, _flip(rng), rng.random() < 0.2)


def _flip(rng: np.random.Generator) -> bool:
    return bool(rng.random() < 0.5)


DRAWS: dict[str, Draw] = {
    "rms_norm": rms_norm,
    "rotary_embedding": rotary_embedding,
    "gated_activation": gated_activation,
    "cross_entropy": cross_entropy,
    "flash_attention": flash_attention,
    "adamw": adamw,
    "random_normal": random_normal,
    "narrow_state": narrow_state,
}
