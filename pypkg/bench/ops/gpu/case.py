"""What a benchmark case is made of, and how it is validated and timed.

A case holds its inputs, the versions of our kernel, the baselines that compute the same function,
and the work of one run. Every version is validated at the timed shape before it is timed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from pypkg.bench.ops.case import OURS, result_row
from pypkg.bench.ops.work import ELEMENT_SIZE, Work
from pypkg.bench.timing import summarize

# Both sides round to 16 bits, ours and the baseline, at different places.
ALLOWED_DIFFERENCE = 2e-2

Tensors = tuple[torch.Tensor, ...]
Run = Callable[[], Tensors]


@dataclass
class BenchmarkCase:
    """
    Attributes:
        pass_name: "forward", "backward", "forward+backward" or "step".
        versions: of ours, by name; each fills the tensors that it returns.
        baselines: by name; each returns tensors equal to those.
        work: of one run.
        yardstick: the shape of an earlier case of this operator and pass, relative to whose
            rate that of this case is reported.
        restore: where ours updates in place: brings back what it was given at first.
    """

    op: str
    pass_name: str
    shape: str
    versions: dict[str, Run]
    baselines: dict[str, Run]
    work: Work
    dtype: str = "bfloat16"
    yardstick: str | None = None
    restore: Callable[[], None] | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        return self.work.bytes(ELEMENT_SIZE[self.dtype])

    def __str__(self) -> str:
        return f"{self.op} {self.pass_name} {self.shape}"


def address(tensor: torch.Tensor) -> tuple[int, tuple[int, ...], str, str]:
    """A contiguous tensor as a kernel argument that costs little host time."""
    assert tensor.is_contiguous()
    dtype = str(tensor.dtype).removeprefix("torch.")
    return tensor.data_ptr(), tuple(tensor.shape), dtype, tensor.device.type


def _liger() -> Any | None:
    """Liger's functions, where it is installed."""
    if importlib.util.find_spec("liger_kernel") is None:
        return None
    from liger_kernel.transformers import functional

    return functional


class Maker:
    """Tensors on the device, and calls of kernels with them."""

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
            kernels, triton: modules with the compiled kernels, and with Triton's.
            use_compile: functions of torch are timed compiled, too.
            variants: modules like ``kernels``, by name.
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
        """As large as any version says that it needs."""
        addresses = [address(x) for x in tensors]
        floats = max(getattr(module, name)(*addresses) for module in self._modules.values())
        return self.empty(floats, dtype=torch.float32)

    def call(self, name: str, *arguments: Any, **settings: Any) -> Callable[[], None]:
        """Of a compiled kernel."""
        return self.calls(name, *arguments, **settings)[""]

    def calls(self, name: str, *arguments: Any, **settings: Any) -> dict[str, Callable[[], None]]:
        """Of a compiled kernel, "", and of its variants."""
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
        """None without Triton."""
        if self.triton is None:
            return None
        kernel = getattr(self.triton, name)
        return lambda: kernel(*arguments, **settings)

    def versions(
        self, results: Tensors, name: str, *arguments: Any, **settings: Any
    ) -> dict[str, Run]:
        """The compiled kernels and Triton's, which take the same arguments and fill ``results``."""
        compiled = self.calls(name, *arguments, **settings)
        triton = self.call_triton(name, *arguments, **settings)
        return filling(results, {**named("CUDA", compiled), "Triton": triton})


def named(kernel: str, calls: dict[str, Callable[[], None]]) -> dict[str, Callable[[], None]]:
    """``calls``, by variant, under the name of their kernel."""
    return {f"{kernel} {variant}".strip(): call for variant, call in calls.items()}


def filling(results: Tensors, runs: Mapping[str, Callable[[], None] | None]) -> dict[str, Run]:
    """Versions that fill ``results``; None is one that there is not."""

    def returning(run: Callable[[], None]) -> Run:
        def call() -> Tensors:
            run()
            return results

        return call

    return {name: returning(run) for name, run in runs.items() if run is not None}


def gradients(make_output: Callable[[], torch.Tensor], inputs: Tensors, dout: torch.Tensor) -> Run:
    """Runs torch's backward alone, but for the first call."""
    output: list[torch.Tensor] = []

    def run() -> Tensors:
        if not output:
            output.append(make_output())
        return torch.autograd.grad(output[0], inputs, dout, retain_graph=True)

    return run


def validate(case: BenchmarkCase, expected: Tensors) -> float:
    """Largest relative difference (2-norm) between a version of ours and a baseline's tensors."""
    worst = 0.0
    for version, run in case.versions.items():
        if case.restore:
            case.restore()
        else:
            for tensor in run():
                tensor.fill_(float("nan"))  # all versions write to the same tensors
        for ours, theirs in zip(run(), expected, strict=True):
            difference = (ours.double() - theirs.double()).norm() / theirs.double().norm()
            if not difference <= ALLOWED_DIFFERENCE:
                where = f"{case}, {version}"
                raise AssertionError(f"{where}: off by {difference:.2e}")
            worst = max(worst, float(difference))
    return worst


def measure(case: BenchmarkCase, timer: Any, limits: dict[str, float]) -> list[dict[str, Any]]:
    """A row for each version and each baseline, in the form of ``python -m pypkg.bench ops``.

    The first version goes by the name of ours there.

    Raises:
        AssertionError: a version and a baseline disagree.
    """
    times, difference = {}, None
    for name, run in case.baselines.items():
        try:
            expected = run()
        except Exception as error:  # a baseline may be missing on this GPU or in this torch
            case.notes.append(f"{case}, {name}: {str(error).splitlines()[0][:200]}")
            continue
        difference = max(validate(case, expected), difference or 0.0)
        del expected
        times[name] = timer.times(run)
    seconds_at_limit = case.bytes / limits["GB/s"] + case.work.flops / limits["TFLOP/s"]
    first = next(iter(case.versions))
    ours = {
        OURS if version == first else f"{OURS}, {version}": timer.times(run)
        for version, run in case.versions.items()
    }
    return [
        {
            **result_row(
                *(case.op, case.shape, case.dtype, case.pass_name, name),
                summarize([1e3 * each for each in seconds]),
                work=case.work,
                limit=1e3 * seconds_at_limit,
                error=difference,
            ),
            "yardstick": case.yardstick if name in ours else None,
        }
        for name, seconds in {**ours, **times}.items()
    ]


def set_against_yardsticks(rows: Sequence[dict[str, Any]]) -> None:
    """Adds "of_yardstick", the rate as a share of the yardstick's, where that was measured."""

    def rate(row: dict[str, Any]) -> float:
        return (row["bytes"] or row["flops"]) / row["median"]

    def place(row: dict[str, Any], shape: str) -> tuple[str, ...]:
        return row["op"], row["pass"], row["dtype"], row["baseline"], shape

    rates = {place(row, row["shape"]): rate(row) for row in rows}
    for row in rows:
        yardstick = row.pop("yardstick")
        if yardstick and place(row, yardstick) in rates:
            row["of_yardstick"] = rate(row) / rates[place(row, yardstick)]
