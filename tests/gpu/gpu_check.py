"""Builds the kernels on a machine with a GPU, checks them against float64 and times them.

Needs a GPU, nvcc, CMake, Ninja and a Python with torch, NumPy and pybind11; no Paddle. The Triton
versions are checked and timed beside them where Triton is installed. Writes everything to a JSON
file, prints a table last and exits with 1 if a check failed. `--device cpu` tries the script out on
the CPU kernels that are installed already, and interprets Triton.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import benchmark
import benchmark_attention
import benchmark_case
import checks
import hopper_cases
import kernel_cases
import numpy as np
import timing
import torch
import triton_kernels
from kernel_build import BUILD, ROOT, build, load_kernels, load_module
from variants import Variant, VariantError


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


def machine(device: str, kernels: Any) -> dict[str, Any]:
    facts = {
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "commit": _output(["git", "-C", str(ROOT), "rev-parse", "HEAD"]),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    has_triton = triton_kernels.installed()
    facts["triton"] = importlib.metadata.version("triton") if has_triton else "not installed"
    facts["kernels"] = kernels.build_info()
    if device == "cuda":
        facts |= {
            "gpu": torch.cuda.get_device_name(),
            "torch_cuda": torch.version.cuda,
            "driver": _nvidia_smi("driver_version"),
            "clocks": _nvidia_smi("clocks.sm,clocks.mem,clocks.max.sm,power.limit"),
            "nvcc": _output(["nvcc", "--version"]).splitlines()[-1],
        }
    return facts


def _nvidia_smi(fields: str) -> str:
    return _output(["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"])


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"
    except FileNotFoundError:
        return "unknown"


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
    if benchmark_attention.has_hopper_kernels(device):
        hopper = hopper_cases.small_cases() + hopper_cases.large_cases()
        rows += run_checks(TorchBackend(kernels, device), hopper, "hopper")
    if triton is not None:
        cases = [case for case in cases if case.operation not in kernel_cases.WITHOUT_TRITON]
        rows += run_checks(TorchBackend(triton, device), cases, "triton")
    return rows


def run_benchmarks(
    mk: benchmark_case.Maker, suites: list[str], deadline: float
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    timer = timing.CudaTimer() if mk.device == "cuda" else timing.CpuTimer()
    limits = {
        "GB/s": timing.copy_bandwidth(timer, mk.device),
        "TFLOP/s": timing.matmul_rate(timer, mk.device),
    }
    rows: list[dict[str, Any]] = []
    for case in benchmark.cases(mk, suites):
        if time.monotonic() > deadline:
            rows.append({"name": case.name, "shape": case.shape, "skipped": "out of time"})
            continue
        try:
            rows += benchmark_case.measure(case, timer, limits)
        except Exception as error:  # wrong results; of a variant, also what it cannot do
            failure = f"{type(error).__name__}: {error}"
            rows.append({"name": case.name, "shape": case.shape, "failed": failure})
    set_against_yardsticks(rows)
    return limits, rows


def set_against_yardsticks(rows: list[dict[str, Any]]) -> None:
    """Adds "of_yardstick" to rows that have a yardstick which was measured."""
    rates = {(row["name"], row.get("version"), row["shape"]): row.get("rate") for row in rows}
    for row in rows:
        if row.get("yardstick"):
            rate = rates.get((row["name"], row["version"], row["yardstick"]))
            row["of_yardstick"] = row["rate"] / rate if rate else None


def print_table(limits: dict[str, float], rows: list[dict[str, Any]]) -> None:
    print(
        f"copy {limits['GB/s'] / 1e9:.0f} GB/s, bf16 matmul {limits['TFLOP/s'] / 1e12:.1f} TFLOP/s"
    )
    print(f"{'operation':22}{'shape':32}{'version':>8}{'us':>10}{'peer us':>10} {'best peer':16}"
          f"{'ratio':>6}{'rate':>8} {'unit':8}{'share':>6}{'of causal':>10}")  # fmt: skip
    for row in rows:
        start = f"{row['name']:22}{row['shape']:32}"
        if "ours_us" not in row:
            print(start + (row.get("failed") or row["skipped"]))
            continue
        peer = f"{row['peers_us'][row['peer']]:10.1f} {row['peer']:16}" if row["peer"] else " " * 27
        ratio = f"{row['speedup']:6.2f}" if row["peer"] else " " * 6
        of_yardstick = f"{row['of_yardstick']:10.0%}" if row.get("of_yardstick") else ""
        print(
            f"{start}{row['version']:>8}{row['ours_us']:10.1f}{peer}{ratio}"
            f"{row['rate']:8.1f} {row['unit']:8}{row['share_of_limit']:6.0%}{of_yardstick}"
        )


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--output", type=Path, default=BUILD / time.strftime("gpu_check-%Y-%m-%d-%H%M%S.json")
    )
    parser.add_argument("--suite", action="append", choices=benchmark.SUITES, help="only this")
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
    parser.add_argument("--budget", type=float, default=450, help="seconds, build included")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    started = time.monotonic()
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("no GPU is visible to torch; --device cpu tries the script out without one")
    kernels = load_kernels(args.device)
    facts = machine(args.device, kernels)
    print(json.dumps(facts))
    print(f"kernels ready after {time.monotonic() - started:.0f} s", flush=True)

    triton = None
    if triton_kernels.installed() and not args.no_triton:
        triton = triton_kernels.load(interpret=args.device == "cpu")
    results = [] if args.no_checks else check_everything(kernels, triton, args.device)
    failed = [row for row in results if not row["passed"]]
    print(f"{len(results) - len(failed)} of {len(results)} checks passed, "
          f"{time.monotonic() - started:.0f} s", flush=True)  # fmt: skip
    report = {"machine": facts, "checks": results}
    if not args.no_benchmark and not failed:
        use_compile = args.device == "cuda" and not args.no_compile
        deadline = started + args.budget
        variants = load_variants(args.variant)
        maker = benchmark_case.Maker(kernels, triton, args.device, use_compile, variants)
        limits, rows = run_benchmarks(maker, args.suite or list(benchmark.SUITES), deadline)
        report |= {"limits": limits, "benchmarks": rows}
        failed += [row for row in rows if "failed" in row]
        print_table(limits, rows)
    report["seconds"] = time.monotonic() - started
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(report, indent=1))
    print(f"{'FAILED' if failed else 'passed'}; {report['seconds']:.0f} s; {args.output}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
