"""Mutation tests: puts faults into a copy of the tree, one at a time, and runs the tests.

    python tools/faults.py                       # all faults, table on standard output
    python tools/faults.py --only parallel       # those of one room, or whose file matches
    python tools/faults.py --tree OLD --json old.json      # another checkout of the project
    python tools/faults.py --new --update        # those without a result in tests/README.md
    python tools/faults.py --check               # tries none; says which no longer apply
    python tools/faults.py --quick               # against the tests of `make test` alone

A fault (tools/faults.json) is one line of code with a plausible mistake. ``old`` is replaced by
``new`` in the first of ``files`` that exists (a moved file has several names). ``tests`` are the
tests of the file; they are found by name in any folder. A fault is caught if one of them fails.
They have to pass on the unchanged copy first. Tests that time out prove nothing on a busy machine;
the next call tries such a fault again. Faults below csrc/ are compiled, in the copy only.
``--update`` writes the results into the table of tests/README.md and keeps its other rows.
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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FAULTS = ROOT / "tools" / "faults.json"
PAGE = ROOT / "tests" / "README.md"
BEGIN, END = "<!-- faults: begin -->", "<!-- faults: end -->"
SECONDS = 900  # limit of the tests of one fault
# Time limit relative to the tests without a fault: a fault may slow them, the machine may be busy.
SLOWER, LEAST_SECONDS = 8, 120
_SET_CHILD_SUBREAPER = 36  # prctl(2)
_NO_TESTS = 5  # exit code of pytest; with --quick, where all tests of a fault are slow
_ROW = re.compile(r"^\| (\w+) \| `(.+)` \| (\S+) \| (.+) \| (\S+) \|$", re.MULTILINE)


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

    def locate(self, folder: Path) -> tuple[Path, list[str]]:
        """The file below ``folder`` that holds the line, and the paths of the tests.

        Raises:
            LookupError: the fault does not apply there; the message says why.
        """
        file = next((folder / each for each in self.files if (folder / each).is_file()), None)
        if file is None:
            raise LookupError(f"no file {self.files[0]}")
        count = file.read_text(encoding="utf-8").count(self.old)
        if count != 1:
            raise LookupError(f"the line stands {count} times in {file.name}")
        tests = []
        for name in self.tests:
            found = next(folder.glob(f"tests/**/{Path(name).name}"), None)
            if found is None:
                raise LookupError(f"no test file {name}")
            tests.append(str(found.relative_to(folder)))
        return file, tests


@dataclass
class Result:
    """``outcome`` is "caught", "survived", or the reason why the fault was not tried."""

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
def killing_descendants() -> Iterator[None]:
    """Kills, at the end, all processes that the block started directly or indirectly.

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
    with killing_descendants(), tempfile.TemporaryFile("w+") as output:
        # Not a pipe: a surviving process would keep it open.
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
        output.seek(0)
        return process.poll(), output.read()


class Tree:
    """A copy of a checkout in which faults are put and taken back."""

    def __init__(self, source: Path, folder: Path, quick: bool = False) -> None:
        self.folder = folder
        self._marker = "not slow" if quick else "slow or not slow"
        shutil.copytree(source, folder, ignore=partial(_left_out, source), dirs_exist_ok=True)
        self._seconds: dict[tuple[str, ...], float | None] = {}
        self._build: Path | None = None

    def try_fault(self, fault: Fault) -> Result:
        start = time.perf_counter()

        def result(outcome: str, by: str = "") -> Result:
            return Result(fault.key, fault.room, outcome, by, time.perf_counter() - start)

        try:
            file, tests = fault.locate(self.folder)
        except LookupError as error:
            return result(str(error))
        text = file.read_text(encoding="utf-8")
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
        command += ["-o", "addopts=", "-m", self._marker]
        environment = {**os.environ, "PYTHONPATH": str(self.folder), "PYTHONDONTWRITEBYTECODE": "1"}
        code, output = run_to_the_end(command, self.folder, environment, seconds)
        if code is None:
            return f"no end in {seconds:.0f} s", ""
        first = re.search(r"^(?:FAILED|ERROR) ([^\s\[]*/)?([^\s\[]+)", output, re.MULTILINE)
        outcome = "survived" if code in (0, _NO_TESTS) else "caught"
        return outcome, first.group(2) if first else ""

    def _compile(self) -> None:
        """Builds the libraries in the copy; the first call also configures."""
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


def _left_out(source: Path, folder: str, names: list[str]) -> set[str]:
    """The entries of a folder of the checkout ``source`` that a copy does not need."""
    ignored = {".git", ".venv", "build", "runs"} if Path(folder) == source else set()
    return (ignored | {"__pycache__"}).intersection(names)


def load_faults() -> list[Fault]:
    """The faults of tools/faults.json."""
    return [Fault(**each) for each in json.loads(FAULTS.read_text(encoding="utf-8"))]


def cell(key: str) -> str:
    """A fault as the table shows it."""
    return key.replace("|", "\\|").replace("`", "'")


def rows_of(page: str) -> dict[str, tuple[str, Result]]:
    """Rows of the table in ``page``: the outcome in an earlier suite and the result, by cell."""
    rows = {}
    table = page.partition(BEGIN)[2].partition(END)[0]
    for row in re.finditer(
        r"^\| (\w+) \| `(.+)` \| (\S+) \| (.+) \| (\S+) \|$", table, re.MULTILINE
    ):
        room, shown, before, outcome, by = row.groups()
        rows[shown] = (before, Result(shown, room, outcome, "" if by == "-" else by))
    return rows


def problems(faults: Sequence[Fault], page: str, folder: Path = ROOT) -> list[str]:
    """Faults that do not apply in ``folder``, and those that the table has no outcome for."""
    found, rows = [], rows_of(page)
    for fault in faults:
        try:
            fault.locate(folder)
        except LookupError as error:
            found.append(f"{error}: {fault.key}")
        if cell(fault.key) not in rows or not rows[cell(fault.key)][1].tried:
            found.append(f"not tried: {fault.key}")
    return found


def table(results: Sequence[Result], before: Mapping[str, str]) -> str:
    """The Markdown of tests/README.md; ``before``: outcomes of an earlier suite by cell."""
    tried = [r for r in results if r.tried]
    lines = [f"{_share(tried)} of the faults are caught."]
    known = [r for r in tried if before.get(cell(r.key)) in ("caught", "survived")]
    if known:
        earlier = sum(before[cell(r.key)] == "caught" for r in known)
        lines[0] += (
            f" Of {len(known)} that were also tried on the suite before it was divided into tiers, "
            f"that one caught {earlier}, this one {sum(r.outcome == 'caught' for r in known)}."
        )
    if len(tried) < len(results):
        lines[0] += f" {len(results) - len(tried)} were not tried."
    rooms = dict.fromkeys(r.room for r in tried)
    shares = [_share([r for r in tried if r.room == room]) for room in rooms]
    lines += ["", _row(rooms), _row(["---"] * len(rooms)), _row(shares), ""]
    lines += [_row(["room", "fault", "before", "now", "first test that fails"]), _row(["---"] * 5)]
    lines += [
        _row([r.room, f"`{cell(r.key)}`", before.get(cell(r.key), "-"), r.outcome, r.by or "-"])
        for r in results
    ]
    return "\n".join(lines)


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _share(results: Sequence[Result]) -> str:
    caught = sum(r.outcome == "caught" for r in results)
    return f"{caught} of {len(results)} ({caught / max(1, len(results)):.0%})"


def try_all(
    faults: Sequence[Fault], source: Path, store: Path | None, quick: bool = False
) -> dict[str, Result]:
    """Results by key. Results in ``store`` are reused, and new ones are added to it.

    ``quick``: only tests that are not marked slow count.
    """
    done: dict[str, Result] = {}
    if store and store.exists():
        stored = [Result(**each) for each in json.loads(store.read_text(encoding="utf-8"))]
        done = {result.key: result for result in stored if result.tried}
    with tempfile.TemporaryDirectory() as folder:
        tree = None
        for number, fault in enumerate(faults, start=1):
            if fault.key not in done:
                tree = tree or Tree(source, Path(folder), quick)
                done[fault.key] = tree.try_fault(fault)
                if store:
                    rows = [asdict(each) for each in done.values()]
                    store.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
            print(f"{number}/{len(faults)} {done[fault.key].outcome}: {fault.key}", flush=True)
    return done


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tree", type=Path, default=ROOT, help="checkout to put faults into")
    parser.add_argument("--only", default="", help="regular expression for room or file")
    parser.add_argument("--new", action="store_true", help="those without a result in the table")
    parser.add_argument("--quick", action="store_true", help="without the tests marked slow")
    parser.add_argument("--json", type=Path, help="where results go; what is in it is not redone")
    parser.add_argument("--update", action="store_true", help="put results into tests/README.md")
    parser.add_argument("--check", action="store_true", help="only say which do not apply")
    options = parser.parse_args()
    if options.quick and options.update:
        parser.error("--update takes results of both tiers; leave out --quick")
    faults, page = load_faults(), PAGE.read_text(encoding="utf-8")
    if options.check:
        found = problems(faults, page, options.tree)
        print(*found, f"{len(faults)} faults, {len(found)} problems", sep="\n")
        return 1 if found else 0
    rows = rows_of(page)
    chosen = [
        fault
        for fault in faults
        if re.search(options.only, f"{fault.room} {fault.files[0]}")
        and not (options.new and cell(fault.key) in rows and rows[cell(fault.key)][1].tried)
    ]
    done = try_all(chosen, options.tree.resolve(), options.json, options.quick)
    before = {shown: outcome for shown, (outcome, _) in rows.items()}
    if options.update:
        results = [
            done.get(f.key)
            or (replace(rows[cell(f.key)][1], key=f.key) if cell(f.key) in rows else None)
            or Result(f.key, f.room, "not tried")
            for f in faults
        ]
        start, _, rest = page.partition(BEGIN)
        text = f"{start}{BEGIN}\n{table(results, before)}\n{END}{rest.partition(END)[2]}"
        PAGE.write_text(text, encoding="utf-8")
    else:
        print(table([done[fault.key] for fault in chosen], before))
    return 0 if all(done[fault.key].outcome == "caught" for fault in chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
