"""The benchmark of every kernel against the best that torch, Liger and FlexAttention offer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pypkg.bench.ops.gpu import adamw, attention, memory
from pypkg.bench.ops.gpu.case import BenchmarkCase, Maker

# In the order of their weight, should the time not be enough for all.
SUITES = {
    "attention": attention.cases,
    "memory": memory.cases,
    "adamw": adamw.cases,
}


def cases(mk: Maker, suites: Sequence[str]) -> Iterator[BenchmarkCase]:
    """Sizes of large models on a GPU, tiny ones on a CPU (to try the script out)."""
    for name in suites:
        yield from SUITES[name](mk)
