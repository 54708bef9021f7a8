"""The suites of the benchmark of the kernels, with torch, Liger and FlexAttention as baselines."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pypkg.bench.ops.gpu import adamw, attention, memory
from pypkg.bench.ops.gpu.case import KernelCase, Maker

# The most important first, in case the time is not enough for all.
SUITES = {
    "attention": attention.cases,
    "memory": memory.cases,
    "adamw": adamw.cases,
}


def cases(mk: Maker, suites: Sequence[str]) -> Iterator[KernelCase]:
    """Yields the cases: sizes of large models on a GPU, tiny sizes on a CPU for a dry run."""
    for name in suites:
        yield from SUITES[name](mk)
