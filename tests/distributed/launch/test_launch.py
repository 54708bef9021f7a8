"""--nproc: several processes from one command, which end together."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from distributed_testing import REPO
from training_testing import Workplace, environment, small_workplace


@pytest.fixture
def workplace(tmp_path: Path) -> Workplace:
    return small_workplace(tmp_path)


def processes_of(workplace: Workplace) -> list[int]:
    """Ids of the processes that have the output folder in their command line."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = entry.read_bytes()
        except OSError:
            continue
        if str(workplace.output_dir).encode() in command:
            found.append(int(entry.parent.name))
    return found


def assert_none_left(workplace: Workplace) -> None:
    deadline = time.monotonic() + 10
    while processes_of(workplace) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert processes_of(workplace) == []


def start(workplace: Workplace) -> subprocess.Popen:
    """A run of two ranks, after its first step."""
    process = subprocess.Popen(
        [*workplace.command(max_steps=100000, num_threads=1, tensor_parallel_degree=2),
         "--nproc", "2"],
        cwd=REPO, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not (workplace.output_dir / "metrics.jsonl").exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.05)
    return process


def test_two_ranks_train_as_one_process(tmp_path, workplace):
    given = {"max_steps": 4, "num_threads": 1, "eval_steps": 4, "tensor_parallel_degree": 1}
    assert workplace.run(**given).returncode == 0
    alone = workplace.losses()
    given |= {"output_dir": tmp_path / "two", "tensor_parallel_degree": 2}
    done = workplace.execute([*workplace.command(**given), "--nproc", "2"])
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "two" / "log" / "workerlog.1").exists()
    assert done.stderr.count("step 4/4 | loss") == 1
    os.rename(workplace.output_dir, tmp_path / "one")
    os.rename(tmp_path / "two", workplace.output_dir)
    found = workplace.losses()
    assert found.keys() == alone.keys()
    assert all(found[step] == pytest.approx(alone[step], rel=1e-5) for step in alone)


@pytest.mark.parametrize("number", ["0", "x", ""])
def test_numbers_of_processes_that_cannot_be(workplace, number):
    done = workplace.execute([*workplace.command(), "--nproc", number])
    assert done.returncode == 2
    assert "--nproc" in done.stderr


def test_nothing_outlives_the_launcher(workplace):
    process = start(workplace)
    assert len(processes_of(workplace)) == 3
    process.kill()
    process.wait()
    assert_none_left(workplace)


def test_a_killed_rank_ends_all(workplace):
    process = start(workplace)
    ranks = sorted(set(processes_of(workplace)) - {process.pid})
    os.kill(ranks[1], signal.SIGKILL)
    output, _ = process.communicate(timeout=40)
    assert process.returncode not in (0, None)
    assert "rank 1 was ended by SIGKILL" in output
    assert "`dmesg | grep -i 'out of memory'`" in output
    assert_none_left(workplace)


@pytest.mark.slow
def test_a_supervised_run_goes_on_after_the_death_of_a_rank(workplace):
    """The losses are those of a run whose ranks live."""
    given = {"num_threads": 1, "max_steps": 60, "save_steps": 10, "do_eval": False}
    whole = workplace.execute(
        [*workplace.command(**given, output_dir=workplace.folder / "whole"), "--nproc", "2"]
    )
    assert whole.returncode == 0, whole.stderr
    process = subprocess.Popen(
        [sys.executable, "-m", "pypkg.supervise", "--backoff", "0", "--",
         *workplace.command(**given), "--nproc", "2"],
        cwd=REPO, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not workplace.steps():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.01)
    launcher = {int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children")
                .read_text().split()}  # fmt: skip
    ranks = set(processes_of(workplace)) - launcher - {process.pid}
    os.kill(max(ranks), signal.SIGKILL)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert "it is started again in 0 s" in output
    assert_none_left(workplace)
    rows = (workplace.output_dir / "ledger.jsonl").read_text()
    assert rows.count('"event": "restart"') == 1
    metrics = [workplace.folder / name / "metrics.jsonl" for name in ("whole", "out")]
    found, expected = (
        {row["global_step"]: row["loss"] for row in map(json.loads, file.read_text().splitlines())}
        for file in metrics
    )
    assert found == expected
