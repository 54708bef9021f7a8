"""Starts the ranks of a test as processes on this machine and collects what they report."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[2]
_RESULTS = "DISTRIBUTED_TESTING_RESULTS"


def rank_environment(rank: int, ports: Sequence[int]) -> dict[str, str]:
    """What paddle.distributed.launch would set for ``rank``, one of as many as ``ports``."""
    endpoints = [f"127.0.0.1:{port}" for port in ports]
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
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


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def run_ranks(
    script: Path,
    nproc: int,
    arguments: Sequence[object] = (),
    timeout: float = 120.0,
    environment: Callable[[int], Mapping[str, str]] = lambda rank: {},
) -> list[Any]:
    """Runs ``script`` as ``nproc`` ranks; each has to call ``report`` once.

    Args:
        environment: variables of a rank beside, or instead of, those of ``rank_environment``.

    Returns:
        What the ranks reported, by rank.

    Raises:
        AssertionError: a rank failed or the time is over; with the end of each failed rank's
            output. No process is left.
    """
    ports = free_ports(nproc)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        processes = []
        for rank in range(nproc):
            variables = {
                **rank_environment(rank, ports),
                **environment(rank),
                _RESULTS: str(folder),
            }
            with (folder / f"{rank}.log").open("wb") as log:
                processes.append(
                    subprocess.Popen(
                        [sys.executable, str(script), *map(str, arguments)],
                        env=variables,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                )
        try:
            _wait(processes, time.monotonic() + timeout)
        finally:
            for process in processes:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        failed = {
            rank: (folder / f"{rank}.log").read_text(errors="replace")[-4000:]
            for rank, process in enumerate(processes)
            if process.returncode != 0
        }
        assert not failed, f"after at most {timeout:g} s:\n" + "\n".join(
            f"--- rank {rank}, exit code {processes[rank].returncode}\n{text}"
            for rank, text in failed.items()
        )
        return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(nproc)]


def _wait(processes: list[subprocess.Popen], deadline: float) -> None:
    """Until all have ended, one has failed, or the time is over."""
    while time.monotonic() < deadline:
        codes = [process.poll() for process in processes]
        if all(code is not None for code in codes) or any(codes):
            return
        time.sleep(0.05)


def report(result: Any) -> None:
    """In a rank: hands ``result``, which JSON can hold, to the test."""
    rank = os.environ["PADDLE_TRAINER_ID"]
    Path(os.environ[_RESULTS], f"{rank}.json").write_text(json.dumps(result))
