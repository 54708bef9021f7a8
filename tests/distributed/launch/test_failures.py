"""One rank that dies, raises, hangs or meets a NaN ends the run, with a message that names it."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

import forked
import pytest
from distributed_testing import REPO, rank_environment, start_rank
from training_testing import Workplace, environment, small_workplace

from pypkg.parallel.endpoints import free_ports

FAULTY = Path(__file__).with_name("faulty_rank.py")
SETTINGS = {"max_steps": 6, "save_steps": 2, "num_threads": 1, "do_eval": False}
QUICK = {"PYPKG_HANG_SECONDS": "8", "PYPKG_START_SECONDS": "30", "PYPKG_SILENCE_SECONDS": "8"}


@pytest.fixture
def workplace(tmp_path: Path) -> Workplace:
    return small_workplace(tmp_path)


class Ranks:
    """Two ranks of one run, forked without a launcher; ended with the context."""

    def __init__(self, workplace: Workplace, fault: list[str], started: int = 2) -> None:
        self.logs = [workplace.folder / f"rank{rank}.log" for rank in range(2)]
        ports = free_ports(2)
        self.processes = []
        for rank in range(started):
            settings = dict(SETTINGS)
            if fault[0] == "differ":
                settings["learning_rate"] = 0.01 * (rank + 1)
            arguments = workplace.command(**settings)[3:]
            with self.logs[rank].open("wb") as log:
                self.processes.append(
                    start_rank(
                        [FAULTY, *fault, *arguments], rank_environment(rank, ports) | QUICK, log
                    )
                )

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            forked.kill_group(process)

    def codes(self, seconds: float) -> list[int]:
        """Exit codes of all, which have to end in that time."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.wait(max(0.1, deadline - time.monotonic()))
        return [process.returncode for process in self.processes]

    def said(self, rank: int) -> str:
        return self.logs[rank].read_text()


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("raise", ["rank 1", "at step 3, forward and backward", "broken on purpose"]),
        ("die", ["rank 1 died at step 3, forward and backward"]),
        (
            "hang",
            [
                "no progress for 8 s",
                "rank 1 is at step 3, forward and backward",
                "(most recent call first)",  # a stack trace
            ],
        ),
        ("nan", ["the loss is nan at step 3 on rank 1"]),
    ],
)
def test_a_fault_of_one_rank_is_told_by_the_other(workplace, fault, words):
    with Ranks(workplace, [fault, "1", "3"]) as ranks:
        codes = ranks.codes(60)
    assert all(code != 0 for code in codes), codes
    output = ranks.said(0)
    for word in words:
        assert word in output, output
    assert output.count("error: ") == 1, output
    assert workplace.steps() == [2]  # whole, and of before


@pytest.mark.slow
def test_a_save_that_takes_longer_than_gloo_waits(workplace, monkeypatch):
    """A disk that takes 33 s for a file, while the limit of standing still is 60 s."""
    monkeypatch.setitem(QUICK, "PYPKG_HANG_SECONDS", "60")
    with Ranks(workplace, ["slow", "0", "3"]) as ranks:
        assert ranks.codes(150) == [0, 0], ranks.said(0)
    assert workplace.steps() == [2, 4, 6]


def test_settings_that_differ(workplace):
    with Ranks(workplace, ["differ", "-1", "0"]) as ranks:
        assert ranks.codes(40) == [2, 2]
    for rank in range(2):
        assert "learning_rate is 0.01 on rank 0 and 0.02 on rank 1" in ranks.said(rank)
        assert "see docs/guides/troubleshooting.md#ranks-that-differ" in ranks.said(rank)


def test_a_missing_rank(workplace, monkeypatch):
    monkeypatch.setitem(QUICK, "PYPKG_START_SECONDS", "3")
    with Ranks(workplace, ["none", "-1", "0"], started=1) as ranks:
        assert ranks.codes(30) == [1]
    assert "of 2 ranks, rank 0 joined within 3 s; missing: rank 1" in ranks.said(0)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_on_all_ranks_and_another_layout_goes_on(workplace, number):
    """Two data-parallel ranks are stopped; one process, then a tensor-parallel pair, go on."""
    whole = {**SETTINGS, "max_steps": 100, "save_steps": 100}
    half = {**whole, "gradient_accumulation_steps": 1}
    assert workplace.run(**whole, output_dir=workplace.folder / "alone").returncode == 0
    expected = _losses(workplace.folder / "alone")

    process = subprocess.Popen(
        [*workplace.command(**half), "--nproc", "2"],
        cwd=REPO, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    metrics = workplace.output_dir / "metrics.jsonl"
    while not (metrics.exists() and metrics.stat().st_size):  # after the first step
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.01)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number, output
    assert "the same command goes on from there" in output
    stopped = workplace.steps()[-1]
    assert stopped == max(_losses(workplace.output_dir))
    tensor = [*workplace.command(**whole, tensor_parallel_degree=2), "--nproc", "2"]
    done = workplace.execute(tensor)
    assert done.returncode == 0, done.stderr
    found = _losses(workplace.output_dir)
    assert found.keys() == expected.keys()
    for step, loss in expected.items():
        assert found[step] == pytest.approx(loss, rel=1e-5), (step, stopped)


def _losses(output_dir: Path) -> dict[int, float]:
    rows = map(json.loads, (output_dir / "metrics.jsonl").read_text().splitlines())
    return {row["global_step"]: row["loss"] for row in rows if "loss" in row}


def test_a_full_disk_on_the_first_rank_ends_both(workplace):
    """A file size limit fails the write of the weights, as a full disk does."""
    command = [*workplace.command(**SETTINGS), "--nproc", "2"]
    limited = ["bash", "-c", 'ulimit -f 8; exec "$@"', "bash", *command]
    done = workplace.execute(limited)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("error: ") == 1, done.stderr
    assert "checkpoint-2 failed" in done.stderr
    assert workplace.steps() == []
