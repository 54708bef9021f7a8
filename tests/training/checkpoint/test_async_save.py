"""Checkpoints that another process writes while training goes on."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import forked
import numpy as np
import paddle
import pytest
from async_run import Run
from tiny_configs import tiny
from training_testing import environment
from whole_values import whole_state

from pypkg.errors import UserError
from pypkg.models import building, from_config, from_pretrained
from pypkg.models.pretrained import model_tensors
from pypkg.models.weights.save_plan import SavePlan
from pypkg.parallel import mesh
from pypkg.parallel.optimizer.distribute import distribute
from pypkg.parallel.optimizer.factory import UpdateOptions
from pypkg.training import tp_sharding
from pypkg.training.checkpoint.folders import checkpoints
from pypkg.training.checkpoint.parts import Parts
from pypkg.training.checkpoint.reading import load_optimizer, load_trainer_state
from pypkg.training.checkpoint.verify import verify
from pypkg.training.checkpoint.writing import optimizer_tensors


@pytest.mark.parametrize("memory", [100_000, 1 << 30])
def test_a_checkpoint_is_of_the_step_at_which_it_began(tmp_path, memory):
    """Though training goes on before it is complete, and though not all of it fits in memory."""
    run = Run(tmp_path, memory)
    run.step()
    weights, moments = run.values(), whole_state(run.updater)
    run.checkpointer.save(run.state)
    run.step()
    run.checkpointer.wait()
    ((_, folder),) = checkpoints(tmp_path)
    assert folder.name == "checkpoint-1"
    assert load_trainer_state(folder).global_step == 1
    assert verify(folder).damage == ()
    for name, parameter in from_pretrained(folder).named_parameters():
        assert np.array_equal(parameter.numpy(), weights[name]), name
        assert not np.array_equal(run.values()[name], weights[name])
    load_optimizer(folder, run.updater)
    found = whole_state(run.updater)
    assert all(np.array_equal(found[key], value) for key, value in moments.items())


def test_a_save_lists_the_shapes_of_the_model_once(monkeypatch):
    """Else the pause grows with the square of the number of tensors."""
    listed = []

    def parameter_shapes(config):
        listed.append(config)
        return building.parameter_shapes(config)

    monkeypatch.setattr(tp_sharding, "parameter_shapes", parameter_shapes)
    config = tiny("llama")
    layer = from_config(config, seed=1)
    sharding = tp_sharding.ModelTpSharding(config)
    model, updater = distribute(layer, UpdateOptions(), mesh.current(), sharding)
    ids = paddle.arange(8, 24).reshape([2, 8])
    model.forward_backward([{"input_ids": ids, "labels": ids}], updater.scale)
    updater.step(1e-2)
    plan = SavePlan([model_tensors(layer), optimizer_tensors(updater, config)])
    assert len(list(plan.parts_of(0, plan.units()))) > 2 * len(layer.parameters())
    assert len(listed) == 1


def test_a_complete_one_gets_its_name_after_a_step(tmp_path):
    run = Run(tmp_path)
    run.step()
    run.checkpointer.save(run.state)
    deadline = time.monotonic() + 100
    while not checkpoints(tmp_path) and time.monotonic() < deadline:
        run.checkpointer.poll()
    assert [step for step, _ in checkpoints(tmp_path)] == [1]
    run.checkpointer.poll()


def test_one_at_a_time_and_the_oldest_goes_last(tmp_path):
    run = Run(tmp_path)
    for _ in range(2):
        run.step()
        run.checkpointer.save(run.state)
    assert [step for step, _ in checkpoints(tmp_path)] == [1]
    run.checkpointer.wait()
    assert [step for step, _ in checkpoints(tmp_path)] == [2]


def test_a_failure_is_told_after_the_next_step(tmp_path):
    """And the older checkpoint stays."""
    run = Run(tmp_path)
    run.step()
    run.checkpointer.save(run.state)
    run.checkpointer.wait()
    run.step()
    run.checkpointer.save(run.state)
    run.checkpointer._pending.writing._writer.abandon()
    with pytest.raises(UserError, match=r"checkpoint-2 failed: .*code -9.*checkpoint-1"):
        run.checkpointer.poll()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    run.checkpointer.wait()


def test_weights_that_are_not_finite_are_told_as_well(tmp_path):
    run = Run(tmp_path)
    run.step()
    parameter = run.layer.parameters()[1]
    parameter.set_value(paddle.full_like(parameter, float("nan")))
    run.checkpointer.save(run.state)
    with pytest.raises(UserError, match="holds values that are NaN or infinite"):
        run.checkpointer.wait()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("memory", [None, 1 << 30])
def test_optimizer_state_that_is_not_finite(tmp_path, memory):
    """Neither kind of save writes it; the older checkpoint stays."""
    run = Run(tmp_path, memory)
    run.step()
    run.checkpointer.save(run.state)
    run.step()
    moment = run.updater.optimizer.state_tensors()[0]
    moment.set_value(paddle.full_like(moment, float("inf")))
    with pytest.raises(UserError, match=r"NaN or infinite.*checkpoint-1"):
        run.checkpointer.save(run.state)
        run.checkpointer.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_the_first_save_finds_its_process_at_work(tmp_path):
    """It starts after the first step, and serves all saves."""
    run = Run(tmp_path)
    run.checkpointer.poll()
    assert run.checkpointer._writer._process is None
    for _ in range(3):
        run.step()
        run.checkpointer.poll()
        process = run.checkpointer._writer._process
        run.checkpointer.save(run.state)
        run.checkpointer.wait()
        assert run.checkpointer._writer._process is process and process.poll() is None


def test_what_follows_sigterm_waits_for_the_save(tmp_path):
    """As the trainer does: it saves the step that it reached, and waits."""
    run = Run(tmp_path)
    run.step()
    number = run.pause_writer()
    run.checkpointer.save(run.state)
    run.step()
    assert checkpoints(tmp_path) == []
    threading.Timer(0.2, os.kill, (number, signal.SIGCONT)).start()
    run.checkpointer.save(run.state)
    assert [step for step, _ in checkpoints(tmp_path)] == [1]
    run.checkpointer.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]


def test_a_kill_during_a_save_leaves_the_older_checkpoint(tmp_path):
    """And the process that writes ends by itself."""
    script = Path(__file__).with_name("async_run.py")
    paths = [str(path) for path in map(Path, sys.path) if path.is_dir()]
    done = forked.run(
        [script, tmp_path / "out"],
        environment={**environment(), "PYTHONPATH": os.pathsep.join(paths)},
        timeout=120,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    number = int(done.stdout)
    os.kill(number, signal.SIGCONT)
    command, deadline = Path(f"/proc/{number}/cmdline"), time.monotonic() + 100
    while command.exists() and command.read_bytes() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not command.exists() or not command.read_bytes()  # a zombie has none
    ((step, folder),) = checkpoints(tmp_path / "out")
    assert step == 1
    Parts().check_whole(folder, "checksums")


TP2 = {"nproc": 2, "tensor_parallel_degree": 2}


@pytest.mark.parametrize("layout", [{}, pytest.param(TP2, marks=pytest.mark.slow)])
def test_a_run_that_saves_beside_training(workplace, layout):
    """Checkpoints are those of a run that stands still; the last is complete when the run ends."""
    done = workplace.run(max_steps=4, save_steps=2, **layout, use_async_save=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("of which training stood still for") == 2
    found = {
        path.relative_to(workplace.output_dir): path.read_bytes()
        for path in workplace.output_dir.glob("checkpoint-*/*.safetensors")
    }
    assert len(found) == 2 * 2 * layout.get("nproc", 1)
    done = workplace.run(max_steps=4, save_steps=2, **layout, overwrite_output_dir=True)
    assert done.returncode == 0, done.stderr
    for path, content in found.items():
        assert (workplace.output_dir / path).read_bytes() == content, path
