"""Settings of a run that goes on from a checkpoint."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from test_pretrain import assert_user_error

from pypkg.config import Settings, load_settings
from pypkg.errors import UserError
from pypkg.models.architecture.registry import load_config
from pypkg.parallel.mesh import Degrees
from pypkg.training.checkpoint.folders import SETTINGS_FILE
from pypkg.training.checkpoint.manifest import write_manifest
from pypkg.training.checkpoint.reading import load_trainer_state
from pypkg.training.ledger import events
from pypkg.training.reporting.reporters import JsonLinesReporter, read_metrics
from pypkg.training.start.resume import check_resumed, check_resumed_model, record_resumed
from pypkg.training.state import TrainerState


def test_without_optimizer_state_only_weights_go_on(make_workplace):
    """ignore_save_lr_and_optim leaves the state out, ignore_load_lr_and_optim does not miss it."""
    first, second = make_workplace("first"), make_workplace("second")
    done = first.run(ignore_save_lr_and_optim=True)
    assert done.returncode == 0, done.stderr
    checkpoint = first.output_dir / "checkpoint-12"
    assert not (checkpoint / "optimizer.safetensors").exists()
    assert_user_error(
        first.run(ignore_save_lr_and_optim=True, max_steps=13),
        "checkpoint-12 holds no optimizer.safetensors", "ignore_load_lr_and_optim",
    )  # fmt: skip
    assert_user_error(
        first.run(ignore_load_lr_and_optim=True),
        "output_dir", "holds checkpoint-12 already", "resume_from_checkpoint",
    )  # fmt: skip
    done = second.run(ignore_load_lr_and_optim=True, resume_from_checkpoint=checkpoint)
    assert done.returncode == 0, done.stderr
    assert f"weights of {checkpoint}" in done.stderr
    assert list(second.losses()) == list(range(1, 13))
    assert second.losses()[1] < first.losses()[1] - 0.5
    # The first samples of the data and the beginning of the warm-up.
    assert second.losses("learning_rate") == first.losses("learning_rate")
    third = make_workplace("third")
    done = third.run(continue_training=True, model_name_or_path=checkpoint)
    assert done.returncode == 0, done.stderr
    assert third.losses() == pytest.approx(second.losses(), rel=1e-6)


def test_the_model_of_a_checkpoint_is_that_of_the_settings(workplace):
    """A run of another model does not go on in silence with the one that output_dir holds."""
    assert workplace.run(max_steps=2, save_steps=2).returncode == 0
    layers = load_config(workplace.folder / "model").num_hidden_layers
    assert_user_error(
        workplace.run(max_steps=4, num_hidden_layers=layers + 1),
        "checkpoint-2 holds another model than the settings ask for",
        f"num_hidden_layers is {layers}, not {layers + 1}", "overwrite_output_dir",
    )  # fmt: skip
    assert workplace.run(max_steps=4, num_hidden_layers=layers).returncode == 0


def test_other_differences_of_the_model_are_told(caplog):
    held = load_config("facebook/llama-7b")
    settings = Settings(model_name_or_path="other")
    check_resumed_model(settings, Path("c"), held.replace(vocab_size=99, pad_token_id=5), held)
    assert not caplog.messages
    check_resumed_model(settings, Path("c"), held.replace(rope_theta=5e5), held)
    assert caplog.messages == [
        "the model is that of c, which differs from model_name_or_path (other): rope_theta=10000.0"
    ]


def test_more_steps_and_fewer_steps(workplace):
    """A longer decay changes the rate at once, which the log says; fewer steps are an error."""
    assert workplace.run(max_steps=8).returncode == 0
    assert_user_error(
        workplace.run(max_steps=6), "max_steps is 6, but", "checkpoint-8 has completed 8 steps"
    )
    done = workplace.run(max_steps=12)
    assert done.returncode == 0, done.stderr
    rates = workplace.losses("learning_rate")
    assert rates[8] == 0.001 and rates[9] > 0.003
    line = next(line for line in done.stderr.splitlines() if "the learning rate of step 9" in line)
    assert f"is {rates[9]:.3g}, but would have been 0.001" in line
    assert "max_steps was 8 and is 12" in line and "a decay_steps of 8 keeps" in line
    done = workplace.run(max_steps=13, decay_steps=12)
    assert done.returncode == 0 and "the learning rate of step" not in done.stderr


@pytest.mark.parametrize("begins", [True, False])
def test_a_decay_that_begins_at_a_checkpoint_is_no_jump(tmp_path, caplog, begins):
    """Of warmup_stable_decay; where the decay ends elsewhere, the rate jumps."""
    plateau = Settings(
        learning_rate=1e-3, min_learning_rate=0.0, max_steps=100, warmup_steps=2,
        lr_scheduler_type="warmup_stable_decay", lr_wsd_decay_steps=10.0, output_dir="runs",
        model_name_or_path="llama-58m", input_dir="data", do_train=True,
    )  # fmt: skip
    (tmp_path / SETTINGS_FILE).write_text(plateau.to_json())
    decay = dataclasses.replace(
        plateau, max_steps=24, decay_steps=24.0 if begins else 18.0, lr_wsd_decay_steps=4.0
    )
    with caplog.at_level("WARNING", "pypkg"):
        check_resumed(decay, tmp_path, TrainerState(global_step=20))
    assert ("the learning rate of step 21 is 0" in caplog.text) is not begins
    assert bool(caplog.text) is not begins


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_decay_steps_are_advised_only_where_they_keep_the_rate(tmp_path, caplog, schedule):
    """Not where another schedule has changed it as well."""
    earlier = Settings(
        learning_rate=1e-3, min_learning_rate=0.0, max_steps=40, lr_scheduler_type="cosine",
        output_dir="runs", model_name_or_path="llama-58m", input_dir="data", do_train=True,
    )  # fmt: skip
    (tmp_path / SETTINGS_FILE).write_text(earlier.to_json())
    longer = dataclasses.replace(
        earlier, max_steps=80, decay_steps=80.0, lr_scheduler_type=schedule
    )
    with caplog.at_level("WARNING", "pypkg"):
        check_resumed(longer, tmp_path, TrainerState(global_step=10))
    assert "the learning rate of step 11 is 0" in caplog.text
    assert ("a decay_steps of 40 keeps" in caplog.text) is (schedule == "cosine")


def test_a_run_beyond_all_memory(workplace):
    assert workplace.run(max_steps=4).returncode == 0
    file = workplace.output_dir / "checkpoint-4" / "trainer_state.json"
    text = file.read_text()
    state = json.loads(text)
    for consumed in (10**12, 2**63 - 1):
        file.write_text(json.dumps(state | {"consumed_samples": consumed}))
        assert_user_error(
            workplace.run(max_steps=6, verify_checkpoint="no"),
            f"consumed_samples of the checkpoint is {consumed:,} ({file.parent})",
        )
    broken = state["data_order"] | {"corpora": 3}
    file.write_text(json.dumps(state | {"data_order": broken}))
    assert_user_error(workplace.run(max_steps=6, verify_checkpoint="no"), f"{file}: data_order is")
    file.write_text(text)
    assert_user_error(workplace.run(max_steps=10**12), "max_steps 1,000,000,000,000")
    long = workplace.run(max_steps=6, do_eval=True, eval_steps=2, eval_iters=10**12)
    assert_user_error(long, "eval_iters is 1,000,000,000,000")


@pytest.mark.parametrize(
    "change",
    [
        {"global_step": -3}, {"global_step": "4"}, {"global_step": True}, {"global_step": 4.5},
        {"global_step": None}, {"consumed_samples": -1}, {"consumed_samples": 10**30},
        {"consumed_tokens": []}, {"initial_loss": "x"}, {"initial_loss": float("inf")},
        {"pending_losses": [["a"]]}, {"pending_losses": 3}, {"pending_source_losses": [1.0]},
        {"data_order": 7}, {"loss_scale": [1]}, {"loss_scale": {"scale": 2.0}},
        {"skipped_steps": 5}, {"best_checkpoint": 1}, {"best_loss": "low"}, {"epoch": 1},
    ],
    ids=str,
)  # fmt: skip
def test_a_trainer_state_that_no_run_writes(tmp_path, change):
    good = {"global_step": 4, "consumed_samples": 16}
    file = tmp_path / "trainer_state.json"
    file.write_text(json.dumps(good))
    assert load_trainer_state(tmp_path) == TrainerState(4, 16)
    file.write_text(json.dumps(good | change))
    with pytest.raises(UserError) as caught:
        load_trainer_state(tmp_path)
    assert str(file) in str(caught.value) and next(iter(change)) in str(caught.value)


@pytest.mark.parametrize("content", ["[]", "3", "[" * 100_000, "{", "\x00"])
def test_a_trainer_state_that_is_something_else(tmp_path, content):
    (tmp_path / "trainer_state.json").write_text(content)
    with pytest.raises(UserError, match="cannot be read"):
        load_trainer_state(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"\xff\xfe\x00\n", b'{"loss": 1.0}\n', b"[1]\n", b"3\n", b"\n", b'{"global_step": "1"}\n',
        b'{"global_step": 1, "loss": "low"}\n', b"[" * 100_000 + b"\n",
    ],
)  # fmt: skip
def test_foreign_metrics_are_an_error_and_stay(tmp_path, content):
    file = tmp_path / "metrics.jsonl"
    before = b'{"global_step": 1, "loss": 1.0}\n' + content + b'{"global_step": 2}\n'
    file.write_bytes(before)
    with pytest.raises(UserError, match=r"line 2 of .*metrics\.jsonl is not one"):
        JsonLinesReporter(tmp_path / "metrics.jsonl", last_step=9)
    assert file.read_bytes() == before


def test_metrics_that_are_a_folder_or_end_early(tmp_path):
    file = tmp_path / "metrics.jsonl"
    assert read_metrics(file) == []
    file.write_text('{"global_step": 1, "loss": 1.0}\n{"global_step": 2, "lo')
    assert read_metrics(file) == [{"global_step": 1, "loss": 1.0}]
    file.unlink()
    file.mkdir()
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        JsonLinesReporter(tmp_path / "metrics.jsonl", last_step=9)


DEGREES = Degrees(data=2, sharding=2)


def checkpoint_of(
    folder: Path, layout: Degrees | None, unknown: Sequence[str] = (), **settings: Any
) -> TrainerState:
    """What a run with 4 ranks of samples of their own says about a step of 2 x 3 samples each."""
    given = BATCH | {"output_dir": str(folder)} | settings
    (folder / "settings.json").write_text(json.dumps(given))
    state = TrainerState(global_step=10, consumed_samples=240)
    if layout is not None:
        known = {name: value for name, value in asdict(layout).items() if name not in unknown}
        write_manifest(folder, state, known)
    return state


BATCH = {
    "model_name_or_path": "none", "input_dir": "none", "max_steps": 20,
    "per_device_train_batch_size": 2, "gradient_accumulation_steps": 3,
}  # fmt: skip


@pytest.mark.parametrize("has_manifest", [True, False])
@pytest.mark.parametrize(
    ("layout", "changes", "expected"),
    [
        (Degrees(data=4), {}, None),
        (Degrees(tensor=2, data=4), {}, None),
        (Degrees(data=2), {"gradient_accumulation_steps": 6}, None),
        (Degrees(data=8), {}, "takes 48 samples.*per_device_train_batch_size 1 keeps 24"),
        (Degrees(data=2), {}, "takes 12 samples.*gradient_accumulation_steps 6 keeps 24"),
        (Degrees(sharding=5), {}, "takes 30 samples.*no setting keeps 24"),
    ],
)
def test_another_global_batch_is_warned_of(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    has_manifest: bool,
    layout: Degrees,
    changes: dict[str, int],
    expected: str | None,
) -> None:
    """A checkpoint without a manifest tells by its samples and steps."""
    state = checkpoint_of(tmp_path, DEGREES if has_manifest else None)
    given = BATCH | {"output_dir": str(tmp_path / "out")} | changes
    settings = load_settings([word for k, v in given.items() for word in (f"--{k}", str(v))])
    with caplog.at_level(logging.WARNING, "pypkg"):
        record_resumed(settings, tmp_path, state, layout)
    kinds = [event["event"] for event in events(tmp_path / "out")]
    changed = ["layout_changed"] * has_manifest
    if expected is None:
        assert caplog.text == ""
        assert kinds == ["resumed", *changed]
    else:
        assert re.search(expected, caplog.text), caplog.text
        assert "24" in caplog.text
        assert kinds == ["resumed", *changed, "global_batch_changed"]
        event = events(tmp_path / "out")[-1]
        assert (event["step"], event["before"]) == (10, 24)


@pytest.mark.parametrize("unknown", [(), ("context", "ring")])
def test_the_same_layout_is_no_change(tmp_path: Path, unknown: tuple[str, ...]) -> None:
    """Of this version, and of one without an axis."""
    state = checkpoint_of(tmp_path, DEGREES, unknown)
    settings = load_settings([str(tmp_path / "settings.json")])
    record_resumed(settings, tmp_path, state, DEGREES)
    (event,) = events(tmp_path)
    assert event.items() >= {"event": "resumed", "step": 10, "checkpoint": str(tmp_path)}.items()
