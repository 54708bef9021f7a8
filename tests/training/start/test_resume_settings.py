"""Settings of a run that goes on from a checkpoint."""

from __future__ import annotations

import json

import pytest
from test_pretrain import assert_user_error

from pypkg.errors import UserError
from pypkg.training.checkpoint.reading import load_trainer_state
from pypkg.training.reporting.reporters import make_reporters, read_metrics
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


def test_a_run_beyond_all_memory(workplace):
    assert workplace.run(max_steps=4).returncode == 0
    file = workplace.output_dir / "checkpoint-4" / "trainer_state.json"
    text = file.read_text()
    state = json.loads(text)
    for consumed in (10**12, 2**63 - 1):
        file.write_text(json.dumps(state | {"consumed_samples": consumed}))
        assert_user_error(
            workplace.run(max_steps=6, verify_checkpoint="no"),
            f"consumed_samples of the checkpoint is {consumed:,}",
        )
    file.write_text(text)
    assert_user_error(workplace.run(max_steps=10**12), "max_steps 1,000,000,000,000")


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
        make_reporters((), tmp_path, None, 9)
    assert file.read_bytes() == before


def test_metrics_that_are_a_folder_or_end_early(tmp_path):
    file = tmp_path / "metrics.jsonl"
    assert read_metrics(file) == []
    file.write_text('{"global_step": 1, "loss": 1.0}\n{"global_step": 2, "lo')
    assert read_metrics(file) == [{"global_step": 1, "loss": 1.0}]
    file.unlink()
    file.mkdir()
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        make_reporters((), tmp_path, None, 9)
