"""Cases of the Hopper kernels of attention: a variant that a setting of the environment chooses."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import attention_cases
import numpy as np
from checks import Backend, Case, Comparison

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # nothing is installed on a GPU
from pypkg.bench.ops.gpu.kernel_choice import flash_attention_kernel


def on_hopper(case: Case) -> Case:
    def run(be: Backend, rng: np.random.Generator) -> Iterator[Comparison]:
        with flash_attention_kernel("hopper"):
            yield from case.run(be, rng)

    return Case(case.operation, case.dtype, f"hopper-{case.label}", run)


def small_cases() -> list[Case]:
    """Awkward sizes around the tiles of 2 x 64 queries and 128 keys, for the emulation too."""
    attention = attention_cases.attention_case
    cases = [
        attention("bfloat16", "causal", 1, heads=(1, 1), head_dim=8),
        attention("bfloat16", "full", 128, heads=(1, 1)),
        attention("float16", "full", 65, 129, heads=(3, 1), head_dim=80),
        attention("bfloat16", "causal", 300, heads=(2, 1), head_dim=128),
        attention("float16", "causal", 270, heads=(2, 2)),
        attention("bfloat16", "causal", 300, 70, head_dim=32),  # queries that see nothing
        attention("bfloat16", "window24", 40, 600, head_dim=96),  # keys that nobody sees
        attention("bfloat16", "causal+alibi", 200, heads=(3, 1), head_dim=128),
        attention("float16", "prefix", 170, batch=3, heads=(1, 1), head_dim=24),
        attention("bfloat16", "documents", 460, batch=2, heads=(1, 1)),
        attention("float16", "documents+full+window50+alibi", 380, heads=(2, 1), head_dim=128),
        attention("bfloat16", "causal", 900, heads=(1, 1)),  # the rings go round
        attention("bfloat16", "causal+softcap2", 300, heads=(2, 1), head_dim=128),
        attention("float16", "full+alibi+softcap1", 65, 300, heads=(1, 1)),
        attention("bfloat16", "documents+window50+softcap50", 380, heads=(1, 1), head_dim=96),
        # several blocks of 128 keys add to the gradient of a tile of queries
        attention("float16", "full", 70, 520, heads=(1, 1), head_dim=128),
        attention("bfloat16", "window150", 450, batch=2, heads=(2, 1)),
    ]
    cases += attention_cases.block_cases(("bfloat16",))[:-1]  # the last head is too wide
    return [on_hopper(case) for case in cases]


def large_cases() -> list[Case]:
    cases = attention_cases.large_cases(("float16", "bfloat16"), (64, 80, 96, 128))
    return [on_hopper(case) for case in cases]
