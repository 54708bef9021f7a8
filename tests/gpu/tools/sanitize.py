"""Runs every CUDA kernel under the four tools of compute-sanitizer, on few small random shapes.

memcheck finds accesses beside an array, racecheck hazards in shared memory, synccheck barriers that
not all threads reach, initcheck reads of memory that nobody wrote. Any report fails. The runs are
those of ``stress.py --bare``, with the same seed for each tool; what a tool said is kept beside the
build. Needs what ``gpu_check.py`` needs, and compute-sanitizer of the CUDA toolkit.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
LOGS = ROOT / "build" / "gpu-check"
STRESS = Path(__file__).resolve().parent / "stress.py"
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
# Each array is then an allocation of its own, of exactly its size.
ENVIRONMENT = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
ERROR_EXIT_CODE = 86
SUMMARY = re.compile(r"^=+ (?:ERROR|RACECHECK) SUMMARY: (\d+) (?:error|hazard)", re.M)


@dataclass(frozen=True)
class Outcome:
    tool: str
    return_code: int
    log: str
    seconds: float

    @property
    def reports(self) -> int | None:
        """How many the tool made; None without its summary."""
        counts = [int(count) for count in SUMMARY.findall(self.log)]
        return sum(counts) if counts else None

    @property
    def passed(self) -> bool:
        return self.return_code == 0 and self.reports == 0

    def verdict(self) -> str:
        if self.passed:
            return "passed"
        if self.reports is None:
            return f"FAILED: no summary, exit code {self.return_code}"
        if self.reports == 0:
            return f"FAILED: no report, but exit code {self.return_code}"
        return f"FAILED: {self.reports} reports"


def command(tool: str, count: int, seed: int) -> list[str]:
    """The command line of a tool's run."""
    options = ["--tool", tool, "--error-exitcode", str(ERROR_EXIT_CODE)]
    # The build is a child process, and the clock runs until the first use of the GPU.
    options += ["--target-processes", "application-only", "--launch-timeout", "600"]
    if tool != "initcheck":  # which has to see the kernels of torch write our inputs
        options += ["--kernel-name", "kernel_substring=pypkg"]
    run = [sys.executable, str(STRESS), "--bare", "--few-elements"]
    return ["compute-sanitizer", *options, *run, "--count", str(count), "--seed", str(seed)]


def run_tool(tool: str, count: int, seed: int) -> Outcome:
    started = time.monotonic()
    result = subprocess.run(
        command(tool, count, seed),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **ENVIRONMENT},
    )
    return Outcome(tool, result.returncode, result.stdout, time.monotonic() - started)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tool", action="append", choices=TOOLS, help="only this; repeatable")
    parser.add_argument("--count", type=int, default=8, help="runs of each operation")
    parser.add_argument("--seed", type=int, default=0, help="of the first run")
    parser.add_argument("--logs", type=Path, default=LOGS, help="folder of what the tools say")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Returns 1 if a tool reported something or did not come to its summary."""
    args = parse_arguments(argv)
    if shutil.which("compute-sanitizer") is None:
        sys.exit(
            "compute-sanitizer is not on PATH: install the part of the CUDA toolkit of that name "
            "(it lies beside nvcc), or add its folder to PATH"
        )
    args.logs.mkdir(parents=True, exist_ok=True)
    outcomes = []
    for tool in args.tool or TOOLS:
        outcome = run_tool(tool, args.count, args.seed)
        outcomes.append(outcome)
        (args.logs / f"sanitize-{tool}.log").write_text(outcome.log, encoding="utf-8")
        if not outcome.passed:
            print(outcome.log[-8000:], flush=True)
    print(f"{'tool':12}{'reports':>8}{'seconds':>9}")
    for each in outcomes:
        reports = "-" if each.reports is None else each.reports
        print(f"{each.tool:12}{reports:>8}{each.seconds:9.1f}  {each.verdict()}")
    print(f"logs: {args.logs}")
    return 0 if all(each.passed for each in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
