"""The description of an operator in the benchmark: shapes, work, reference and baselines.

Each module of ``cases`` defines ``Operator`` objects, or an ``Update`` for an optimizer step. A
baseline of any framework is one line there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np

from pypkg.bench.ops.work import ELEMENT_SIZE, PASSES, STEP, PassWork, Work
from pypkg.bench.timing import Summary
from pypkg.models.architecture.config import ModelConfig

Inputs = dict[str, np.ndarray]

OURS = "pypkg"
COMPOSITION = "Paddle composition"
PADDLE = "Paddle functional"
TORCH = "torch"


class BenchmarkError(Exception):
    """A baseline failed, or its result differs from the reference."""


@dataclass(frozen=True)
class Workload:
    """A model and a batch; operators take their shapes from it."""

    name: str
    config: ModelConfig
    batch: int
    sequence: int

    @property
    def tokens(self) -> int:
        return self.batch * self.sequence


@dataclass(frozen=True)
class Baseline:
    """One way to compute an operator.

    Args:
        name: as in the table.
        framework: "paddle" or "torch"; the baseline is left out where that is not installed.
        function: takes the inputs by name and returns a tensor or a tuple of tensors. ``Update``
            describes the function of an optimizer step.
        dtypes: the dtypes of cases that it supports on this device.
        precision: the dtype that it computes in and is validated for; None: that of the case.
        tensors: the dtype of its tensors; None: that of the case.
    """

    name: str
    framework: str
    function: Callable
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    precision: str | None = None
    tensors: str | None = None


@dataclass(frozen=True)
class Shape:
    """An operator at one size. ``inputs`` makes float32 and integer arrays from a generator."""

    label: str
    inputs: Callable[[np.random.Generator], Inputs]
    work: PassWork


@dataclass(frozen=True)
class Operator:
    """An operator with its reference and baselines.

    Args:
        name: of the function in ``pypkg.ops``, with the variant, as in "rms_norm+residual".
        counted: what ``Work`` counts per pass, in words, for the report.
        bound: "memory" or "compute": the limit of the machine that times are compared with.
        gradients: the inputs that get a gradient. The dtype of a case applies to these; other
            inputs keep their own.
        reference: the function in any precision, on Paddle tensors; validation runs it in float64.
        baselines: ours is the first.
        shapes: the sizes.
        passes: those reported.
        overwritten: the inputs whose memory a baseline may write to; each run gets fresh ones.
        bfloat16_tolerance: how far a bfloat16 result may be off, relative to its size and that of
            its neighbours. The default is for results that are rounded (to 2^-9) once or twice.
        notes: lines for the report.
    """

    name: str
    counted: str
    bound: str
    gradients: tuple[str, ...]
    reference: Callable
    baselines: tuple[Baseline, ...]
    shapes: tuple[Shape, ...]
    passes: tuple[str, ...] = PASSES
    overwritten: tuple[str, ...] = ()
    bfloat16_tolerance: float = 2.0**-6
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class UpdateShape:
    """The shapes of the parameters that a step updates, and its work."""

    label: str
    parameters: tuple[tuple[int, ...], ...]
    work: PassWork


@dataclass(frozen=True)
class Update:
    """An optimizer step with its reference and baselines.

    It is one pass over many tensors, bound by memory, in place. Tensors are compared with the
    reference after the first step; timed steps continue from there.

    Args:
        name, counted, notes, bfloat16_tolerance: as for ``Operator``.
        inputs: makes the float32 arrays of one parameter, by kind, from a generator, its shape and
            the dtype of the case.
        rounded: the kinds that the dtype of a case applies to; all others are float32.
        reference: the values of one parameter after a step, by kind, given slices of its flattened
            inputs in float64, and its shape.
        baselines: ours is the first. Their functions take a list of tensors per kind, by name, and
            return the step: a function without arguments that updates those tensors.
        shapes: the sizes.
    """

    name: str
    counted: str
    inputs: Callable[[np.random.Generator, tuple[int, ...], str], Inputs]
    rounded: tuple[str, ...]
    reference: Callable[[Inputs, tuple[int, ...]], Inputs]
    baselines: tuple[Baseline, ...]
    shapes: tuple[UpdateShape, ...]
    bfloat16_tolerance: float = Operator.bfloat16_tolerance
    notes: tuple[str, ...] = ()
    bound: ClassVar[str] = "memory in place"
    passes: ClassVar[tuple[str, ...]] = (STEP,)

    def dtype(self, kind: str, of_case: str) -> str:
        """The dtype of the tensors of a kind."""
        return of_case if kind in self.rounded else "float32"


def result_row(
    op: str,
    shape: str,
    dtype: str,
    pass_name: str,
    baseline: str,
    summary: Summary,
    *,
    work: Work,
    limit: float,
    error: float | None,
) -> dict[str, Any]:
    """One measurement, as the report reads it, of a framework's function or of a kernel alone.

    Args:
        summary: of the times, in milliseconds.
        work: of the pass; it is counted in elements of ``dtype``.
        limit: milliseconds that the machine needs for that work at best.
        error: the largest one, as the suite measures it; None where nothing was compared.
    """
    return {
        "op": op,
        "shape": shape,
        "dtype": dtype,
        "pass": pass_name,
        "baseline": baseline,
        **asdict(summary),
        "bytes": work.bytes(ELEMENT_SIZE[dtype]),
        "flops": work.flops,
        "limit": limit,
        "error": error,
    }


def normal(rng: np.random.Generator, *shape: int, scale: float = 1.0) -> np.ndarray:
    """float32 values of a normal distribution with mean 0."""
    values = rng.standard_normal(shape, dtype=np.float32)
    return values if scale == 1.0 else values * np.float32(scale)
