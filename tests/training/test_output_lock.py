"""Changes of output_dir while a run writes to it, and before it resumes."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Iterator

import numpy as np
import pytest
from checkpoint_testing import flip
from training_testing import ROOT, Workplace, environment

# The fast tests of this are checkpoint/test_lock.py and start/test_choose_checkpoint.py.
pytestmark = pytest.mark.slow


@pytest.fixture
def running(workplace: Workplace) -> Iterator[subprocess.Popen]:
    """A run of the workplace that has saved a checkpoint and is far from its end."""
    process = subprocess.Popen(
        workplace.command(max_steps=100_000), cwd=ROOT, env=environment(), text=True,
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    while not (workplace.output_dir / "checkpoint-4").exists():
        assert process.poll() is None
        time.sleep(0.05)
    yield process
    process.kill()
    process.wait()


def test_a_second_run_does_no_harm(workplace, running):
    running.send_signal(signal.SIGSTOP)
    before = {path: path.stat().st_mtime_ns for path in workplace.output_dir.rglob("*")}
    second = workplace.run(max_steps=8)
    assert second.returncode == 2
    assert f"is in use by process {running.pid} on" in second.stderr
    assert {path: path.stat().st_mtime_ns for path in workplace.output_dir.rglob("*")} == before
    running.send_signal(signal.SIGTERM)
    running.send_signal(signal.SIGCONT)
    running.communicate()
    assert running.returncode == 143
    assert not (workplace.output_dir / ".lock").exists()


def test_a_killed_run_is_followed_at_once(workplace, running):
    running.kill()
    running.wait()
    assert (workplace.output_dir / ".lock").exists()
    last = workplace.steps()[-1]
    done = workplace.run(max_steps=last + 1)
    assert done.returncode == 0, done.stderr
    assert f"of process {running.pid} on" in done.stderr


def test_an_output_dir_that_vanishes_ends_the_run(workplace, running):
    # Removed at once: rmtree loses a race with a run that goes on making files there.
    workplace.output_dir.rename(workplace.output_dir.with_name("elsewhere"))
    _, errors = running.communicate()
    assert running.returncode == 2, errors
    assert "was removed or replaced while the run wrote into it" in errors
    assert "Traceback" not in errors


def test_a_damaged_checkpoint_costs_its_steps_alone(make_workplace):
    whole, damaged = make_workplace("whole"), make_workplace("damaged")
    assert whole.run().returncode == 0
    assert damaged.run(max_steps=8, decay_steps=12).returncode == 0
    file = damaged.output_dir / "checkpoint-8" / "model.safetensors"
    flip(file, np.random.default_rng(0))
    done = damaged.run()
    assert done.returncode == 0, done.stderr
    assert "checkpoint-8 is damaged and kept as damaged-checkpoint-8" in done.stderr
    assert "checkpoint-4 at step 4" in done.stderr
    assert damaged.losses() == whole.losses()
    assert (damaged.output_dir / "damaged-checkpoint-8").is_dir()
