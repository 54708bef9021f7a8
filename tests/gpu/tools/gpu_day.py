"""Everything that a GPU is needed for, in one command: make gpu-day

Parts run one after another: build, checks against float64, random shapes, compute-sanitizer, the
same for the Hopper kernels, times with the record that `attention_backend: auto` reads, and the
layouts of the matrix where another Python has paddlepaddle-gpu. Each is a process that gets ten
minutes. The first part that fails ends the day, since what follows would rest on it. One dated JSON
file in docs/gpu_days keeps what the parts said and measured, and docs/gpu.md gets a line of it.
The times go into docs/benchmarks as well. ``--from PART`` goes on after a repair. ``--device cpu``
tries the command out without a GPU, and leaves docs as it is unless ``--docs`` names a folder.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import gpu_day_page
import paddle_python

TOOLS = Path(__file__).resolve().parent
ROOT = TOOLS.parents[2]
SECONDS = 600.0  # of a part
TAIL = 30  # lines of a failed part that are shown
SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")
SMOKE_ROWS = ("LLaMA2-70B", "BaiChuan-13B", "GPT3", "Bloom-176B", "ChatGLM-6B", "GLM-130B")
HOPPER = {"PYPKG_FLASH_ATTENTION": "hopper"}
PASSED, FAILED, LEFT_OUT = "passed", "failed", "left out"


@dataclass(frozen=True)
class Part:
    """
    Attributes:
        report: the JSON file that it writes, or None.
        environment: variables beside those of this process.
        left_out: why it does not run here, or None.
    """

    name: str
    command: tuple[str, ...]
    report: Path | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    left_out: str | None = None


@dataclass(frozen=True)
class Outcome:
    """
    Attributes:
        verdict: PASSED, FAILED or LEFT_OUT.
        said: the last line of its output, or why it failed or was left out.
        report: what the part wrote, or None.
    """

    name: str
    verdict: str
    said: str
    seconds: float = 0.0
    command: str = ""
    report: Any = None


def parts(device: str, folder: Path, python: Path) -> list[Part]:
    """The parts of a day, in their order.

    Args:
        device: "cuda", or "cpu" for a dry run on few small shapes.
        folder: of reports.
        python: may have paddlepaddle-gpu.
    """
    own, on_cpu = sys.executable, device == "cpu"
    no_gpu = "a dry run without a GPU" if on_cpu else None
    no_hopper = no_gpu or (None if compute_capability() == "9.0" else "for compute capability 9.0")
    no_paddle = no_gpu or paddle_python.obstacle(python)
    few = ("--device", "cpu", "--few-elements", "--count", "2") if on_cpu else ("--seconds", "540")

    def check(name: str, *options: str) -> Part:
        report = folder / f"{name}.json"
        given = ("--device", device, "--output", str(report), "--paddle-python", str(python))
        return Part(name, (own, str(TOOLS / "gpu_check.py"), *given, *options), report)

    def stress(name: str, environment: Mapping[str, str], left_out: str | None = None) -> Part:
        only = ("--operation", "flash_attention") if environment else ()
        command = (own, str(TOOLS / "stress.py"), *few, *only)
        return Part(name, command, None, environment, left_out)

    def sanitize(tool: str, name: str, environment: Mapping[str, str], why: str | None) -> Part:
        return Part(
            f"{tool}{name}",
            (own, str(TOOLS / "sanitize.py"), "--tool", tool, "--logs", str(folder)),
            None,
            environment,
            why,
        )

    brief = ("--no-triton", "--suite", "attention") if on_cpu else ()
    return [
        check("build", "--no-checks", "--no-benchmark"),
        check("check", "--no-benchmark", *brief),
        stress("stress", {}),
        *(sanitize(tool, "", {}, no_gpu) for tool in SANITIZERS),
        stress("stress, Hopper", HOPPER, no_hopper),
        *(sanitize(tool, ", Hopper", HOPPER, no_hopper) for tool in SANITIZERS),
        check("time", *brief),
        *(
            Part(
                f"smoke, {row}",
                (str(python), str(TOOLS / "gpu_smoke.py"), "--rows", row,
                 "--report", str(folder / f"smoke-{row}.json")),
                folder / f"smoke-{row}.json",
                {},
                no_paddle,
            )
            for row in SMOKE_ROWS
        ),
    ]  # fmt: skip


def run_part(part: Part, log: Path, seconds: float = SECONDS) -> Outcome:
    """Runs ``part`` with its output in ``log``; after ``seconds`` it ends, and its children."""
    if part.left_out:
        return Outcome(part.name, LEFT_OUT, part.left_out)
    if part.report is not None:
        part.report.unlink(missing_ok=True)
    started = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            part.command,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env={**os.environ, **part.environment},
            start_new_session=True,
        )
        try:
            code: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    said = lines[-1] if lines else "no output"
    if code is None:
        said = f"not done after {seconds:.0f} s: {said}"
    elif code:
        said = f"exit code {code}: {said}"
    report = None
    if part.report is not None and part.report.exists():
        report = json.loads(part.report.read_text(encoding="utf-8"))
    return Outcome(
        part.name,
        FAILED if code != 0 else PASSED,
        said,
        time.monotonic() - started,
        " ".join([*(f"{k}={v}" for k, v in part.environment.items()), *part.command]),
        report,
    )


def run_day(
    planned: Iterable[Part], folder: Path, seconds: float = SECONDS, start: str | None = None
) -> list[Outcome]:
    """The outcomes up to the first failure; ``start`` names the first part that is run."""
    outcomes: list[Outcome] = []
    for part in planned:
        if start not in (None, part.name):
            continue
        start = None
        log = folder / f"{re.sub('[^a-z0-9]+', '-', part.name.lower())}.log"
        outcome = run_part(part, log, seconds)
        outcomes.append(outcome)
        taken = f"{outcome.seconds:4.0f} s"
        print(f"{outcome.name:22}{outcome.verdict:9}{taken}  {outcome.said}", flush=True)
        if outcome.verdict == FAILED:
            print("\n".join(log.read_text(errors="replace").splitlines()[-TAIL:]))
            print(f"stopped at {part.name}; all of its output: {log}")
            break
    return outcomes


def compute_capability() -> str:
    return _output("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader").split("\n")[0]


def machine() -> dict[str, str]:
    """The GPU and the tools of this machine, "unknown" where a tool is missing."""
    query = "name,driver_version,compute_cap,memory.total"
    return {
        "gpus": _output("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"),
        "nvcc": _output("nvcc", "--version").split("\n")[-1],
        "commit": _output("git", "-C", str(ROOT), "describe", "--always", "--dirty"),
    }


def _output(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return "unknown"
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--from", dest="start", metavar="PART", help="the first part to run")
    parser.add_argument("--paddle-python", type=Path, default=paddle_python.default_python())
    parser.add_argument("--docs", type=Path, help="where results go; by default docs of this tree")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    now = time.localtime()
    folder = ROOT / "build" / "gpu-day" / time.strftime("%Y-%m-%d-%H%M%S", now)
    folder.mkdir(parents=True)
    planned = parts(args.device, folder, args.paddle_python)
    names = [part.name for part in planned]
    if args.start not in (None, *names):
        sys.exit(f"--from is {args.start!r}; the parts are {', '.join(names)}")
    outcomes = run_day(planned, folder, start=args.start)
    day = {
        "date": time.strftime("%Y-%m-%d %H:%M", now),
        "device": args.device,
        **machine(),
        "passed": outcomes[-1].verdict != FAILED,
        "parts": [asdict(each) for each in outcomes],
    }
    docs = args.docs or (ROOT / "docs" if args.device == "cuda" else None)
    if docs is None:
        (folder / "day.json").write_text(json.dumps(day, indent=1) + "\n")
        print(f"{'passed' if day['passed'] else 'FAILED'}; {folder / 'day.json'}")
    else:
        written = gpu_day_page.write(day, docs)
        print(f"{'passed' if day['passed'] else 'FAILED'}; {', '.join(map(str, written))}")
    return 0 if day["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
