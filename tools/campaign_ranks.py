"""The ranks of a run of a campaign, forked as those of tests are."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests"
for folder in (ROOT, TESTS / "distributed" / "testing", TESTS / "training" / "testing"):
    sys.path.insert(0, str(folder))

from distributed_testing import RankProcess, free_ports, rank_environment, start_rank  # noqa: E402
from fault_campaign import Run  # noqa: E402
from training_testing import environment  # noqa: E402

_START_SECONDS = "20"  # after which ranks give up one that died while fleet started


class Ranks:
    """The processes of one start of a run; none is left after the context."""

    def __init__(self, run: Run, size: int, output_dir: Path, **settings: object) -> None:
        words = run.command(output_dir, disable_tqdm=True, **settings)[4:]
        ports = free_ports(size)
        self._logs = [run.folder / f"rank{rank}.log" for rank in range(size)]
        self.processes: list[RankProcess] = []
        for rank, log in enumerate(self._logs):
            variables = environment() | {"PYTHONPATH": str(ROOT)}
            if size > 1:
                variables = rank_environment(rank, ports)
            variables["PYPKG_START_SECONDS"] = _START_SECONDS
            with log.open("wb") as stream:
                self.processes.append(
                    start_rank(["-m", "pypkg.pretrain", *words], variables, stream)
                )

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            _kill_group(process)

    def codes(self) -> list[int | None]:
        """Exit codes, minus the number of a signal; None: it still runs."""
        return [process.poll() for process in self.processes]

    def have_ended(self) -> bool:
        return None not in self.codes()

    def said(self) -> str:
        return "\n".join(log.read_text(errors="replace")[-3000:] for log in self._logs)

    def leave_orphans(self) -> bool:
        """Whether a group still has a process a while after its leader has ended."""
        return not within(10.0, lambda: not any(map(_has_group, self.processes)))

    def finish(self) -> None:
        """Waits for the end of a run that has to succeed."""
        if not within(600.0, self.have_ended) or any(self.codes()):
            raise RuntimeError(f"exit codes {self.codes()}\n{self.said()}")


def _has_group(process: RankProcess) -> bool:
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return False
    return True


def _kill_group(process: RankProcess) -> None:
    if _has_group(process):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def within(seconds: float, is_so: Callable[[], bool], pause: float = 0.01) -> bool:
    deadline = time.monotonic() + seconds
    while not is_so():
        if time.monotonic() > deadline:
            return False
        time.sleep(pause)
    return True
