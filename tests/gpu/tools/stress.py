"""Runs every CUDA kernel at random sizes and settings, many times over.

Each run is compared with float64 as in ``gpu_check.py`` and then repeated: all results have to be
the same bit for bit, for no kernel leaves the order of a sum to chance. Arrays lie between margins
of a known pattern, which must be there afterwards, and outputs and workspaces hold NaN before. The
kernels take turns until each has run ``--count`` times or the time is up; a table comes last, and a
failure names the options that repeat it. ``--device cpu`` does the same with the CPU kernels.
"""

from __future__ import annotations

import argparse
import secrets
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import gpu_check
import kernel_build
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "cases"))
import checks
from random_cases import DRAWS

MARGIN = 256  # bytes on either side of an array; a multiple of 16, which alignment counts in
PATTERN = 0x5A
ELEMENTS, FEW_ELEMENTS = 2**22, 2**12


class GuardedBackend(gpu_check.TorchBackend):
    """Arrays between margins, all of which ``check_margins`` looks at."""

    def __init__(self, kernels: object, device: str):
        super().__init__(kernels, device)
        self._storages: list[tuple[torch.Tensor, int, int]] = []

    def check_margins(self) -> None:
        """Raises AssertionError if a kernel wrote beside an array; forgets the arrays."""
        storages, self._storages = self._storages, []
        for storage, start, stop in storages:
            if not bool((storage[:start] == PATTERN).all() & (storage[stop:] == PATTERN).all()):
                raise AssertionError(f"written beside an array of {stop - start} bytes")

    def _empty(self, shape: tuple[int, ...], dtype: str, misaligned: bool) -> torch.Tensor:
        element = getattr(torch, dtype).itemsize
        start = MARGIN + element * int(misaligned)
        stop = start + element * int(np.prod(shape))
        end = -(-stop // 16) * 16 + MARGIN
        storage = torch.full((end,), PATTERN, dtype=torch.uint8, device=self.device)
        self._storages.append((storage, start, stop))
        return storage[start:stop].view(getattr(torch, dtype)).view(shape)


class BareBackend(gpu_check.TorchBackend):
    """Every array an allocation of exactly its size, outputs as the allocator gives them: what
    compute-sanitizer needs to see every access beside an array and every read of nothing."""

    def poisoned(
        self, shape: tuple[int, ...], dtype: str, misaligned: bool = False
    ) -> torch.Tensor:
        return self._empty(shape, dtype, misaligned)

    def check_margins(self) -> None:
        """There are none."""

    def _empty(self, shape: tuple[int, ...], dtype: str, misaligned: bool) -> torch.Tensor:
        count, first = int(np.prod(shape)), int(misaligned)
        storage = torch.empty(count + first, dtype=getattr(torch, dtype), device=self.device)
        return storage[first:].view(shape)


@dataclass
class Tally:
    """What became of the runs of one operation."""

    runs: int = 0
    failures: int = 0
    comparisons: int = 0
    worst: float = 0.0  # error over tolerance
    worst_case: str = "-"
    seconds: float = 0.0


def draw(operation: str, seed: int, device: str, elements: int) -> checks.Case:
    """The case that a seed stands for."""
    rng = np.random.default_rng([seed, *operation.encode()])
    dtypes = checks.CPU_DTYPES if device == "cpu" else checks.DTYPES
    return DRAWS[operation](rng, str(rng.choice(dtypes)), elements)


def run_twice(
    case: checks.Case, backend: GuardedBackend | BareBackend, seed: int
) -> tuple[int, float]:
    """Runs a case twice; returns the number of comparisons and the largest error over tolerance.

    Raises:
        AssertionError: a result is wrong, differs between the runs, or lies beside its array.
    """
    first = list(case.run(backend, np.random.default_rng(seed)))
    backend.check_margins()
    worst = 0.0
    for comparison in first:
        error = comparison.error()
        if not error <= comparison.tolerance:
            raise AssertionError(
                f"{comparison.what} is off by {error:.2e}, allowed {comparison.tolerance:.2e}"
            )
        worst = max(worst, error / comparison.tolerance if error else 0.0)
    second = list(case.run(backend, np.random.default_rng(seed)))
    backend.check_margins()
    for one, other in zip(first, second, strict=True):
        if one.actual.tobytes() != other.actual.tobytes():
            count = int((one.actual != other.actual).sum())
            raise AssertionError(f"{one.what} differs between two runs, in {count} elements")
    return len(first), worst


def stress(
    backend: GuardedBackend | BareBackend,
    operations: list[str],
    seeds: range,
    elements: int,
    deadline: float,
) -> dict[str, Tally]:
    """Every operation with every seed, in turns, until ``deadline`` by time.monotonic."""
    tallies = {operation: Tally() for operation in operations}
    for seed in seeds:
        for operation, tally in tallies.items():
            if time.monotonic() > deadline:
                return tallies
            case = draw(operation, seed, backend.device, elements)
            started = time.monotonic()
            tally.runs += 1
            try:
                comparisons, worst = run_twice(case, backend, seed)
                tally.comparisons += comparisons
                if worst > tally.worst:
                    tally.worst, tally.worst_case = worst, str(case)
            except Exception as error:
                tally.failures += 1
                few = " --few-elements" if elements == FEW_ELEMENTS else ""
                print(
                    f"FAILED {case}: {type(error).__name__}: {error}\n"
                    f"  repeat with: --device {backend.device} --operation {operation} "
                    f"--seed {seed} --count 1{few}",
                    flush=True,
                )
            tally.seconds += time.monotonic() - started
    return tallies


def print_table(tallies: dict[str, Tally], count: int) -> None:
    print(f"{'operation':20}{'runs':>6}{'failed':>8}{'compared':>10}{'error/tol':>11}"
          f"{'seconds':>9}  worst case")  # fmt: skip
    for operation, tally in tallies.items():
        print(f"{operation:20}{tally.runs:6}{tally.failures:8}{tally.comparisons:10}"
              f"{tally.worst:11.3f}{tally.seconds:9.1f}  {tally.worst_case}")  # fmt: skip
    fewest = min(tally.runs for tally in tallies.values())
    if fewest < count:
        print(f"out of time: {fewest} of {count} rounds")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--count", type=int, default=200, help="runs of each operation")
    parser.add_argument("--seconds", type=float, default=900, help="no run begins after so long")
    parser.add_argument("--seed", type=int, help="of the first round, each later one adds 1")
    parser.add_argument("--operation", action="append", choices=sorted(DRAWS), help="repeatable")
    parser.add_argument("--few-elements", action="store_true", help=f"{FEW_ELEMENTS} at most")
    parser.add_argument(
        "--bare", action="store_true", help="no margins, no NaN: for compute-sanitizer"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Returns 1 if a run failed or an operation had none."""
    args = parse_arguments(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("no GPU is visible to torch; --device cpu runs the CPU kernels")
    seed = secrets.randbelow(10**9) if args.seed is None else args.seed
    print(f"seeds {seed} to {seed + args.count - 1}", flush=True)
    kernels = kernel_build.load_kernels(args.device)
    backend = (BareBackend if args.bare else GuardedBackend)(kernels, args.device)
    tallies = stress(
        backend,
        args.operation or list(DRAWS),
        range(seed, seed + args.count),
        FEW_ELEMENTS if args.few_elements else ELEMENTS,
        time.monotonic() + args.seconds,
    )
    print_table(tallies, args.count)
    passed = all(tally.runs and not tally.failures for tally in tallies.values())
    print("passed" if passed else "FAILED")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
