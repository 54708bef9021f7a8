"""The scripts and the manifest of docs/guides/several_machines.md, with stand-ins for schedulers.

several_hosts/test_several_hosts.py starts a run with the script.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from page_blocks import blocks

BLOCKS = [block for block in blocks() if block.page == "several_machines"]
# What the page takes for granted. Those that start processes run the words that follow their own.
# A rank of srun or mpirun is started for each machine, with the variable that the program sets.
PROGRAMS = {
    "python": f'[ "$1" = -c ] && exec {shlex.quote(sys.executable)} "$@"\necho "$@"',
    "pypkg": 'while [ "$1" != -- ]; do shift; done; shift; exec "$@"',
    "getent": "echo 127.0.0.1 STREAM; echo 127.0.0.2 DGRAM",
    "hostname": "echo 127.0.0.1 10.9.9.9",
    "srun": """while [[ $1 == -* ]]; do [ "$1" = --ntasks=1 ] && one=1; shift; done
[ -n "${one:-}" ] && exec "$@"
for ((n = 0; n < SLURM_NNODES; n++)); do SLURM_NODEID=$n "$@"; done""",
    "mpirun": """while [ "$1" != bash ]; do shift; done
for n in 0 1; do OMPI_COMM_WORLD_RANK=$n "$@"; done""",
}


# A launcher that ends its rank at SIGTERM; the rank takes a while to save at SIGUSR1.
LAUNCHER = """
import pathlib, signal, subprocess, sys, time
if len(sys.argv) > 1:
    signal.signal(signal.SIGUSR1, lambda *_: (time.sleep(0.5), sys.exit(143)))
    pathlib.Path("waits").touch()
    time.sleep(60)
rank = subprocess.Popen([sys.executable, __file__, "rank"], start_new_session=True)
signal.signal(signal.SIGTERM, lambda *_: (rank.kill(), sys.exit(15)))
sys.exit(rank.wait())
"""


def block(language: str, text: str) -> str:
    (found,) = (each.text for each in BLOCKS if each.language == language and text in each.text)
    return found


def launch_lines(folder: Path, script: str, **variables: str) -> list[list[str]]:
    """The words that Paddle's launcher gets on each machine when ``script`` runs."""
    for name, text in PROGRAMS.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n", encoding="utf-8")
        (folder / name).chmod(0o755)
    (folder / "start.sh").write_text(block("bash", "# start.sh:"), encoding="utf-8")
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=folder, env={"PATH": path, **variables}, capture_output=True, text=True, timeout=10,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [line.split() for line in done.stdout.splitlines()]


def expected(
    rank: int,
    master: str = "127.0.0.1",
    port: int = 36000,
    *,
    ranks: str = "",
    command: str = "pretrain",
) -> list[str]:
    return [
        *("-m", "paddle.distributed.launch", "--nnodes", "2", "--rank", str(rank)),
        *("--master", f"{master}:{port}", "--host", "127.0.0.1"),
        *(("--nproc_per_node", ranks) if ranks else ()),
        *("--log_dir", f"log/machine{rank}", "pypkg", command, "run.json"),
    ]


@pytest.mark.parametrize(
    "variables",
    [
        {"MACHINE_RANK": "1", "SLURM_NODEID": "0"},  # what is given goes before what is found
        {"OMPI_COMM_WORLD_RANK": "1", "SLURM_NODEID": "0"},  # mpirun within a job of Slurm
        {"SLURM_NODEID": "1"},
        {"JOB_COMPLETION_INDEX": "1"},
    ],
)
def test_the_number_of_a_machine(tmp_path, variables):
    variables |= {"MACHINES": "2", "MASTER": "first", "RANKS": "4"}
    found = launch_lines(tmp_path, "bash start.sh run.json", **variables)
    assert found == [expected(1, "first", ranks="4")]


def test_the_first_machine_listens_at_its_own_address(tmp_path):
    """The others have the name, because a new pod of that name has another address."""
    variables = {"MACHINES": "2", "MASTER": "first", "MACHINE_RANK": "0"}
    assert launch_lines(tmp_path, "bash start.sh run.json", **variables) == [expected(0)]


@pytest.mark.parametrize("missing", ["MACHINES", "MASTER", "MACHINE_RANK"])
def test_a_variable_that_is_not_set_is_named(tmp_path, missing):
    variables = {"MACHINES": "2", "MASTER": "first", "MACHINE_RANK": "0"}
    del variables[missing]
    with pytest.raises(AssertionError, match=missing):
        launch_lines(tmp_path, "bash start.sh run.json", **variables)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_ranks_have_time_to_save_after_a_signal(tmp_path, number):
    """The script tells them itself. Slurm tells all processes, so that the launcher gets it too."""
    (tmp_path / "start.sh").write_text(block("bash", "# start.sh:"), encoding="utf-8")
    (tmp_path / "launcher.py").write_text(LAUNCHER, encoding="utf-8")
    real = shlex.quote(sys.executable)
    (tmp_path / "python").write_text(
        f'#!/bin/bash\n[ "$1" = -c ] && exec {real} "$@"\nexec {real} launcher.py\n',
        encoding="utf-8",
    )
    (tmp_path / "python").chmod(0o755)
    process = subprocess.Popen(
        ["bash", "start.sh", "run.json"], cwd=tmp_path,
        env={"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "MACHINES": "1",
             "MASTER": "127.0.0.1", "MACHINE_RANK": "0"},
    )  # fmt: skip
    wait_for((tmp_path / "waits").exists)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    if number == signal.SIGUSR1:
        for child in children:
            os.kill(int(child), number)
    process.send_signal(number)
    assert process.wait(30) == 143
    assert not any(Path("/proc", child).exists() for child in children)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_the_lines_of_a_run_started_by_hand(tmp_path):
    text = block("bash", "MACHINE_RANK=0\n")
    assert launch_lines(tmp_path, text) == [expected(0)]
    assert launch_lines(tmp_path, text, COMMAND="doctor") == [expected(0, command="doctor")]


def test_the_batch_script_of_slurm(tmp_path):
    text = block("bash", "#SBATCH")
    found = launch_lines(tmp_path, text, SLURM_NNODES="2", SLURM_JOB_ID="123456")
    assert found == [expected(rank, port=30000 + 3456) for rank in range(2)]
    options = dict(
        line.removeprefix("#SBATCH --").partition("=")[::2]
        for line in text.splitlines()
        if line.startswith("#SBATCH")
    )
    assert options["nodes"] == "2" and options["ntasks-per-node"] == "1"
    assert options["signal"].startswith("B:USR1@")  # pypkg supervise is the batch shell
    assert "requeue" in options


def test_the_lines_of_open_mpi(tmp_path):
    assert launch_lines(tmp_path, block("bash", "mpirun")) == [
        expected(0),
        expected(1, "10.0.0.1"),
    ]


def test_the_manifest_of_kubernetes(tmp_path):
    service, job = yaml.safe_load_all(block("yaml", "kind: Job"))
    pods = job["spec"]["template"]["spec"]
    (container,) = pods["containers"]
    variables = {each["name"]: each["value"] for each in container["env"]}
    assert all(isinstance(value, str) for value in variables.values())
    words = container["command"] + container["args"]
    assert launch_lines(
        tmp_path, shlex.join(words), **variables, JOB_COMPLETION_INDEX="1"
    ) == [expected(1, variables["MASTER"])]  # fmt: skip
    name = job["metadata"]["name"]
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == int(variables["MACHINES"])
    assert variables["MASTER"] == f"{name}-0.{pods['subdomain']}"
    assert service["metadata"]["name"] == pods["subdomain"]
    assert service["spec"]["selector"] == {"job-name": name}
    assert service["spec"]["clusterIP"] == "None"
    mounted = {each["name"] for each in container["volumeMounts"]}
    assert mounted == {each["name"] for each in pods["volumes"]}
    assert pods["restartPolicy"] == "Never"  # a podFailurePolicy takes no other
