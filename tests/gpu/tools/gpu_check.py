"""Builds the kernels on a machine with a GPU, checks them against float64 and times them.

Needs a GPU, nvcc, CMake, Ninja and a Python with torch, NumPy and pybind11; no Paddle. The Triton
versions are checked and timed beside them where Triton is installed. Writes everything to a JSON
file, prints a table last and exits with 1 if a check failed. `--device cpu` tries the script out on
the CPU kernels that are installed already, and interprets Triton. Where another Python has
paddlepaddle-gpu, its flash attention is timed too.

On a GPU whose checks have all passed it also writes the timings of attention to the record that
`attention_backend: auto` reads (pypkg/device/attention_record.py).

The file is a result for the page of benchmarks: put it into docs/benchmarks/, named after the GPU,
and run `python -m pypkg.bench report`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import paddle_python
import torch
import triton_kernels
from kernel_build import BUILD, build, load_kernels, load_module
from variants import Variant, VariantError

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # nothing is installed on a GPU
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "cases"))
import checks
import hopper_cases
import kernel_cases

from pypkg.bench.ops.case import OURS
from pypkg.bench.ops.gpu import suites, timers
from pypkg.bench.ops.gpu.attention import has_hopper_kernels
from pypkg.bench.ops.gpu.case import Maker, label, measure, set_against_yardsticks
from pypkg.bench.ops.gpu.result import gpu_facts, ops_result
from pypkg.device.attention_record import PADDLE, timings_of, write_timings
from pypkg.files.build_info import digest


class TorchBackend:
    """Checks on torch tensors."""

    def __init__(self, kernels: Any, device: str):
        self.kernels, self.device = kernels, device
        self.stream = torch.cuda.current_stream().cuda_stream if device == "cuda" else 0

    def array(self, values: np.ndarray, dtype: str, misaligned: bool = False) -> torch.Tensor:
        tensor = self._empty(values.shape, dtype, misaligned)
        return tensor.copy_(torch.from_numpy(np.ascontiguousarray(values)))

    def poisoned(
        self, shape: tuple[int, ...], dtype: str, misaligned: bool = False
    ) -> torch.Tensor:
        return self._empty(shape, dtype, misaligned).fill_(float("nan"))

    def columns(self, array: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        return array[:, start:stop]

    def numpy(self, array: torch.Tensor) -> np.ndarray:
        return array.to(torch.float64 if array.is_floating_point() else torch.int64).cpu().numpy()

    def _empty(self, shape: tuple[int, ...], dtype: str, misaligned: bool) -> torch.Tensor:
        count = int(np.prod(shape))
        storage = torch.empty(count + 1, dtype=getattr(torch, dtype), device=self.device)
        return storage[int(misaligned) :][:count].view(shape)


def load_variants(texts: list[str]) -> dict[str, Any]:
    modules = {}
    for number, text in enumerate(texts):
        folder = BUILD / "variants" / str(number)
        try:
            variant = Variant.parse(text)
            variant.write_sources(folder / "source")
        except VariantError as error:
            sys.exit(f"error: {error}")
        modules[str(variant)] = load_module(build(folder / "source", folder / "build"))
    return modules


def run_checks(
    backend: TorchBackend, cases: list[checks.Case], version: str
) -> list[dict[str, Any]]:
    """Every case is run, also after a failure."""
    rows = []
    for case in cases:
        row: dict[str, Any] = {"case": str(case), "version": version, "passed": True}
        try:
            row["error_over_tolerance"] = checks.check(case, backend)
        except Exception as error:
            row |= {"passed": False, "message": f"{type(error).__name__}: {error}"}
            print(f"FAILED {case} ({version}): {row['message']}", flush=True)
        rows.append(row)
    return rows


def check_everything(kernels: Any, triton: Any | None, device: str) -> list[dict[str, Any]]:
    cases = kernel_cases.small_cases() + kernel_cases.large_cases()
    if device == "cpu":
        cases = [case for case in kernel_cases.small_cases() if case.dtype in checks.CPU_DTYPES]
    rows = run_checks(TorchBackend(kernels, device), cases, "compiled")
    if has_hopper_kernels(device):
        hopper = hopper_cases.small_cases() + hopper_cases.large_cases()
        rows += run_checks(TorchBackend(kernels, device), hopper, "hopper")
    if triton is not None:
        cases = [case for case in cases if case.operation not in kernel_cases.WITHOUT_TRITON]
        rows += run_checks(TorchBackend(triton, device), cases, "triton")
    return rows


@dataclass
class Benchmarks:
    """
    Attributes:
        limits: operations or bytes per second, by unit.
        products: rates of matrix products by shape.
        rows: of ``measure``.
        failed: cases that computed something else, or that a variant could not do.
        notes: on baselines and cases that were left out.
    """

    limits: dict[str, float]
    products: list[dict[str, float]]
    rows: list[dict[str, Any]] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def run_benchmarks(mk: Maker, names: list[str], deadline: float) -> Benchmarks:
    timer = timers.CudaTimer() if mk.device == "cuda" else timers.CpuTimer()
    limits = {
        "GB/s": timers.copy_bandwidth(timer, mk.device),
        "TFLOP/s": timers.matmul_rate(timer, mk.device),
    }
    found = Benchmarks(limits, timers.product_rates(timer, mk.device))
    for case in suites.cases(mk, names):
        if time.monotonic() > deadline:
            found.notes.append(f"out of time for {label(case)}")
            continue
        try:
            rows, notes = measure(case, timer, limits)
        except Exception as error:
            found.failed.append(f"{label(case)}: {type(error).__name__}: {error}")
            continue
        found.rows += rows
        found.notes += notes
    set_against_yardsticks(found.rows)
    return found


def time_paddle_attention(python: Path, device: str, found: Benchmarks) -> None:
    """Adds rows of Paddle's flash attention, which ``auto`` takes where ours is not faster."""
    obstacle = None if device == "cpu" else paddle_python.obstacle(python)
    try:
        if obstacle is None:
            kind = "gpu" if device == "cuda" else "cpu"
            found.rows += paddle_python.attention_rows(python, found.rows, OURS, PADDLE, kind)
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        obstacle = str(error)
    if obstacle:
        found.notes.append(f"{PADDLE} is not compared with: {obstacle}")


def record_attention(device: str, rows: list[dict[str, Any]]) -> None:
    """Writes what ``attention_backend: auto`` reads; on a CPU it says what it would write."""
    timings = timings_of(rows, OURS)
    if device == "cuda" and timings:
        sources = digest(Path(__file__).resolve().parents[3] / "csrc")
        gpu, today = torch.cuda.get_device_name(), time.strftime("%Y-%m-%d")
        print(f"attention of {gpu} recorded in {write_timings(gpu, sources, today, timings)}")
        return
    print(
        f"attention is not recorded: {'no GPU' if timings else 'no shape was timed beside torch'}"
    )


def print_table(found: Benchmarks) -> None:
    """A line for each version of ours, beside the fastest baseline."""
    rates = [found.limits["GB/s"] / 1e9, found.limits["TFLOP/s"] / 1e12]
    print("copy {:.0f} GB/s, bf16 matmul {:.1f} TFLOP/s".format(*rates))
    print(f"{'operator':18}{'pass':17}{'shape':32}{'version':22}{'us':>10}{'best us':>10} "
          f"{'best baseline':16}{'ratio':>6}{'limit':>6}{'causal':>7}")  # fmt: skip
    cases: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in found.rows:
        key = row["op"], row["pass"], row["shape"], row["dtype"]
        cases.setdefault(key, []).append(row)
    for (op, pass_name, shape, _), rows in cases.items():
        versions = [row for row in rows if row["baseline"].startswith(OURS)]
        baselines = [row for row in rows if row not in versions]
        best = min(baselines, key=lambda row: row["median"], default=None)
        for row in versions:
            other = f"{1e3 * best['median']:10.1f} {best['baseline']:16}" if best else " " * 27
            ratio = f"{best['median'] / row['median']:6.2f}" if best else " " * 6
            causal = f"{row['of_yardstick']:7.0%}" if "of_yardstick" in row else ""
            print(
                f"{op:18}{pass_name:17}{shape:32}{row['baseline']:22}{1e3 * row['median']:10.1f}"
                f"{other}{ratio}{row['limit'] / row['median']:6.0%}{causal}"
            )
    for line in (*found.notes, *(f"FAILED {each}" for each in found.failed)):
        print(line)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--output", type=Path, default=BUILD / time.strftime("gpu_check-%Y-%m-%d-%H%M%S.json")
    )
    parser.add_argument("--suite", action="append", choices=suites.SUITES, help="only this")
    parser.add_argument(
        "--variant",
        action="append",
        default=[],
        metavar="FILE:CONSTANT=VALUE",
        help="time the kernels compiled with another constant as well, as in rms_norm.cu:"
        "kMaxThreads=256; may be repeated",
    )
    parser.add_argument("--no-checks", action="store_true", help="benchmark only")
    parser.add_argument("--no-benchmark", action="store_true", help="checks only")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--no-triton", action="store_true", help="leave the Triton versions out")
    parser.add_argument(
        "--paddle-python",
        type=Path,
        default=paddle_python.default_python(),
        help="the Python whose Paddle times its flash attention; left out if it sees no GPU",
    )
    parser.add_argument("--budget", type=float, default=500, help="seconds, build included")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    started = time.monotonic()
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("no GPU is visible to torch; --device cpu tries the script out without one")
    kernels = load_kernels(args.device)
    facts = gpu_facts() if args.device == "cuda" else {}
    print(json.dumps(facts | kernels.build_info()))
    print(f"kernels ready after {time.monotonic() - started:.0f} s", flush=True)

    triton = None
    if triton_kernels.installed() and not args.no_triton:
        triton = triton_kernels.load(interpret=args.device == "cpu")
    results = [] if args.no_checks else check_everything(kernels, triton, args.device)
    failed = [row for row in results if not row["passed"]]
    print(f"{len(results) - len(failed)} of {len(results)} checks passed, "
          f"{time.monotonic() - started:.0f} s", flush=True)  # fmt: skip
    report: dict[str, Any] = {"checks": results}
    if not args.no_benchmark and not failed:
        use_compile = args.device == "cuda" and not args.no_compile
        variants = load_variants(args.variant)
        maker = Maker(kernels, triton, args.device, use_compile, variants)
        names = args.suite or list(suites.SUITES)
        found = run_benchmarks(maker, names, started + args.budget)
        time_paddle_attention(args.paddle_python, args.device, found)
        failed += found.failed
        if not (failed or args.no_checks):
            record_attention(args.device, found.rows)
        print_table(found)
        given = sys.argv[1:] if argv is None else argv
        result = ops_result(
            given, found.limits, found.products, found.rows, found.notes, args.device
        )
        report |= result
    report["seconds"] = time.monotonic() - started
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(report, indent=1))
    print(f"{'FAILED' if failed else 'passed'}; {report['seconds']:.0f} s; {args.output}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
