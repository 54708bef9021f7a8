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
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import benchmark
import checks
import hopper_cases
import kernel_cases
import numpy as np
import timing
import torch
import triton_kernels

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "gpu-check"


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


def build() -> Path:
    """Compiles pypkg._native with CUDA; returns the module's path."""
    for tool in ("nvcc", "cmake", "ninja"):
        if shutil.which(tool) is None:
            sys.exit(f"{tool} is not on PATH; the build needs it")
    package = BUILD / "pypkg"
    options = [
        *("-G", "Ninja", f"-DPYPKG_OUTPUT_DIR={package}", f"-DPython_EXECUTABLE={sys.executable}"),
        *("-DPYPKG_WITH_CUDA=ON", "-DPYPKG_BUILD_PADDLE_OPS=OFF", "-DCMAKE_BUILD_TYPE=Release"),
    ]
    for command in (
        ["cmake", "-S", str(ROOT), "-B", str(BUILD), *options],
        ["cmake", "--build", str(BUILD)],
    ):
        result = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        if result.returncode != 0:
            sys.exit(f"{' '.join(command)} failed:\n{result.stdout[-8000:]}")
    return next(package.glob("_native*.so"))


def load_kernels(device: str) -> Any:
    if device == "cuda":
        path = build()
    else:
        path = next((ROOT / "pypkg").glob("_native*.so"), None)
        if path is None:
            sys.exit("pypkg is not built here: run `make install` first")
    spec = importlib.util.spec_from_file_location("_native", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def machine(device: str, kernels: Any) -> dict[str, Any]:
    facts = {"python": platform.python_version(), "torch": torch.__version__}
    has_triton = triton_kernels.installed()
    facts["triton"] = importlib.metadata.version("triton") if has_triton else "not installed"
    facts["kernels"] = kernels.build_info()
    if device == "cuda":
        facts |= {
            "gpu": torch.cuda.get_device_name(),
            "torch_cuda": torch.version.cuda,
            "driver": _output(
                ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            ),
            "nvcc": _output(["nvcc", "--version"]).splitlines()[-1],
        }
    return facts


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
    if benchmark.has_hopper_kernels(device):
        hopper = hopper_cases.small_cases() + hopper_cases.large_cases()
        rows += run_checks(TorchBackend(kernels, device), hopper, "hopper")
    if triton is not None:
        cases = [case for case in cases if case.operation not in kernel_cases.WITHOUT_TRITON]
        rows += run_checks(TorchBackend(triton, device), cases, "triton")
    return rows


def run_benchmarks(
    kernels: Any, triton: Any | None, device: str, use_compile: bool, deadline: float
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    timer = timing.CudaTimer() if device == "cuda" else timing.CpuTimer()
    limits = {
        "GB/s": timing.copy_bandwidth(timer, device),
        "TFLOP/s": timing.matmul_rate(timer, device),
    }
    rows = []
    for case in benchmark.cases(kernels, triton, device, use_compile):
        if time.monotonic() > deadline:
            rows.append({"name": case.name, "shape": case.shape, "skipped": "out of time"})
            continue
        try:
            rows.append(benchmark.measure(case, timer, limits))
        except AssertionError as error:
            rows.append({"name": case.name, "shape": case.shape, "failed": str(error)})
    return limits, rows


def print_table(limits: dict[str, float], rows: list[dict[str, Any]]) -> None:
    print(
        f"copy {limits['GB/s'] / 1e9:.0f} GB/s, bf16 matmul {limits['TFLOP/s'] / 1e12:.1f} TFLOP/s"
    )
    print(f"{'operation':20}{'shape':28}{'us':>10}{'Triton us':>11}{'peer us':>10} {'best peer':18}"
          f"{'ratio':>6}{'rate':>9} {'unit':8}{'share':>6}")  # fmt: skip
    for row in rows:
        start = f"{row['name']:20}{row['shape']:28}"
        if "ours_us" not in row:
            print(start + (row.get("failed") or row["skipped"]))
            continue
        peer_us = f"{row['peer_us']:10.1f}" if row["peer"] else f"{'-':>10}"
        triton_us = f"{row['triton_us']:11.1f}" if row["triton_us"] else f"{'-':>11}"
        ratio = f"{row['speedup']:6.2f}" if row["peer"] else f"{'-':>6}"
        print(
            f"{start}{row['ours_us']:10.1f}{triton_us}{peer_us} {row['peer'] or '-':18}{ratio}"
            f"{row['rate']:9.1f} {row['unit']:8}{row['share_of_limit']:6.0%}"
        )


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--output", type=Path, default=BUILD / "gpu_check.json")
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
        limits, rows = run_benchmarks(kernels, triton, args.device, use_compile, deadline)
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
