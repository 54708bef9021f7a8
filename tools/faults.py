"""Does the test suite notice a wrong line? Puts faults into a copy of the tree, one at a time.

    python tools/faults.py                       # all faults, table on standard output
    python tools/faults.py --only parallel       # those of one room, or whose file matches
    python tools/faults.py --tree OLD --json old.json      # another checkout of the project
    python tools/faults.py --baseline old.json --update    # table into tests/README.md

A fault (tools/faults.json) is one line of code with a mistake that a person could make: ``old`` is
replaced by ``new`` in the first of ``files`` that exists (a file that has moved has several names).
``tests`` are those that belong to the file; they are found by name, wherever they lie. A fault is
caught if one of them fails. Before that they have to pass on the unchanged copy. Tests that do not
end in time prove nothing on a busy machine; such a fault is tried again by the next call. Faults
below csrc/ are compiled, into the copy alone.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FAULTS = ROOT / "tools" / "faults.json"
PAGE = ROOT / "tests" / "README.md"
BEGIN, END = "<!-- faults: begin -->", "<!-- faults: end -->"
SECONDS = 900  # limit of the tests of one fault
# A fault may make the tests slower, and the machine may be busier than before.
SLOWER, LEAST_SECONDS = 8, 120
_SET_CHILD_SUBREAPER = 36  # prctl(2)


@dataclass(frozen=True)
class Fault:
    room: str
    files: list[str]
    old: str
    new: str
    tests: list[str]

    @property
    def key(self) -> str:
        old, new = (" ".join(text.split()) for text in (self.old, self.new))
        return f"{Path(self.files[0]).name}: {old} -> {new or '(nothing)'}"


@dataclass
class Result:
    """``outcome`` is caught or survived, or says why the fault could not be tried."""

    key: str
    room: str
    outcome: str
    by: str = ""
    seconds: float = 0.0

    @property
    def tried(self) -> bool:
        return self.outcome in ("caught", "survived")


def descendants() -> set[int]:
    """The processes below this one."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # the process has ended
            # The name in parentheses may contain anything; state and parent follow it.
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    found = {os.getpid()}
    while new := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= new
    return found - {os.getpid()}


@contextlib.contextmanager
def ending_what_it_leaves() -> Iterator[None]:
    """Kills the processes that the block has started, directly or not, and that still run.

    Ranks of a test have sessions of their own and outlive the test process. As a subreaper, this
    process becomes the parent of such orphans and finds them among its descendants.
    """
    libc, before = ctypes.CDLL(None), descendants()
    libc.prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        while left := descendants() - before:
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            for pid in left:
                with contextlib.suppress(ChildProcessError):  # the child of another one
                    os.waitpid(pid, 0)
        libc.prctl(_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def run_to_the_end(
    command: Sequence[str], folder: Path, environment: Mapping[str, str], seconds: float
) -> tuple[int | None, str]:
    """The exit code of a command, None if it does not end in time, and its output.

    No process that the command has started is left.
    """
    with ending_what_it_leaves(), tempfile.TemporaryFile("w+") as output:
        # A file instead of a pipe, which a process that is left would keep open.
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
        output.seek(0)
        return process.poll(), output.read()


class Tree:
    """A copy of a checkout in which faults are put and taken back."""

    def __init__(self, source: Path, folder: Path) -> None:
        self.folder = folder
        left_out = shutil.ignore_patterns(".git", ".venv", "build", "runs", "__pycache__")
        shutil.copytree(source, folder, ignore=left_out, dirs_exist_ok=True)
        self._seconds: dict[tuple[str, ...], float | None] = {}
        self._build: Path | None = None

    def try_fault(self, fault: Fault) -> Result:
        start = time.perf_counter()

        def result(outcome: str, by: str = "") -> Result:
            return Result(fault.key, fault.room, outcome, by, time.perf_counter() - start)

        file = next((self.folder / f for f in fault.files if (self.folder / f).is_file()), None)
        if file is None:
            return result(f"no file {fault.files[0]}")
        text = file.read_text(encoding="utf-8")
        if text.count(fault.old) != 1:
            return result(f"the line stands {text.count(fault.old)} times in {file.name}")
        tests = self._paths(fault.tests)
        if not tests:
            return result(f"no tests {' '.join(fault.tests)}")
        compiled = "csrc" in file.relative_to(self.folder).parts
        if compiled and self._build is None:
            self._compile()
        limit = self._limit(tests)
        if limit is None:
            return result("tests fail or do not end without it")
        file.write_text(text.replace(fault.old, fault.new), encoding="utf-8")
        try:
            if compiled:
                self._compile()
            outcome, by = self._run(tests, limit)
        finally:
            file.write_text(text, encoding="utf-8")
            if compiled:
                self._compile()
        return result(outcome, by)

    def _paths(self, names: list[str]) -> list[str]:
        found = [next(self.folder.glob(f"tests/**/{Path(name).name}"), None) for name in names]
        return [str(path.relative_to(self.folder)) for path in found if path is not None]

    def _limit(self, tests: list[str]) -> float | None:
        """Seconds that ``tests`` may take with a fault; None if they do not pass without it."""
        key = tuple(tests)
        if key not in self._seconds:
            start = time.perf_counter()
            passes = self._run(tests, SECONDS)[0] == "survived"
            limit = max(LEAST_SECONDS, SLOWER * (time.perf_counter() - start))
            self._seconds[key] = min(limit, SECONDS) if passes else None
        return self._seconds[key]

    def _run(self, tests: list[str], seconds: float) -> tuple[str, str]:
        """The outcome of a run of ``tests``, and the first test that fails."""
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
        # Markers that leave slow tests out of a quick run do not hold here.
        command += ["-o", "addopts=", "-m", "slow or not slow"]
        environment = {**os.environ, "PYTHONPATH": str(self.folder), "PYTHONDONTWRITEBYTECODE": "1"}
        code, output = run_to_the_end(command, self.folder, environment, seconds)
        if code is None:
            return f"no end in {seconds:.0f} s", ""
        first = re.search(r"^(?:FAILED|ERROR) (?:\S*/)?(\S+)", output, re.MULTILINE)
        outcome = "survived" if code == 0 else "caught"
        return outcome, first.group(1).partition("[")[0] if first else ""

    def _compile(self) -> None:
        """Builds the libraries into the copy; the first time configures, later ones are quick."""
        options = []
        if self._build is None:
            self._build = self.folder / "build" / "faults"
            info = json.loads((self.folder / "pypkg/_lib/build_info.json").read_text())
            paddle = subprocess.run(
                [sys.executable, "-c", "import paddle; print(paddle.__path__[0])"],
                capture_output=True, text=True, check=True,
            )  # fmt: skip
            options = [
                "-DCMAKE_BUILD_TYPE=Release", f"-DPython_EXECUTABLE={sys.executable}",
                f"-DPYPKG_OUTPUT_DIR={self.folder / 'pypkg'}",
                f"-DPYPKG_PADDLE_DIR={paddle.stdout.strip().splitlines()[-1]}",
                f"-DPYPKG_PADDLE_VERSION={info['paddle_version']}",
            ]  # fmt: skip
            configure = ["cmake", "-S", str(self.folder), "-B", str(self._build), "-G", "Ninja"]
            subprocess.run([*configure, *options], check=True, capture_output=True)
        subprocess.run(["cmake", "--build", str(self._build)], check=True, capture_output=True)


def table(results: list[Result], baseline: dict[str, str]) -> str:
    """The Markdown of tests/README.md; ``baseline``: outcomes of an earlier suite by fault."""
    tried = [r for r in results if r.tried]
    caught = sum(r.outcome == "caught" for r in tried)
    lines = [f"{caught} of {len(tried)} faults are caught ({caught / max(1, len(tried)):.0%})."]
    if baseline:
        both = [r for r in tried if baseline.get(r.key) in ("caught", "survived")]
        before = sum(baseline[r.key] == "caught" for r in both)
        now = sum(r.outcome == "caught" for r in both)
        lines[0] += (
            f" Of {len(both)} that were also tried on the suite before it was divided into tiers, "
            f"that one caught {before}, this one {now}."
        )
    lines += [
        "",
        "| room | fault | before | now | first test that fails |",
        "|---|---|---|---|---|",
    ]
    for r in results:
        fault = r.key.replace("|", "\\|").replace("`", "'")
        before = baseline.get(r.key, "")
        before = before if before in ("caught", "survived") else "-"
        lines.append(f"| {r.room} | `{fault}` | {before} | {r.outcome} | {r.by or '-'} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tree", type=Path, default=ROOT, help="checkout to put faults into")
    parser.add_argument("--only", default="", help="regular expression for room or file")
    parser.add_argument("--json", type=Path, help="where results go; what is in it is not redone")
    parser.add_argument("--baseline", type=Path, help="results of an earlier suite, to compare")
    parser.add_argument("--update", action="store_true", help="put the table into tests/README.md")
    options = parser.parse_args()
    faults = [Fault(**each) for each in json.loads(FAULTS.read_text(encoding="utf-8"))]
    faults = [f for f in faults if re.search(options.only, f"{f.room} {f.files[0]}")]
    done: dict[str, Result] = {}
    if options.json and options.json.exists():
        stored = json.loads(options.json.read_text(encoding="utf-8"))
        done = {each["key"]: Result(**each) for each in stored}
        done = {key: result for key, result in done.items() if result.tried}
    with tempfile.TemporaryDirectory() as folder:
        tree = None
        for number, fault in enumerate(faults, start=1):
            if fault.key not in done:
                tree = tree or Tree(options.tree.resolve(), Path(folder))
                done[fault.key] = tree.try_fault(fault)
                if options.json:
                    rows = [asdict(each) for each in done.values()]
                    options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
            result = done[fault.key]
            print(f"{number}/{len(faults)} {result.outcome}: {fault.key}", flush=True)
    results = [done[fault.key] for fault in faults]
    baseline = {}
    if options.baseline:
        stored = json.loads(options.baseline.read_text(encoding="utf-8"))
        baseline = {each["key"]: each["outcome"] for each in stored}
    text = table(results, baseline)
    if options.update:
        page = PAGE.read_text(encoding="utf-8")
        before, _, rest = page.partition(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}", encoding="utf-8")
    else:
        print(text)
    return 0 if all(r.outcome == "caught" for r in results) else 1


if __name__ == "__main__":
    sys.exit(main())
