"""``pypkg supervise`` around a command that writes checkpoints and ends as its script says."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pypkg import supervise
from pypkg.errors import UserError
from pypkg.training.supervisor import Policy, Supervisor

REPO = Path(__file__).resolve().parents[2]

# Each start takes the next line of plan.txt: a step whose checkpoint is written, or -, and how the
# attempt ends: an exit code, "kill", or "wait" for a signal, which is its exit code then.
COMMAND = """
import os, pathlib, signal, subprocess, sys, time
folder = pathlib.Path(sys.argv[1])
plan = (folder / "plan.txt").read_text().splitlines()
starts = folder / "starts"
number = len(starts.read_text()) if starts.exists() else 0
starts.write_text("x" * (number + 1))
step, end = plan[number].split()
if step != "-":
    checkpoint = folder / "out" / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text("{}")
if end == "orphan":
    rank = subprocess.Popen(["sleep", "600"], start_new_session=True)
    (folder / "orphan").write_text(str(rank.pid))
if end in ("kill", "orphan"):
    os.kill(os.getpid(), signal.SIGKILL)
if end == "wait":
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(143))
    (folder / "waits").touch()
    while True:  # a signal just before a long sleep would wait for its end
        time.sleep(0.05)
sys.exit(int(end))
"""


class Supervised:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "command.py").write_text(COMMAND)

    def start(self, plan: str, *options: str, **variables: str) -> subprocess.Popen:
        (self.folder / "plan.txt").write_text("\n".join(plan.split(", ")))
        words = ["--output_dir", str(self.folder / "out"), "--backoff", "0.05", *options]
        command = [sys.executable, str(self.folder / "command.py"), str(self.folder)]
        return subprocess.Popen(
            [sys.executable, "-m", "pypkg.supervise", *words, "--", *command],
            env={**os.environ, "PYTHONPATH": str(REPO), **variables},
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def run(self, plan: str, *options: str) -> tuple[int, str]:
        process = self.start(plan, *options)
        _, told = process.communicate(timeout=120)
        return process.returncode, told

    @property
    def starts(self) -> int:
        return len((self.folder / "starts").read_text())

    def ledger(self) -> list[tuple]:
        rows = map(json.loads, (self.folder / "out/ledger.jsonl").read_text().splitlines())
        return [(row["event"], row["step"], row["exit_code"], row["fruitless"]) for row in rows]


@pytest.fixture
def supervised(tmp_path: Path) -> Supervised:
    return Supervised(tmp_path)


def test_restarts_while_there_is_progress(supervised):
    code, told = supervised.run("10 1, - 1, 20 kill, - 0", "--max_restarts", "2")
    assert code == 0, told
    assert supervised.starts == 4
    assert supervised.ledger() == [
        ("restart", 10, 1, 0), ("restart", 10, 1, 1), ("restart", 20, 137, 0)
    ]  # fmt: skip
    assert told.count("the run was ended by SIGKILL") == 1
    assert "`dmesg | grep -i 'out of memory'`" in told


def test_gives_up_after_restarts_without_a_checkpoint(supervised):
    code, told = supervised.run("10 1, - 1, - 9, 30 0", "--max_restarts", "2")
    assert (code, supervised.starts) == (9, 3)
    assert supervised.ledger()[-1] == ("given_up", 10, 9, 2)
    assert "not started again after exit code 9" in told


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        ("- 1, 10 0", "not started again after exit code 1"),  # nothing has worked yet
        ("10 2, 20 0", "exit code 2 is a mistake in settings or files"),
        ("10 143, 20 0", "exit code 143 says that somebody has stopped the run"),
        ("10 15, 20 0", "exit code 15 says that somebody has stopped the run"),
    ],
)
def test_ends_that_are_not_repeated(supervised, plan, words):
    code, told = supervised.run(plan)
    assert (code, supervised.starts) == (int(plan.split()[1].rstrip(",")), 1)
    assert words in told


def test_no_restarts(supervised):
    assert supervised.run("10 1, 20 0", "--max_restarts", "0")[0] == 1
    assert supervised.starts == 1


def _started(supervised: Supervised, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 60
    while not (supervised.folder / "waits").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_the_run_is_told_to_save_and_ends(supervised, number):
    """By SIGTERM, which a run knows; SIGHUP, of a closed terminal, would kill it."""
    process = supervised.start("10 wait, 20 0")
    _started(supervised, process)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert (process.returncode, supervised.starts) == (143, 1)


@pytest.mark.parametrize("program", ["python", "srun"])
def test_every_wait_for_the_run_has_a_limit(tmp_path, program):
    """A signal just before a wait without one would be forwarded after the end of the run."""
    limits = []

    class Child:
        def wait(self, timeout: float | None = None) -> int:
            limits.append(timeout)
            if len(limits) == 1:
                raise subprocess.TimeoutExpired(program, 0)
            return 7

    assert Supervisor([program], tmp_path, Policy())._wait(Child()) == 7
    assert len(limits) == 2 and None not in limits


def test_sigterm_in_the_pause_before_a_restart(supervised):
    process = supervised.start("10 1, 20 0", "--backoff", "500")
    deadline = time.monotonic() + 60
    while not (supervised.folder / "out/ledger.jsonl").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert (process.returncode, supervised.starts) == (143, 1)


def tools_of_slurm(folder: Path, program: str = "srun", trap: str = "") -> dict[str, str]:
    """A ``scontrol`` that writes its words, and a program that waits behind ``trap``."""
    tools = folder / "bin"
    tools.mkdir()
    (tools / "scontrol").write_text(
        f'#!/bin/sh\n[ "$1" = show ] && exec cat {folder}/job\necho "$@" > {folder}/scontrol\n'
    )
    (folder / "job").write_text("   PreemptEligibleTime=2026-01-02T03:04:05 PreemptTime=None\n")
    (tools / program).write_text(
        f"#!/bin/bash\n{trap}\ntouch {folder}/waits\nfor i in {{1..600}}; do sleep 0.1; done\n"
    )
    for tool in tools.iterdir():
        tool.chmod(0o755)
    return {"PATH": f"{tools}:{os.environ['PATH']}", "SLURM_JOB_ID": "4711"}


def test_sigusr1_stops_the_run_and_queues_the_slurm_job_again(supervised):
    process = supervised.start("10 wait, 20 0", **tools_of_slurm(supervised.folder))
    _started(supervised, process)
    process.send_signal(signal.SIGUSR1)
    _, told = process.communicate(timeout=60)
    assert (process.returncode, supervised.starts) == (143, 1), told
    assert (supervised.folder / "scontrol").read_text() == "requeue 4711\n"


@pytest.mark.parametrize(
    ("program", "trap", "number", "code", "queued"),
    [
        ("srun", "trap 'exit 137' TERM; trap 'exit 143' USR1", signal.SIGTERM, 143, False),
        ("srun", "trap 'exit 137' TERM; trap 'exit 143' USR1", signal.SIGUSR1, 143, True),
        ("mpirun", "trap 'exit 137' TERM; trap 'exit 143' USR1", signal.SIGINT, 143, False),
        # The time limit of the job is near: a run that is killed meanwhile would stay ended.
        ("srun", "trap 'exit 137' USR1", signal.SIGUSR1, 137, True),
        ("srun", "trap 'exit 0' USR1", signal.SIGUSR1, 0, False),
        # Ranks that start up have missed the first one.
        ("srun", "trap \"trap 'exit 143' USR1\" USR1", signal.SIGTERM, 143, False),
    ],
)
def test_programs_that_kill_the_run_at_sigterm_get_sigusr1(
    supervised, program, trap, number, code, queued
):
    variables = tools_of_slurm(supervised.folder, program, trap)
    words = ["--output_dir", str(supervised.folder / "out"), "--", program, "bash", "start.sh"]
    process = subprocess.Popen(
        [sys.executable, "-c", "from pypkg import supervise\n"
         "from pypkg.training import supervisor\nsupervisor._SECONDS_TO_REPEAT = 0.5\n"
         f"raise SystemExit(supervise.main({words!r}))"],
        env={**os.environ, "PYTHONPATH": str(REPO), **variables},
    )  # fmt: skip
    _started(supervised, process)
    process.send_signal(number)
    assert process.wait(60) == code
    assert (supervised.folder / "scontrol").exists() == queued


@pytest.mark.parametrize(("time", "queued"), [("2026-01-02T03:04:05", True), ("None", False)])
def test_a_preempted_job_is_queued_again(supervised, time, queued):
    """Slurm has sent SIGTERM to the run alone."""
    variables = tools_of_slurm(supervised.folder)
    (supervised.folder / "job").write_text(
        f"   PreemptEligibleTime=2026-01-02T03:04:05 PreemptTime={time}\n"
    )
    process = supervised.start("10 15, 20 0", **variables)
    process.communicate(timeout=60)
    assert (process.returncode, supervised.starts) == (15, 1)
    assert (supervised.folder / "scontrol").exists() == queued


def test_ranks_that_outlive_their_launcher_are_killed_before_a_restart(supervised):
    code, told = supervised.run("10 orphan, - 0")
    assert (code, supervised.starts) == (0, 2), told
    assert not Path("/proc", (supervised.folder / "orphan").read_text()).exists()


def test_pauses():
    policy = Policy(backoff=10, max_backoff=100)
    assert [policy.delay(n) for n in range(6)] == [10, 20, 40, 80, 100, 100]
    assert policy.delay(10**6) == 100


def test_the_output_dir_of_a_launch_line(tmp_path):
    settings = tmp_path / "run.json"
    settings.write_text(json.dumps({"output_dir": "here", "max_steps": 5}))
    for line in (
        f"pypkg pretrain {settings} --nproc 4",
        f"python -m pypkg.pretrain {settings}",
        f"python -m paddle.distributed.launch --nnodes 2 /a/run_pretrain.py {settings}",
    ):
        assert supervise._output_dir(line.split()) == Path("here")
    assert supervise._output_dir(["pypkg", "pretrain", "--output_dir", "there"]) == Path("there")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("python train.py", "give --output_dir before --"),
        ("pypkg pretrain --output_dir x --overwrite_output_dir true", "overwrite_output_dir is"),
        ("pypkg pretrain --output_dir x --resume_from_checkpoint y", "resume_from_checkpoint is"),
    ],
)
def test_launch_lines_that_cannot_be_supervised(line, words):
    with pytest.raises(UserError, match=words):
        supervise._output_dir(line.split())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "there is no launch line"),
        (["--backoff", "-1", "--", "true"], "--backoff is -1.0; expected 0 or more"),
        (["--output_dir", "x", "--", "/no/such/program"], "'/no/such/program' cannot be started"),
    ],
)
def test_mistakes_in_the_command_line(arguments, words, capsys):
    before = signal.getsignal(signal.SIGTERM)
    assert supervise.main(arguments) == 2
    assert words in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before
