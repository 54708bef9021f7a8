"""Runs of `paddle.distributed.launch --nnodes` over several hosts with a network between them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import netns
import pytest
from distributed_testing import REPO
from page_blocks import blocks
from training_testing import Workplace, counting_documents, environment, write_corpus, write_model

from pypkg.training.checkpoint.merge import merge

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(netns.obstacle()), reason=str(netns.obstacle())),
]
MASTER_PORT = 36001
STEPS = 200
SETTINGS = {"max_steps": STEPS, "save_steps": 50, "do_eval": False, "num_threads": 1}
SILENCE = 15.0  # more than a cable of 5 s and the retries of TCP after it
SECONDS_TO_END = 30.0  # after a host is lost


class Run:
    """One run: a launcher on each host, all with the same command line but for the data."""

    def __init__(self, hosts: list[netns.Host], folder: Path, *, own_data: bool = False) -> None:
        self._hosts = hosts
        self.workplace = Workplace(folder)
        write_model(folder / "model")
        self._data = [folder / f"data{i}" if own_data else folder / "data" for i in range(8)]
        for data in dict.fromkeys(self._data[: len(hosts)]):
            write_corpus(data / "corpus", counting_documents())
        self._own_data = own_data
        self.launchers: list[subprocess.Popen] = []

    def start(
        self,
        mounts: dict[Path, Path] | None = None,
        around: Sequence[str] = (),
        script: Path | None = None,
        read_only: Sequence[Path] = (),
        **settings: object,
    ) -> None:
        """Starts a launcher with one rank on every host.

        Args:
            mounts: folders of their own that all hosts but the first have (`Host.start`).
            around: words before the launch line.
            script: starts the launcher of a host, from the variables of a Slurm job.
            read_only: folders that all hosts but the first may only read.
        """
        self.launchers = []
        for number, host in enumerate(self._hosts):
            given = SETTINGS | {
                "input_dir": self._data[number],
                "share_folder": not self._own_data,
            }
            words = self.workplace.command(**given | settings)[3:]
            log_dir = self.workplace.folder / f"log{number}"
            command: list[object] = [
                *around, sys.executable, "-m", "paddle.distributed.launch",
                "--nnodes", len(self._hosts), "--rank", number, "--nproc_per_node", 1,
                "--master", f"{self._hosts[0].address}:{MASTER_PORT}", "--host", host.address,
                "--log_dir", log_dir, REPO / "run_pretrain.py", *words,
            ]  # fmt: skip
            variables = environment()
            if script is not None:
                command = ["bash", script, *words]
                variables |= {
                    "PATH": f"{script.parent}{os.pathsep}{os.environ['PATH']}",
                    "MACHINES": str(len(self._hosts)),
                    "MASTER": self._hosts[0].address,
                    "MASTER_PORT": str(MASTER_PORT),
                    "SLURM_NODEID": str(number),
                    "RANKS": "1",
                }
            variables |= {
                "PYTHONPATH": str(REPO),
                "CUDA_VISIBLE_DEVICES": "",
                "PYPKG_SILENCE_SECONDS": str(SILENCE),
                "PYPKG_START_SECONDS": "120",
            }
            with (self.workplace.folder / f"launcher{number}.log").open("ab") as log:
                others = (mounts or {}, read_only) if number else ({}, ())
                self.launchers.append(host.start(command, log, variables, *others))

    def codes(self, seconds: float) -> list[int]:
        """Exit codes of all launchers, which have to end in that time."""
        deadline = time.monotonic() + seconds
        try:
            return [each.wait(max(0.1, deadline - time.monotonic())) for each in self.launchers]
        except subprocess.TimeoutExpired as error:
            said = "\n".join(self.said(number)[-3000:] for number in range(len(self._hosts)))
            raise AssertionError(f"a host still runs after {seconds:g} s\n{said}") from error

    def said(self, number: int) -> str:
        """What launcher and rank on that host wrote."""
        folder = self.workplace.folder
        files = [folder / f"launcher{number}.log", *folder.glob(f"log{number}/workerlog.*")]
        return "\n".join(file.read_text(errors="replace") for file in files if file.exists())

    def wait_for_step(self, step: int, seconds: float = 120.0) -> None:
        """Until the log of metrics has come to ``step``."""
        deadline = time.monotonic() + seconds
        while max(self.losses(), default=0) < step:
            ended = [each.poll() for each in self.launchers]
            if any(code is not None for code in ended) or time.monotonic() > deadline:
                said = "\n".join(self.said(number)[-3000:] for number in range(len(self._hosts)))
                raise AssertionError(f"step {step} was not reached, exit codes {ended}\n{said}")
            time.sleep(0.02)

    def losses(self) -> dict[int, float]:
        """Losses by step, of the lines that are written whole."""
        file = self.workplace.output_dir / "metrics.jsonl"
        lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        rows = [json.loads(line) for line in lines if line.endswith("\n")]
        return {row["global_step"]: row["loss"] for row in rows if "loss" in row}


@pytest.fixture(scope="module")
def two_hosts() -> Iterator[list[netns.Host]]:
    with netns.network(2) as hosts:
        yield hosts


@pytest.fixture
def hosts(two_hosts) -> Iterator[list[netns.Host]]:
    """Two hosts, without processes and with whole cables before and after a test."""
    yield two_hosts
    for host in two_hosts:
        host.kill_processes()
        host.mend()


@pytest.fixture(scope="module")
def reference(two_hosts, tmp_path_factory) -> dict[int, float]:
    """Losses of two data-parallel ranks on two hosts whose network never failed."""
    run = Run(two_hosts, tmp_path_factory.mktemp("reference"))
    run.start()
    assert run.codes(180) == [0, 0], run.said(0) + run.said(1)
    assert sorted(run.losses()) == list(range(1, STEPS + 1))
    return run.losses()


LAYOUTS = {
    "data": {"gradient_accumulation_steps": 1},
    "tensor": {"tensor_parallel_degree": 2},
    "pipeline": {"pipeline_parallel_degree": 2},
}


@pytest.mark.parametrize(
    ("layout", "own_data"), [("data", True), ("tensor", False), ("pipeline", True)]
)
def test_same_as_one_process(hosts, tmp_path, layout, own_data):
    """With folders of their own, each host reads its data and builds its own index maps."""
    run = Run(hosts, tmp_path, own_data=own_data)
    few = {"max_steps": 4, "save_steps": 4}
    run.start(**few, **LAYOUTS[layout])
    assert run.codes(180) == [0, 0], run.said(0) + run.said(1)
    found = run.losses()
    alone = Workplace(tmp_path, "alone")
    done = alone.run(**SETTINGS | few, input_dir=tmp_path / ("data0" if own_data else "data"))
    assert done.returncode == 0, done.stderr
    expected = alone.losses()
    assert found.keys() == expected.keys()
    for step, loss in expected.items():
        assert found[step] == pytest.approx(loss, rel=1e-5), step


def test_three_hosts(tmp_path):
    """Three replicas see the samples of one process with three times the micro batches."""
    with netns.network(3) as hosts:
        run = Run(hosts, tmp_path)
        few = {"max_steps": 4, "save_steps": 4}
        run.start(**few, gradient_accumulation_steps=1)
        assert run.codes(180) == [0, 0, 0], "".join(map(run.said, range(3)))
    alone = Workplace(tmp_path, "alone")
    done = alone.run(**SETTINGS | few | {"gradient_accumulation_steps": 3})
    assert done.returncode == 0, done.stderr
    assert run.losses() == pytest.approx(alone.losses(), rel=1e-5)


def test_the_script_of_the_guide(hosts, tmp_path, monkeypatch):
    """start.sh of docs/guides/several_machines.md finds number and address of its host."""
    (text,) = (each.text for each in blocks() if "# start.sh:" in each.text)
    (tmp_path / "start.sh").write_text(text, encoding="utf-8")
    for name, arguments in (("python", ""), ("pypkg", "-m pypkg ")):
        program = f'#!/bin/sh\nexec "{sys.executable}" {arguments}"$@"\n'
        (tmp_path / name).write_text(program, encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    monkeypatch.chdir(tmp_path)  # the script writes log/ there
    run = Run(hosts, tmp_path)
    few = {"max_steps": 4, "save_steps": 4}
    run.start(script=tmp_path / "start.sh", **few, gradient_accumulation_steps=1)
    assert run.codes(180) == [0, 0], run.said(0) + run.said(1)
    alone = Workplace(tmp_path, "alone")
    done = alone.run(**SETTINGS | few | {"gradient_accumulation_steps": 2})
    assert done.returncode == 0, done.stderr
    assert run.losses() == pytest.approx(alone.losses(), rel=1e-5)
    for number in range(2):
        assert (tmp_path / f"log/machine{number}/workerlog.0").is_file()


def test_an_output_folder_that_is_not_shared(hosts, tmp_path):
    """The second host has a folder of its own under the name of output_dir."""
    run = Run(hosts, tmp_path)
    run.workplace.output_dir.mkdir()
    (tmp_path / "own").mkdir()
    run.start(mounts={run.workplace.output_dir: tmp_path / "own"})
    assert run.codes(180) == [2, 2], run.said(0) + run.said(1)
    for number in range(2):
        assert "is not the same folder on all machines" in run.said(number)
        assert f"rank 1 ({hosts[1].address}) cannot see" in run.said(number)


@pytest.mark.parametrize("allow_local_output", [False, True])
def test_an_output_folder_that_one_host_can_only_read(hosts, tmp_path, allow_local_output):
    """It is told before the first step, and not by the first checkpoint."""
    run = Run(hosts, tmp_path)
    run.workplace.output_dir.mkdir()
    run.start(read_only=[run.workplace.output_dir], allow_local_output=allow_local_output)
    assert run.codes(180) == [2, 2], run.said(0) + run.said(1)
    for number in range(2):
        assert f"rank 1 ({hosts[1].address}): output_dir" in run.said(number)
        assert "cannot be written: Read-only file system" in run.said(number)
    assert not run.losses()


def test_each_host_keeps_its_part(hosts, reference, tmp_path):
    """A host dies; both go on from their parts, bit for bit. Merged, they go on in one process."""
    run, own = Run(hosts, tmp_path), tmp_path / "own"
    own.mkdir()
    run.workplace.output_dir.mkdir()
    local: dict[str, Any] = {"allow_local_output": True, "save_total_limit": 4}
    local["mounts"] = {run.workplace.output_dir: own}
    run.start(**local)
    run.wait_for_step(60)
    hosts[1].kill()
    assert run.launchers[0].wait(SECONDS_TO_END) != 0
    hosts[1].mend()
    run.start(**local)
    assert run.codes(180) == [0, 0], run.said(0) + run.said(1)
    assert "resuming from" in run.said(0)
    assert run.losses() == reference
    merge([run.workplace.output_dir / "checkpoint-150", own / "checkpoint-150"], tmp_path / "whole")
    alone = Workplace(tmp_path, "alone")
    settings = SETTINGS | {"gradient_accumulation_steps": 4, "max_steps": 160, "decay_steps": STEPS}
    done = alone.run(**settings, resume_from_checkpoint=tmp_path / "whole")
    assert done.returncode == 0, done.stderr
    found = alone.losses()
    assert sorted(found) == list(range(151, 161))
    assert found == pytest.approx({step: reference[step] for step in found}, rel=1e-4)


def test_data_that_differ(hosts, tmp_path):
    run = Run(hosts, tmp_path, own_data=True)
    write_corpus(tmp_path / "data1" / "corpus", counting_documents(61))
    run.start()
    assert run.codes(180) == [2, 2], run.said(0) + run.said(1)
    for number in range(2):
        assert "the ranks read different data: corpus corpus has" in run.said(number)
        assert f"on rank 1 ({hosts[1].address})" in run.said(number)


def test_a_link_that_is_down_for_five_seconds(hosts, reference, tmp_path):
    run = Run(hosts, tmp_path)
    run.start()
    run.wait_for_step(2)
    hosts[1].cut()
    time.sleep(5)
    hosts[1].mend()
    assert run.codes(180) == [0, 0], run.said(0) + run.said(1)
    assert run.losses() == reference


def test_a_link_that_stays_down(hosts, tmp_path):
    """Both sides end, and each names the host that it no longer hears."""
    run = Run(hosts, tmp_path)
    run.start()
    run.wait_for_step(2)
    hosts[1].cut()
    codes = run.codes(SECONDS_TO_END)
    assert all(codes), codes
    assert f"rank 1 ({hosts[1].address})" in run.said(0)
    assert f"rank 0 ({hosts[0].address})" in run.said(1)


@pytest.mark.parametrize("dying", [0, 1])
def test_a_host_that_dies_comes_back(hosts, reference, tmp_path, dying):
    """The other ends; the same commands go on, bit for bit as if nothing had happened."""
    run = Run(hosts, tmp_path)
    run.start()
    run.wait_for_step(60)
    hosts[dying].kill()
    other = 1 - dying
    assert run.launchers[other].wait(SECONDS_TO_END) != 0
    assert f"rank {dying} ({hosts[dying].address})" in run.said(other)
    assert run.workplace.steps()[-1] < STEPS
    hosts[dying].mend()
    run.start()
    assert run.codes(180) == [0, 0], run.said(0) + run.said(1)
    assert "resuming from" in run.said(0)
    assert run.losses() == reference


def test_supervised_launchers_meet_again(hosts, reference, tmp_path):
    """A rank of one host is killed; `pypkg supervise` of each host starts its launcher again."""
    run = Run(hosts, tmp_path)
    run.start(around=[sys.executable, "-m", "pypkg.supervise", "--backoff", "1", "--"])
    run.wait_for_step(60)
    hosts[1].kill_ranks()
    assert run.codes(180) == [0, 0], run.said(0) + run.said(1)
    assert "resuming from" in run.said(0)
    assert run.losses() == reference


def test_a_signal_to_the_launcher_of_one_host(hosts, reference, tmp_path):
    """All hosts stop after the same step, with a checkpoint, and go on bit for bit."""
    run = Run(hosts, tmp_path)
    run.start()
    run.wait_for_step(2)
    run.launchers[1].send_signal(signal.SIGTERM)
    codes = run.codes(60)
    assert all(codes), codes
    stopped = max(run.losses())
    assert run.workplace.steps()[-1] == stopped < STEPS
    run.start()
    assert run.codes(180) == [0, 0], run.said(0) + run.said(1)
    assert run.losses() == reference
