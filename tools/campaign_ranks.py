"""The ranks of a run of a campaign, forked like those of the tests."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests"
HARNESS = ("distributed/testing", "training/testing", "several_hosts")
for folder in (ROOT, *(TESTS / name for name in HARNESS)):
    sys.path.insert(0, str(folder))

from distributed_testing import RankProcess, free_ports, rank_environment, start_rank  # noqa: E402
from fault_campaign import Run  # noqa: E402
from netns import Host  # noqa: E402
from training_testing import environment  # noqa: E402

OUTPUT_DIR = Path("out")  # of every run, in the folder of each rank
_START_SECONDS = "20"  # ranks give up a rank that died during the start after this time
# Longer than a link outage of 5 s and the TCP retries after it.
QUICK_TO_MISS = {"PYPKG_SILENCE_SECONDS": "15"}


class Ranks:
    """The processes of one start of a run; none is left after the context.

    Args:
        folders: in which each rank runs, and has its output_dir and, but for rank 0, its log.
        hosts: on which each runs; empty: all on this machine.
        limits: environment variables of all ranks.
    """

    def __init__(
        self,
        run: Run,
        folders: Sequence[Path],
        hosts: Sequence[Host] = (),
        limits: Mapping[str, str] = MappingProxyType({}),
        **settings: object,
    ) -> None:
        words = run.command(OUTPUT_DIR, disable_tqdm=True, **settings)[4:]
        ports = free_ports(len(folders))
        self._logs = [run.folder / "rank0.log"]
        self._logs += [folder / f"rank{rank}.log" for rank, folder in enumerate(folders) if rank]
        self.processes: list[RankProcess] = []
        for rank, (log, own_folder) in enumerate(zip(self._logs, folders, strict=True)):
            variables = environment() | {"PYTHONPATH": str(ROOT)}
            if len(folders) > 1:
                variables = rank_environment(rank, ports)
            if hosts:
                variables |= _addresses(rank, ports, hosts)
            variables |= {"PYPKG_START_SECONDS": _START_SECONDS, **limits}
            own_folder.mkdir(exist_ok=True)
            script = [ROOT / "tools/campaign_rank.py", hosts[rank].namespace if hosts else ""]
            with log.open("wb") as stream:
                self.processes.append(start_rank([*script, own_folder, *words], variables, stream))

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            _kill_group(process)

    def codes(self) -> list[int | None]:
        """Exit codes; the negative number of a signal; None for a process that still runs."""
        return [process.poll() for process in self.processes]

    def have_ended(self) -> bool:
        return None not in self.codes()

    def said(self) -> str:
        return "\n".join(map(self.said_by, range(len(self._logs))))

    def said_by(self, rank: int) -> str:
        return self._logs[rank].read_text(errors="replace")[-3000:]

    def leave_orphans(self) -> bool:
        """Whether a group still has a process a while after its leader has ended."""
        return not within(10.0, lambda: not any(map(_has_group, self.processes)))

    def finish(self) -> None:
        """Waits for the end of a run that has to succeed."""
        if not within(600.0, self.have_ended) or any(self.codes()):
            raise RuntimeError(f"exit codes {self.codes()}\n{self.said()}")


def _addresses(rank: int, ports: Sequence[int], hosts: Sequence[Host]) -> Mapping[str, str]:
    """The environment of a rank when each rank runs on its own host."""
    endpoints = [f"{host.address}:{port}" for host, port in zip(hosts, ports, strict=True)]
    return {
        "PADDLE_TRAINER_ENDPOINTS": ",".join(endpoints),
        "PADDLE_CURRENT_ENDPOINT": endpoints[rank],
        "PADDLE_MASTER": endpoints[0],
        "PADDLE_NNODES": str(len(hosts)),
        "PADDLE_LOCAL_SIZE": "1",
    }


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
