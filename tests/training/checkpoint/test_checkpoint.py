"""Checkpoints are whole or absent, whatever happens while they are written."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
from pathlib import Path

import numpy as np
import paddle
import pytest
from checkpoint_testing import flip, save_model, updater_of
from disk_log import DiskLog
from tiny_configs import tiny
from whole_values import whole_state

from pypkg.config import Settings
from pypkg.errors import UserError
from pypkg.models import from_config
from pypkg.models.weights.save_plan import SavePlan
from pypkg.parallel import mesh
from pypkg.parallel.optimizer.distribute import distribute
from pypkg.parallel.optimizer.factory import UpdateOptions
from pypkg.parallel.optimizer.loss_scaling import LossScale
from pypkg.parallel.optimizer.updater import Updater
from pypkg.training import run
from pypkg.training.checkpoint import writing
from pypkg.training.checkpoint.checkpointer import Checkpointer
from pypkg.training.checkpoint.folders import (
    checkpoints,
    prepare_output_dir,
    remove_unfinished,
    surplus,
)
from pypkg.training.checkpoint.reading import load_optimizer, load_trainer_state
from pypkg.training.checkpoint.verify import verify
from pypkg.training.checkpoint.writing import CheckpointWriting, optimizer_tensors
from pypkg.training.state import TrainerState


def make(seed: int = 0) -> Updater:
    paddle.seed(seed)
    return updater_of(paddle.nn.Linear(64, 64))


def save(output_dir: Path, step: int, keep: int | None = None, **changes: object) -> Path:
    updater = changes.pop("updater", None) or make()
    arguments = {
        "plan": SavePlan([optimizer_tensors(updater)]),
        "add_files": lambda folder: (folder / "model.bin").write_bytes(b"m" * 1000),
        "settings_json": "{}",
        "keep": keep,
    }
    state = changes.pop("state", TrainerState(global_step=step))
    return CheckpointWriting(output_dir, state, **(arguments | changes)).finish()


def test_round_trip(tmp_path):
    updater = make()
    state = TrainerState(7, 70, 700, 5.5, [0.1, 1 / 3], data_order={"seed": 1})
    folder = save(tmp_path, 7, state=state, updater=updater, settings_json='{"a": 1}')
    assert folder == tmp_path / "checkpoint-7"
    assert load_trainer_state(folder) == state
    assert json.loads((folder / "settings.json").read_text()) == {"a": 1}
    resumed = make(1)
    load_optimizer(folder, resumed)
    found, expected = whole_state(resumed), whole_state(updater)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert np.array_equal(found[name], value), name


def test_a_checkpoint_before_the_first_update_has_no_optimizer_state(tmp_path):
    model = paddle.nn.Linear(8, 8)
    _, fresh = distribute(model, UpdateOptions(weight_decay=0.1), mesh.current())
    folder = save(tmp_path, 1, updater=fresh)
    resumed = distribute(paddle.nn.Linear(8, 8), UpdateOptions(weight_decay=0.1), mesh.current())[1]
    load_optimizer(folder, resumed)
    assert whole_state(resumed) == {}


def test_the_best_and_the_newest_stay(tmp_path):
    """The best one takes a place of save_total_limit, and one of its own if there is only one."""
    for step in range(1, 6):
        save(tmp_path, step)
    removed = {
        (keep, best): [int(folder.name[-1]) for folder in surplus(tmp_path, keep, best)]
        for keep in (1, 2, 3, 9)
        for best in (None, "checkpoint-2", "checkpoint-5")
    }
    assert removed == {
        (1, None): [1, 2, 3, 4], (1, "checkpoint-2"): [1, 3, 4], (1, "checkpoint-5"): [1, 2, 3, 4],
        (2, None): [1, 2, 3], (2, "checkpoint-2"): [1, 3, 4], (2, "checkpoint-5"): [1, 2, 3],
        (3, None): [1, 2], (3, "checkpoint-2"): [1, 3], (3, "checkpoint-5"): [1, 2],
        (9, None): [], (9, "checkpoint-2"): [], (9, "checkpoint-5"): [],
    }  # fmt: skip


def test_keeps_the_newest_in_order_of_steps(tmp_path):
    for step in (9, 10, 100):
        save(tmp_path, step, keep=2)
    assert [step for step, _ in checkpoints(tmp_path)] == [10, 100]


def test_of_a_checkpoint_that_was_moved_the_link_alone_is_removed(tmp_path):
    """To another disk, with a symbolic link under its old name."""
    run, disk = tmp_path / "run", tmp_path / "disk"
    for step in (9, 10):
        shutil.move(save(run, step), disk / str(step))
        (run / f"checkpoint-{step}").symlink_to(disk / str(step))
    save(run, 11, keep=2)
    (run / "tmp-checkpoint-checkpoint-8-1").symlink_to(disk / "9")  # of a killed removal
    remove_unfinished(run)
    assert sorted(path.name for path in run.iterdir()) == ["checkpoint-10", "checkpoint-11"]
    assert verify(disk / "9").damage == ()


def test_saving_the_same_step_again_replaces_it(tmp_path):
    save(tmp_path, 3, settings_json='{"run": 1}')
    folder = save(tmp_path, 3, settings_json='{"run": 2}')
    assert json.loads((folder / "settings.json").read_text()) == {"run": 2}


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    save(tmp_path, 2)
    disk = DiskLog(monkeypatch)
    folder = save(tmp_path, 3)
    assert [event.split()[2] for event in disk.changes()] == ["checkpoint-3"]
    synced = {event.split()[1] for event in disk.events if event.startswith("fsync ")}
    assert {file.name for file in folder.iterdir()} < synced
    disk.check()


def test_unfinished_and_foreign_folders_do_not_count(tmp_path):
    (tmp_path / "checkpoint-5").mkdir()
    (tmp_path / "tmp-checkpoint-6-1").mkdir()
    (tmp_path / "notes").mkdir()
    assert checkpoints(tmp_path) == []
    remove_unfinished(tmp_path)
    assert not (tmp_path / "tmp-checkpoint-6-1").exists()
    assert (tmp_path / "notes").exists()


def test_a_kill_while_a_checkpoint_is_replaced(tmp_path, monkeypatch):
    """Between the two renames neither the old nor the new folder has the name."""
    before = (save(tmp_path, 3, settings_json='{"run": 1}') / "settings.json").read_text()
    rename = os.rename

    def killed(source: Path, target: Path) -> None:
        if Path(target).name == "checkpoint-3":
            raise SystemExit  # stands for a kill: what cleans up after an error does not run
        rename(source, target)

    monkeypatch.setattr(os, "rename", killed)
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
    with pytest.raises(SystemExit):
        save(tmp_path, 3, settings_json='{"run": 2}')
    monkeypatch.undo()
    assert checkpoints(tmp_path) == []
    remove_unfinished(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]
    assert (tmp_path / "checkpoint-3" / "settings.json").read_text() == before


def test_training_that_goes_on_while_a_checkpoint_is_written_changes_nothing_in_it(tmp_path):
    state = TrainerState(3, 30, 300, best_checkpoint="checkpoint-1")
    writing = CheckpointWriting(
        tmp_path, state, plan=SavePlan([optimizer_tensors(make())]), settings_json="{}",
        add_files=lambda folder: save_model(folder),
    )  # fmt: skip
    state.global_step, state.consumed_samples, state.best_checkpoint = 4, 40, "checkpoint-3"
    folder = writing.finish()
    assert verify(folder).damage == ()
    assert load_trainer_state(folder) == TrainerState(3, 30, 300, best_checkpoint="checkpoint-1")


def test_disk_full_leaves_the_older_checkpoint_and_nothing_else(tmp_path):
    """A file size limit fails the write in the middle, as a full disk does."""
    older = save(tmp_path, 1)
    before = {f.name: f.read_bytes() for f in older.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        with pytest.raises(UserError, match=r"checkpoint-2 failed.*checkpoint-1"):
            save(tmp_path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert [f.name for f in tmp_path.iterdir()] == ["checkpoint-1"]
    assert {f.name: f.read_bytes() for f in older.iterdir()} == before


def test_error_while_writing_the_model_cleans_up(tmp_path):
    def explode(folder: Path) -> None:
        (folder / "half").write_bytes(b"x")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 1, add_files=explode)
    assert list(tmp_path.iterdir()) == []


def test_no_space_left_is_named(tmp_path):
    def full(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="the disk is full"):
        save(tmp_path, 1, add_files=full)


def test_output_dir_that_cannot_be_made(tmp_path):
    blocker = tmp_path / "file"
    blocker.write_text("")
    with pytest.raises(UserError, match=r"output_dir .* cannot be written"):
        prepare_output_dir(blocker / "below")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "trainer_state.json").unlink(), "is not a checkpoint"),
        (lambda f: (f / "trainer_state.json").write_text("{"), "cannot be read"),
        (lambda f: (f / "trainer_state.json").write_text('{"what": 1}'), "cannot be read"),
    ],
)
def test_damaged_state(tmp_path, damage, message):
    folder = save(tmp_path, 1)
    damage(folder)
    with pytest.raises(UserError, match=message):
        load_trainer_state(folder)


def test_the_output_dir_named_in_place_of_a_checkpoint(tmp_path):
    newest = save(tmp_path, 1)
    with pytest.raises(UserError, match=f"is not a checkpoint.* newest checkpoint is {newest}"):
        load_trainer_state(tmp_path)


def test_damaged_or_foreign_optimizer_file(tmp_path):
    folder = save(tmp_path, 1)
    file = folder / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match=r"optimizer\.safetensors cannot be read"):
        load_optimizer(folder, make())
    foreign = updater_of(paddle.nn.Sequential(paddle.nn.LayerNorm(8)))
    with pytest.raises(UserError, match="belongs to another model"):
        load_optimizer(save(tmp_path, 2), foreign)


def test_state_fields_are_all_stored():
    """A field that cannot go through JSON would break resuming."""
    state = TrainerState(1, 2, 3, 0.1, [0.2], {"a": [1]})
    restored = TrainerState(**json.loads(json.dumps(writing.asdict(state))))
    assert restored == state


class Order:
    def record(self, state: TrainerState) -> None:
        state.data_order = {"kind": "run"}


def test_a_tokenizer_whose_folder_vanishes_is_saved_all_the_same(tmp_path):
    file = tmp_path / "tokenizer" / "tokenizer.json"
    file.parent.mkdir()
    file.write_text("{}")
    model = from_config(tiny("llama"), seed=1)
    _, updater = distribute(model, UpdateOptions(), mesh.current())
    arguments = {"tokenizer_files": [file], "settings_json": "{}", "keep": None}
    checkpointer = Checkpointer(tmp_path / "out", model, updater, Order(), **arguments)
    shutil.rmtree(file.parent)
    folder = checkpointer.save(TrainerState(global_step=1))
    assert (folder / "tokenizer.json").read_text() == "{}"
    with pytest.raises(UserError, match="a part of the tokenizer, cannot be read"):
        Checkpointer(tmp_path / "out", model, updater, Order(), **arguments)


def test_nothing_is_saved_into_an_output_dir_that_is_no_longer_the_runs(tmp_path):
    def refuse() -> None:
        raise UserError("taken over")

    model = from_config(tiny("llama"), seed=1)
    _, updater = distribute(model, UpdateOptions(), mesh.current())
    checkpointer = Checkpointer(
        tmp_path / "out", model, updater, Order(), tokenizer_files=[], settings_json="{}",
        keep=None, check_output_dir=refuse,
    )  # fmt: skip
    with pytest.raises(UserError, match="taken over"):
        checkpointer.save(TrainerState(global_step=1))
    assert not (tmp_path / "out").exists()


def test_checkpointer_restores_optimizer_state_and_loss_scale(tmp_path):
    """And a checkpoint holds weights, order of samples and the tokenizer's files."""
    (tmp_path / "tokenizer.json").write_text("{}")
    options = UpdateOptions(loss_scale=LossScale(1024.0, growth_interval=2))

    def make_run() -> tuple:
        layer = from_config(tiny("llama"), seed=1)
        model, updater = distribute(layer, options, mesh.current())
        files = [tmp_path / "tokenizer.json"]
        checkpointer = Checkpointer(
            tmp_path / "out", layer, updater, Order(),
            tokenizer_files=files, settings_json="{}", keep=1,
        )  # fmt: skip
        return model, updater, checkpointer

    ids = paddle.arange(8, 24).reshape([2, 8])
    model, updater, checkpointer = make_run()
    for _ in range(3):
        model.forward_backward([{"input_ids": ids, "labels": ids}], updater.scale)
        updater.step(1e-3)
    checkpointer.save(TrainerState(global_step=3))
    folder = tmp_path / "out" / "checkpoint-3"
    saved = load_trainer_state(folder)
    assert saved.data_order == {"kind": "run"}
    assert (folder / "tokenizer.json").is_file() and (folder / "model.safetensors").is_file()
    _, resumed, checkpointer = make_run()
    checkpointer.restore(folder, saved)
    assert resumed.scaler.state() == updater.scaler.state()
    assert resumed.scaler.scale == 2048.0
    found, expected = whole_state(resumed), whole_state(updater)
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], value) for name, value in expected.items())


def test_going_back_in_place_trains_on_as_before(tmp_path):
    """Weights, optimizer state and loss scale; also to a checkpoint of before the first update."""
    layer = from_config(tiny("llama"), seed=1)
    options = UpdateOptions(loss_scale=LossScale(1024.0, growth_interval=2))
    model, updater = distribute(layer, options, mesh.current())
    checkpointer = Checkpointer(
        tmp_path, layer, updater, Order(), tokenizer_files=[], settings_json="{}", keep=None
    )
    ids = paddle.arange(8, 24).reshape([2, 8])

    def step() -> float:
        loss = model.forward_backward([{"input_ids": ids, "labels": ids}], updater.scale)
        updater.step(1e-2)
        return loss.item()

    folders, losses = [], []
    for number in range(4):
        folders.append(checkpointer.save(TrainerState(global_step=number)))
        losses.append(step())
    for number in (2, 0, 3):
        assert checkpointer.reload(folders[number]).global_step == number
        assert [step() for _ in range(number, 4)] == losses[number:]
    flip(folders[0] / "model.safetensors", np.random.default_rng(0))
    before = [parameter.clone() for parameter in layer.parameters()]
    with pytest.raises(UserError, match=r"checkpoint-0, which is damaged: model\.safetensors has"):
        checkpointer.reload(folders[0])
    assert all(bool((a == b).all()) for a, b in zip(layer.parameters(), before, strict=True))


def test_weights_of_16_bits_go_back_in_place(tmp_path):
    layer = from_config(tiny("llama"), dtype="bfloat16", seed=1)
    _, updater = distribute(layer, UpdateOptions(), mesh.current())
    checkpointer = Checkpointer(
        tmp_path, layer, updater, Order(), tokenizer_files=[], settings_json="{}", keep=None
    )
    before = [parameter.clone() for parameter in layer.parameters()]
    folder = checkpointer.save(TrainerState())
    for parameter in layer.parameters():
        parameter.set_value(paddle.zeros_like(parameter))
    checkpointer.reload(folder)
    for parameter, value in zip(layer.parameters(), before, strict=True):
        assert parameter.dtype == paddle.bfloat16 and bool((parameter == value).all())


def test_a_tokenizer_that_vanishes_while_the_run_starts_is_an_error(tmp_path):
    settings = Settings(max_steps=1, tokenizer_name_or_path=str(tmp_path / "tokenizer"))
    assert run._tokenizer_files(settings, None) == []
    with pytest.raises(UserError, match="was removed while the run started"):
        run._tokenizer_files(settings, object())
    file = tmp_path / "vocabulary.json"  # a tokenizer may be a file
    file.write_text("{}")
    settings = Settings(max_steps=1, tokenizer_name_or_path=str(file))
    assert run._tokenizer_files(settings, object()) == [file]
