"""The cases of the benchmarks of operators and kernels.

Modules of ``cases`` define those of the operators, modules of ``gpu`` those of the kernels. A
baseline of any framework is one line there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Generic, TypeVar

import numpy as np

from pypkg.bench.ops.work import ELEMENT_SIZE, PASSES, PassWork, Work
from pypkg.bench.timing import Summary
from pypkg.models.architecture.config import ModelConfig

Inputs = dict[str, np.ndarray]
Method = TypeVar("Method", covariant=True)
Value = TypeVar("Value", float, Work)

OURS = "pypkg"
COMPOSITION = "Paddle composition"
PADDLE = "Paddle functional"
TORCH = "torch"


class BenchmarkError(Exception):
    """A baseline failed, or its result differs from the reference."""


@dataclass(frozen=True)
class Workload:
    """A model and a batch, from which cases derive their shapes.

    Attributes:
        batch: sequences of the batch.
        sequence: tokens of a sequence.
    """

    name: str
    config: ModelConfig
    batch: int
    sequence: int

    @property
    def tokens(self) -> int:
        """Number of tokens of the batch."""
        return self.batch * self.sequence


@dataclass(frozen=True)
class Baseline:
    """One implementation of an operator, by this package or by another one.

    Args:
        name: in the table.
        framework: "paddle" or "torch". The baseline is left out if it is not installed.
        function: runs the operator; the method of the case defines its arguments and result.
        dtypes: the dtypes of cases that it supports on this device.
        precision: dtype of its arithmetic, for which it is validated; None: that of the case.
        tensors: dtype of its tensors; None: that of the case.
    """

    name: str
    framework: str
    function: Callable
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    precision: str | None = None
    tensors: str | None = None


@dataclass(frozen=True)
class BenchmarkCase(Generic[Method]):
    """One operator at one shape and dtype: its work, and its implementations.

    Both benchmarks use this class: that of the operators, which runs Paddle operators with their
    gradients, and that of the kernels, which runs kernels on a GPU without Paddle.

    Args:
        op: name in the report: a function of ``pypkg.ops`` with its variant, as in
            "rms_norm+residual"; a key of ``work.COUNTED``.
        shape: label of the shape in the report.
        work: work of each pass.
        baselines: the implementations; the first one is ours.
        method: creates the inputs, and runs and validates the baselines: ``Differentiated``,
            ``InPlaceUpdate`` and ``NormalFill`` for operators, ``KernelComparison`` for kernels.
        dtype: dtype of the tensors whose dtype varies with the case.
        bound: limit of the machine that times are compared with: "memory", "memory in place",
            "compute", or "memory and compute".
        passes: the passes to report; empty: those of ``work``, and their sum if there are two.
        bfloat16_tolerance: largest error of a bfloat16 result, relative to its size and that of
            its neighbours. The default is for results that are rounded (to 2^-9) once or twice.
        yardstick: shape of another case of this operator and pass. The report gives the rate of
            this case as a share of the rate of that case.
        notes: lines for the report.
    """

    op: str
    shape: str
    work: PassWork
    baselines: tuple[Baseline, ...]
    method: Method
    dtype: str = "float32"
    bound: str = "memory"
    passes: tuple[str, ...] = ()
    bfloat16_tolerance: float = 2.0**-6
    yardstick: str | None = None
    notes: tuple[str, ...] = ()

    def row(
        self,
        pass_name: str,
        baseline: str,
        milliseconds: Summary,
        *,
        limit: float,
        error: float | None,
    ) -> dict[str, Any]:
        """One measurement in the form of the report.

        Args:
            milliseconds: the times of the pass.
            limit: milliseconds that the machine needs at least for the work of the pass.
            error: the largest error found in validation; None if nothing was compared.
        """
        work = with_sum(self.work)[pass_name]
        return {
            "op": self.op,
            "shape": self.shape,
            "dtype": self.dtype,
            "pass": pass_name,
            "baseline": baseline,
            **asdict(milliseconds),
            "bytes": work.bytes(ELEMENT_SIZE[self.dtype]),
            "flops": work.flops,
            "limit": limit,
            "error": error,
        }


def with_sum(passes: Mapping[str, Value]) -> dict[str, Value]:
    """``passes``, with the sum of forward and backward if there are both."""
    forward, backward, both = PASSES
    if not {forward, backward} <= passes.keys():
        return dict(passes)
    return {**passes, both: passes[forward] + passes[backward]}


def normal(rng: np.random.Generator, *shape: int, scale: float = 1.0) -> np.ndarray:
    """Normally distributed float32 values with mean 0 and standard deviation ``scale``."""
    values = rng.standard_normal(shape, dtype=np.float32)
    return values if scale == 1.0 else values * np.float32(scale)
