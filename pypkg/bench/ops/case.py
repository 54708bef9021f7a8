"""What is needed to benchmark an operator: shapes, counted work, a reference and baselines.

An operator of the benchmark is one ``Operator``, or one ``Update`` where it is a step of an
optimizer, in one of the modules of ``cases``; a baseline, whatever its framework or device, is
one line in it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from pypkg.models.architecture.config import ModelConfig

Inputs = dict[str, np.ndarray]

PASSES = ("forward", "backward", "forward+backward")
STEP = "step"


class BenchmarkError(Exception):
    """A baseline failed or computes something else; its times would mean nothing."""


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
class Work:
    """The least that one pass must do.

    Args:
        elements: values in the dtype of the case, each read or written once.
        other_bytes: the same for values whose dtype does not vary with the case.
        flops: multiplications and additions of matrix products; element-wise arithmetic is not
            counted.
    """

    elements: int = 0
    other_bytes: int = 0
    flops: int = 0

    def bytes(self, element_size: int) -> int:
        return self.elements * element_size + self.other_bytes

    def __add__(self, other: Work) -> Work:
        return Work(
            self.elements + other.elements,
            self.other_bytes + other.other_bytes,
            self.flops + other.flops,
        )


@dataclass(frozen=True)
class Baseline:
    """One way to compute an operator.

    Args:
        name: as in the table.
        framework: "paddle" or "torch"; the baseline is left out where that is not installed.
        function: takes the inputs by name and returns a tensor or a tuple of tensors. That of an
            ``Update`` is described there.
        dtypes: what it supports on this kind of device.
        precision: what it computes in and is validated for, where that is not the dtype of the
            case.
        tensors: the dtype of its tensors, where that is not the dtype of the case.
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
    forward: Work
    backward: Work

    @property
    def work(self) -> dict[str, Work]:
        """What each pass does that is timed for itself."""
        return dict(zip(PASSES, (self.forward, self.backward)))


@dataclass(frozen=True)
class Operator:
    """An operator and everything that is compared on it.

    Args:
        name: the name of the function in ``pypkg.ops``, and what sets a variant apart.
        counted: what ``Work`` counts per pass, in words, for the report.
        bound: "memory" or "compute": which limit of the machine the time is set against.
        gradients: the inputs that get a gradient. The dtype of a case applies to these; other
            inputs keep their own.
        reference: the function in any precision, on Paddle tensors; validation runs it in float64.
        baselines: ours is the first.
        shapes: the sizes.
        passes: those reported.
        overwritten: the inputs whose memory a baseline may write to; each run gets fresh ones.
        bfloat16_tolerance: how far a bfloat16 result may be off, relative to its size and that of
            its neighbours. The default is for results that are rounded (to 2^-9) once or twice.
        notes: what has to be said with the results.
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
    """The parameters that a step updates, and the bytes that it has to move for them."""

    label: str
    parameters: tuple[tuple[int, ...], ...]
    moved: Work

    @property
    def work(self) -> dict[str, Work]:
        return {STEP: self.moved}


@dataclass(frozen=True)
class Update:
    """A step of an optimizer, and everything that is compared on it.

    It is one pass over many tensors, bound by memory, and overwrites what it reads: its limit is a
    pass in place. What it leaves is compared after the first step; timing goes on from there.

    Args:
        name, counted, notes, bfloat16_tolerance: as for ``Operator``.
        inputs: makes the float32 arrays of one parameter, by kind, from a generator, its shape and
            the dtype of the case.
        rounded: the kinds that the dtype of a case applies to; all others are float32.
        reference: what a step leaves of one parameter, by kind, given slices of its flattened
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
        """That of a kind's tensors."""
        return of_case if kind in self.rounded else "float32"


OURS = "pypkg"
COMPOSITION = "Paddle composition"
PADDLE = "Paddle functional"
TORCH = "torch"


def normal(rng: np.random.Generator, *shape: int, scale: float = 1.0) -> np.ndarray:
    """float32 values of a normal distribution with mean 0."""
    values = rng.standard_normal(shape, dtype=np.float32)
    return values if scale == 1.0 else values * np.float32(scale)
