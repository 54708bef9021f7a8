"""Cases of kernels: their construction, validation and timing.

A case holds its inputs, the versions of our kernel, and baselines that compute the same function.
Every version is validated at the timed shape before it is timed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pypkg.bench.ops.case import OURS, Baseline, BenchmarkCase
from pypkg.bench.ops.work import ELEMENT_SIZE, Work
from pypkg.bench.timing import summarize

# Ours and the baseline round to 16 bits at different places.
ALLOWED_DIFFERENCE = 2e-2

Tensors = tuple[torch.Tensor, ...]
Run = Callable[[], Tensors]


@dataclass(frozen=True)
class KernelComparison:
    """Runs our kernels and the baselines of one pass, and compares their results.

    The function of a baseline takes no arguments and returns its results. Our versions fill and
    return the same tensors.

    Args:
        versions: our kernels by name, such as "CUDA" and "Triton".
        restore: for kernels that update tensors in place: resets them to their initial values.
    """

    versions: Mapping[str, Run]
    restore: Callable[[], None] | None = None


KernelCase = BenchmarkCase[KernelComparison]


def kernel_case(
    op: str,
    pass_name: str,
    shape: str,
    versions: Mapping[str, Run],
    baselines: Mapping[str, Run],
    work: Work,
    dtype: str = "bfloat16",
    yardstick: str | None = None,
    restore: Callable[[], None] | None = None,
) -> KernelCase:
    """The case of one pass of an operator.

    Args:
        pass_name: "forward", "backward", "forward+backward" or "step".
        versions, restore: see ``KernelComparison``.
        baselines: implementations in torch by name; they return results equal to ours.
        work: work of the pass.
        dtype, yardstick: see ``BenchmarkCase``.
    """
    first = next(iter(versions))
    ours = {OURS if name == first else f"{OURS}, {name}": run for name, run in versions.items()}
    return BenchmarkCase(
        *(op, shape, {pass_name: work}),
        tuple(Baseline(name, "torch", run) for name, run in {**ours, **baselines}.items()),
        KernelComparison(versions, restore),
        dtype=dtype,
        bound="memory and compute",
        passes=(pass_name,),
        yardstick=yardstick,
    )


def label(case: KernelCase) -> str:
    """Operator, pass and shape, for messages."""
    return f"{case.op} {case.passes[0]} {case.shape}"


def address(tensor: torch.Tensor) -> tuple[int, tuple[int, ...], str, str]:
    """A contiguous tensor as a kernel argument, which takes little host time to pass."""
    assert tensor.is_contiguous()
    dtype = str(tensor.dtype).removeprefix("torch.")
    return tensor.data_ptr(), tuple(tensor.shape), dtype, tensor.device.type


def _liger() -> Any | None:
    """The functions of Liger, or None if it is not installed."""
    if importlib.util.find_spec("liger_kernel") is None:
        return None
    from liger_kernel.transformers import functional

    return functional


class Maker:
    """Creates tensors on the device, and calls of kernels with them."""

    def __init__(
        self,
        kernels: Any,
        triton: Any | None,
        device: str,
        use_compile: bool,
        variants: dict[str, Any] | None = None,
    ):
        """
        Args:
            kernels: the module of the compiled kernels.
            triton: the module of the Triton kernels, or None.
            device: "cuda" or "cpu".
            use_compile: whether functions of torch are also timed with torch.compile.
            variants: further modules like ``kernels``, by name.
        """
        self.kernels, self.triton, self.device = kernels, triton, device
        self.use_compile = use_compile
        self.liger = _liger() if device == "cuda" else None
        self._modules = {"": kernels, **(variants or {})}
        self.generator = torch.Generator(device).manual_seed(0)

    def random(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        x = torch.randn(*shape, device=self.device, generator=self.generator)
        return x.to(dtype)

    def empty(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.full(shape, float("nan"), dtype=dtype, device=self.device)

    def workspace(self, name: str, *tensors: torch.Tensor) -> torch.Tensor:
        """A float32 workspace with the largest size that any version needs."""
        addresses = [address(x) for x in tensors]
        floats = max(getattr(module, name)(*addresses) for module in self._modules.values())
        return self.empty(floats, dtype=torch.float32)

    def call(self, name: str, *arguments: Any, **settings: Any) -> Callable[[], None]:
        """A call of a compiled kernel."""
        return self.calls(name, *arguments, **settings)[""]

    def calls(self, name: str, *arguments: Any, **settings: Any) -> dict[str, Callable[[], None]]:
        """Calls of a compiled kernel (key "") and of its variants."""
        given = [address(a) if isinstance(a, torch.Tensor) else a for a in arguments]
        described = {
            key: address(a) if isinstance(a, torch.Tensor) else a for key, a in settings.items()
        }
        stream = torch.cuda.current_stream().cuda_stream if self.device == "cuda" else 0

        def of(module: Any) -> Callable[[], None]:
            kernel = getattr(module, name)

            def run(_alive: Any = (arguments, settings)) -> None:
                kernel(*given, stream=stream, **described)

            return run

        return {variant: of(module) for variant, module in self._modules.items()}

    def call_triton(self, name: str, *arguments: Any, **settings: Any) -> Callable[[], None] | None:
        """A call of a Triton kernel; None without Triton."""
        if self.triton is None:
            return None
        kernel = getattr(self.triton, name)
        return lambda: kernel(*arguments, **settings)

    def versions(
        self, results: Tensors, name: str, *arguments: Any, **settings: Any
    ) -> dict[str, Run]:
        """The compiled kernels and the Triton kernel, which fill ``results``."""
        compiled = self.calls(name, *arguments, **settings)
        triton = self.call_triton(name, *arguments, **settings)
        return filling(results, {**named("CUDA", compiled), "Triton": triton})


def named(kernel: str, calls: dict[str, Callable[[], None]]) -> dict[str, Callable[[], None]]:
    """``calls``, by variant, with the name of the kernel in their keys."""
    return {f"{kernel} {variant}".strip(): call for variant, call in calls.items()}


def filling(results: Tensors, runs: Mapping[str, Callable[[], None] | None]) -> dict[str, Run]:
    """Versions that fill and return ``results``; runs that are None are left out."""

    def returning(run: Callable[[], None]) -> Run:
        def call() -> Tensors:
            run()
            return results

        return call

    return {name: returning(run) for name, run in runs.items() if run is not None}


def gradients(make_output: Callable[[], torch.Tensor], inputs: Tensors, dout: torch.Tensor) -> Run:
    """A run of torch's backward pass; the first call also runs the forward pass."""
    output: list[torch.Tensor] = []

    def run() -> Tensors:
        if not output:
            output.append(make_output())
        return torch.autograd.grad(output[0], inputs, dout, retain_graph=True)

    return run


def validate(case: KernelCase, expected: Tensors) -> float:
    """The largest relative difference (2-norm) between our versions and ``expected``.

    Raises:
        AssertionError: a difference exceeds ALLOWED_DIFFERENCE.
    """
    worst = 0.0
    for version, run in case.method.versions.items():
        if case.method.restore:
            case.method.restore()
        else:
            for tensor in run():
                tensor.fill_(float("nan"))  # all versions write to the same tensors
        for ours, theirs in zip(run(), expected, strict=True):
            difference = (ours.double() - theirs.double()).norm() / theirs.double().norm()
            if not difference <= ALLOWED_DIFFERENCE:
                raise AssertionError(f"{label(case)}, {version}: off by {difference:.2e}")
            worst = max(worst, float(difference))
    return worst


def measure(
    case: KernelCase, timer: Any, limits: dict[str, float]
) -> tuple[list[dict[str, Any]], list[str]]:
    """Validates and times the case.

    Args:
        limits: bytes and operations per second, by unit.

    Returns:
        A row for each of our versions and for each baseline, and notes on baselines that failed.

    Raises:
        AssertionError: one of our versions and a baseline disagree.
    """
    ours = case.baselines[: len(case.method.versions)]
    difference: float | None = None
    theirs, notes = {}, []
    for baseline in case.baselines[len(ours) :]:
        try:
            expected = baseline.function()
        except Exception as error:  # this GPU or this torch may not support the baseline
            reason = str(error).splitlines()[0][:200]
            notes.append(f"{label(case)}, {baseline.name}: {reason}")
            continue
        difference = max(validate(case, expected), difference or 0.0)
        del expected
        theirs[baseline.name] = timer.times(baseline.function)
    times = {each.name: timer.times(each.function) for each in ours}
    (pass_name,) = case.passes
    work = case.work[pass_name]
    seconds = work.bytes(ELEMENT_SIZE[case.dtype]) / limits["GB/s"] + work.flops / limits["TFLOP/s"]
    rows = [
        {
            **case.row(
                *(pass_name, name, summarize([1e3 * each for each in samples])),
                limit=1e3 * seconds,
                error=difference,
            ),
            "yardstick": case.yardstick if name in times else None,
        }
        for name, samples in {**times, **theirs}.items()
    ]
    return rows, notes


def set_against_yardsticks(rows: Sequence[dict[str, Any]]) -> None:
    """Adds "of_yardstick", the rate as a share of that of the yardstick, if both were measured."""

    def rate(row: dict[str, Any]) -> float:
        return (row["bytes"] or row["flops"]) / row["median"]

    def place(row: dict[str, Any], shape: str) -> tuple[str, ...]:
        return row["op"], row["pass"], row["dtype"], row["baseline"], shape

    rates = {place(row, row["shape"]): rate(row) for row in rows}
    for row in rows:
        yardstick = row.pop("yardstick")
        if yardstick and place(row, yardstick) in rates:
            row["of_yardstick"] = rate(row) / rates[place(row, yardstick)]
