"""The benchmark of every kernel against the best that torch, Liger and FlexAttention offer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import benchmark_adamw
import benchmark_attention
import benchmark_memory
from benchmark_case import BenchmarkCase, Maker

# In the order of their weight, should the time not be enough for all.
SUITES = {
    "attention": benchmark_attention.cases,
    "memory": benchmark_memory.cases,
    "adamw": benchmark_adamw.cases,
}


def cases(mk: Maker, suites: Sequence[str]) -> Iterator[BenchmarkCase]:
    """Sizes of large models on a GPU, tiny ones on a CPU (to try the script out)."""
    for name in suites:
        yield from SUITES[name](mk)
