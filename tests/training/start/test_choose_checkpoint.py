"""A run goes on from the newest whole checkpoint, and says which ones are damaged."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_testing import as_of_an_earlier_version, flip, save

from pypkg.config import Settings
from pypkg.errors import UserError
from pypkg.training.checkpoint.folders import checkpoints, surplus
from pypkg.training.ledger import LEDGER_FILE, events
from pypkg.training.start.choose_checkpoint import best_checkpoint, checkpoint_to_resume
from pypkg.training.state import TrainerState

RANDOM = np.random.default_rng(0)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """output_dir with the checkpoints 10, 20 and 30."""
    for step in (10, 20, 30):
        save(tmp_path, step)
    return tmp_path


def choose(output_dir: Path, **settings: Any) -> str | None:
    chosen = checkpoint_to_resume(Settings(max_steps=100, output_dir=str(output_dir), **settings))
    return None if chosen is None else chosen.name


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != LEDGER_FILE)


def test_the_newest_if_it_is_whole(run, caplog):
    caplog.set_level(logging.INFO, "pypkg")
    assert choose(run) == "checkpoint-30"
    assert "checkpoint-30 is whole: 7 files" in caplog.text and "by checksums in" in caplog.text
    assert names(run) == ["checkpoint-10", "checkpoint-20", "checkpoint-30"]


def test_damaged_ones_are_named_and_kept_aside(run, caplog):
    flip(run / "checkpoint-30" / "model.safetensors", RANDOM)
    (run / "checkpoint-20" / "optimizer.safetensors").unlink()
    before = (run / "checkpoint-30" / "model.safetensors").read_bytes()
    assert choose(run) == "checkpoint-10"
    assert "checkpoint-30 is damaged and kept as damaged-checkpoint-30: model.saf" in caplog.text
    assert "damaged-checkpoint-20: optimizer.safetensors is missing" in caplog.text
    assert names(run) == ["checkpoint-10", "damaged-checkpoint-20", "damaged-checkpoint-30"]
    assert (run / "damaged-checkpoint-30" / "model.safetensors").read_bytes() == before
    told = [(e["event"], e["step"], e["kept_as"]) for e in events(run)]
    assert told == [("damaged_checkpoint", step, f"damaged-checkpoint-{step}") for step in (30, 20)]
    assert choose(run) == "checkpoint-10"


def test_an_older_damaged_one_is_left_alone(run):
    flip(run / "checkpoint-10" / "model.safetensors", RANDOM)
    assert choose(run) == "checkpoint-30"
    assert len(checkpoints(run)) == 3


def test_the_same_step_damaged_twice(run, tmp_path):
    for _ in range(2):
        flip(run / "checkpoint-30" / "config.json", RANDOM)
        assert choose(run) == "checkpoint-20"
        save(run, 30)
    assert {"damaged-checkpoint-30", "damaged-checkpoint-30.2"} < set(names(run))


def test_damaged_ones_are_neither_chosen_nor_removed(run):
    flip(run / "checkpoint-30" / "config.json", RANDOM)
    choose(run)
    assert [step for step, _ in checkpoints(run)] == [10, 20]
    assert [folder.name for folder in surplus(run, 1, None)] == ["checkpoint-10"]
    save(run, 40, keep=1)
    assert names(run) == ["checkpoint-40", "damaged-checkpoint-30"]


def test_a_folder_with_the_trainers_state_alone_blocks_nothing(run):
    newest = run / "checkpoint-30"
    for name in names(newest):
        if name not in ("trainer_state.json", "extra"):
            (newest / name).unlink()
    assert choose(run) == "checkpoint-20"
    assert "damaged-checkpoint-30" in names(run)


def test_a_changed_step_is_damage(run):
    file = run / "checkpoint-30" / "trainer_state.json"
    file.write_text(file.read_text().replace('"global_step": 30', '"global_step": 70'))
    assert choose(run) == "checkpoint-20"


def test_a_damaged_checkpoint_that_was_named_is_refused(run):
    flip(run / "checkpoint-30" / "model.safetensors", RANDOM)
    with pytest.raises(UserError) as caught:
        choose(run, resume_from_checkpoint=str(run / "checkpoint-30"))
    for words in ("resume_from_checkpoint is", "model.safetensors has another checksum",
                  "Name another checkpoint", "verify_checkpoint to no"):  # fmt: skip
        assert words in str(caught.value)
    assert len(checkpoints(run)) == 3
    named = {"resume_from_checkpoint": str(run / "checkpoint-20")}
    assert choose(run, **named) == "checkpoint-20"


def test_none_is_whole(run):
    for step in (10, 20, 30):
        flip(run / f"checkpoint-{step}" / "settings.json", RANDOM)
    with pytest.raises(UserError, match=r"no checkpoint in output_dir .* is whole") as caught:
        choose(run)
    assert str(caught.value).count("settings.json has another checksum") == 3
    assert "overwrite_output_dir" in str(caught.value)
    assert len(checkpoints(run)) == 3, "the same command says the same again"
    assert choose(run, overwrite_output_dir=True) is None
    assert names(run) == []


def test_sizes_alone_and_no_check(run):
    flip(run / "checkpoint-30" / "model.safetensors", RANDOM)
    assert choose(run, verify_checkpoint="no") == "checkpoint-30"
    assert choose(run, verify_checkpoint="sizes") == "checkpoint-30"
    (run / "checkpoint-30" / "tokenizer.json").write_text("")
    assert choose(run, verify_checkpoint="no") == "checkpoint-30"
    assert choose(run, verify_checkpoint="sizes") == "checkpoint-20"


def test_a_checkpoint_of_an_earlier_version(run, caplog):
    caplog.set_level(logging.INFO, "pypkg")
    as_of_an_earlier_version(run / "checkpoint-30")
    assert choose(run) == "checkpoint-30"
    assert "checkpoint-30 has no manifest" in caplog.text
    assert "cannot be verified" in caplog.text


def test_no_checkpoint(tmp_path):
    assert choose(tmp_path) is None
    assert choose(tmp_path / "absent") is None


def test_a_damaged_best_checkpoint_is_not_loaded(run, caplog):
    settings = Settings(max_steps=100, output_dir=str(run), load_best_model_at_end=True)
    state = TrainerState(30, best_checkpoint="checkpoint-20")
    assert best_checkpoint(settings, state) == run / "checkpoint-20"
    flip(run / "checkpoint-20" / "model.safetensors", RANDOM)
    assert best_checkpoint(settings, state) is None
    assert "is damaged (model.safetensors has another checksum" in caplog.text


def test_the_weights_that_a_new_run_starts_from(run, tmp_path):
    source = run / "checkpoint-30"
    first = {"continue_training": True, "model_name_or_path": str(source)}
    assert choose(tmp_path / "new", **first) is None
    flip(source / "model.safetensors", RANDOM)
    with pytest.raises(UserError, match=r"model_name_or_path is the checkpoint .* damaged: model"):
        choose(tmp_path / "new", **first)
    assert choose(tmp_path / "new", **first, verify_checkpoint="no") is None
    (source / "manifest.json").unlink()
    (source / "trainer_state.json").unlink()  # weights of another program
    assert choose(tmp_path / "new", **first) is None


def test_a_kill_while_a_checkpoint_is_removed(run, monkeypatch):
    """What is left of it has no longer the name of a checkpoint."""

    def killed(folder: Path, **_: object) -> None:
        if "checkpoint-10" in folder.name:
            (folder / "optimizer.safetensors").unlink()
            raise KeyboardInterrupt

    monkeypatch.setattr("shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        save(run, 40, keep=3)
    monkeypatch.undo()
    assert [step for step, _ in checkpoints(run)] == [20, 30, 40]
    assert choose(run) == "checkpoint-40"
