"""Settings of a run that goes on from a checkpoint."""

from __future__ import annotations

import pytest
from test_pretrain import assert_user_error


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
