"""Checkpoints that another process writes while training goes on."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
from tiny_configs import tiny
from whole_values import whole_state

from pypkg.errors import UserError
from pypkg.models import from_config, from_pretrained
from pypkg.parallel import mesh
from pypkg.parallel.optimizer.distribute import distribute
from pypkg.parallel.optimizer.factory import UpdateOptions
from pypkg.training.checkpoint.checkpointer import Checkpointer
from pypkg.training.checkpoint.folders import checkpoints
from pypkg.training.checkpoint.reading import load_optimizer, load_trainer_state
from pypkg.training.checkpoint.verify import verify
from pypkg.training.state import TrainerState


class Order:
    def record(self, state: TrainerState) -> None:
        state.data_order = {"kind": "run"}


class Run:
    """A model that is trained, and what saves it."""

    def __init__(self, folder: Path, memory: int = 1 << 30) -> None:
        self.layer = from_config(tiny("llama"), seed=1)
        self._model, self.updater = distribute(self.layer, UpdateOptions(), mesh.current())
        self.state = TrainerState()
        self.checkpointer = Checkpointer(
            folder, self.layer, self.updater, Order(),
            tokenizer_files=[], settings_json="{}", keep=1, async_memory=memory,
        )  # fmt: skip

    def step(self) -> None:
        ids = paddle.arange(8, 24).reshape([2, 8])
        self._model.forward_backward([{"input_ids": ids, "labels": ids}], self.updater.scale)
        self.updater.step(1e-2)
        self.state.global_step += 1

    def values(self) -> dict[str, Any]:
        return {name: p.numpy() for name, p in self.layer.named_parameters()}


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
