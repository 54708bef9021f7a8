"""Starts the ranks of a test as processes on this machine and collects what they report."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

sys.path.insert(0, str(Path(__file__).parents[2] / "processes"))
import forked

from pypkg.parallel.endpoints import free_ports

REPO = Path(__file__).resolve().parents[3]
RankProcess = subprocess.Popen | forked.Process
_RESULTS = "DISTRIBUTED_TESTING_RESULTS"


def rank_environment(rank: int, ports: Sequence[int]) -> dict[str, str]:
    """What paddle.distributed.launch would set for ``rank``, one of as many as ``ports``."""
    endpoints = [f"127.0.0.1:{port}" for port in ports]
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "PYPKG_NUM_THREADS": "1",
        "PADDLE_TRAINER_ID": str(rank),
        "PADDLE_TRAINERS_NUM": str(len(ports)),
        "PADDLE_TRAINER_ENDPOINTS": ",".join(endpoints),
        "PADDLE_CURRENT_ENDPOINT": endpoints[rank],
        "PADDLE_MASTER": endpoints[0],
        "PADDLE_LOCAL_SIZE": str(len(ports)),
        "PADDLE_DISTRI_BACKEND": "gloo",
        "PYTHONPATH": os.pathsep.join(
            [str(REPO), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
        ),
    }


def run_ranks(
    script: Path,
    nproc: int,
    arguments: Sequence[object] = (),
    timeout: float = 120.0,
    environment: Callable[[int], Mapping[str, str]] = lambda rank: {},
    fork: bool = True,
    logs: Path | None = None,
) -> list[Any]:
    """Runs ``script`` as ``nproc`` ranks; each has to call ``report`` once.

    Args:
        environment: variables of a rank beside, or instead of, those of ``rank_environment``.
        fork: whether the ranks are forked (`forked.py`), or started with an interpreter each.
        logs: where the output of each rank stays, as RANK.log; None: nowhere.

    Returns:
        What the ranks reported, by rank.

    Raises:
        AssertionError: a rank failed or the time is over; with the end of each failed rank's
            output, or of every rank's that was still running. No process is left.
    """
    ports = free_ports(nproc)
    with tempfile.TemporaryDirectory() as name:
        folder, processes = Path(name), []
        logs = logs or folder
        for rank in range(nproc):
            variables = {
                **rank_environment(rank, ports),
                **environment(rank),
                _RESULTS: str(folder),
            }
            with (logs / f"{rank}.log").open("wb") as log:
                processes.append(start_rank([script, *arguments], variables, log, fork))
            if rank == 0 and nproc > 1:
                _wait_for_listener(ports[0])
        try:
            codes = _wait(processes, time.monotonic() + timeout)
        finally:
            for process in processes:
                forked.kill_group(process)
        assert not any(codes) and None not in codes, _failure(codes, logs, timeout)
        return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(nproc)]


def start_rank(
    arguments: Sequence[object], environment: Mapping[str, str], log: IO, fork: bool = True
) -> RankProcess:
    """Runs ``python *arguments`` in a process group of its own, with all output to ``log``."""
    if fork:
        return forked.start(arguments, environment=environment, stdout=log, stderr=log)
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)], cwd=REPO, env=environment, stdout=log,
        stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip


def _wait_for_listener(port: int) -> None:
    """Half a second for rank 0 to serve the store: one who comes too early waits 3 s in Paddle."""
    deadline = time.monotonic() + 0.5
    # Columns: number, local address, peer, state (0A: LISTEN).
    listening = re.compile(rf":{port:04X} \w+:0000 0A ")
    while time.monotonic() < deadline:
        tables = (Path("/proc/net") / name for name in ("tcp", "tcp6"))
        if any(listening.search(table.read_text()) for table in tables if table.exists()):
            return
        time.sleep(0.01)


def _wait(processes: list[RankProcess], deadline: float) -> list[int | None]:
    """Until all have ended, one has failed, or the time is over; their exit codes, if they have."""
    while True:
        codes = [process.poll() for process in processes]
        if None not in codes or any(codes) or time.monotonic() > deadline:
            return codes
        time.sleep(0.05)


def _failure(codes: list[int | None], logs: Path, timeout: float) -> str:
    """Which ranks are to blame; the others are named, but what they wrote would hide the reason."""
    to_blame = [rank for rank, code in enumerate(codes) if code]
    lines = [f"{len(to_blame)} of {len(codes)} ranks failed; exit codes {codes} (None: running)"]
    if not to_blame:
        lines = [f"ranks still run after {timeout:g} s; exit codes {codes} (None: running)"]
        to_blame = [rank for rank, code in enumerate(codes) if code is None]
    for rank in to_blame:
        text = (logs / f"{rank}.log").read_text(errors="replace")[-4000:]
        lines.append(f"--- rank {rank}, exit code {codes[rank]}\n{text}")
    return "\n".join(lines)


def report(result: Any) -> None:
    """In a rank: hands ``result``, which JSON can hold, to the test."""
    rank = os.environ["PADDLE_TRAINER_ID"]
    Path(os.environ[_RESULTS], f"{rank}.json").write_text(json.dumps(result))
