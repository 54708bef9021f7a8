"""Settings of when a run trains, evaluates and saves, and which model it ends with."""

from __future__ import annotations

import json

import pytest
from distributed_testing import run_ranks
from training_testing import ROOT

from pypkg.training.checkpoint.reading import load_trainer_state

PRETRAIN = ROOT / "tests/distributed/runs/pretrain_worker.py"


def test_skipped_steps_pass_over_their_samples(make_workplace):
    """The steps around them see the samples that they see without the interval."""
    whole, skipping = make_workplace("whole"), make_workplace("skipping")
    changes = {"learning_rate": 1e-30, "min_learning_rate": 0, "max_steps": 10}
    assert whole.run(**changes).returncode == 0
    changes["skip_data_intervals"] = "[[3, 5], [7, 7]]"
    # Stops within an interval and goes on.
    assert skipping.run(**changes | {"max_steps": 8, "decay_steps": 10}).returncode == 0
    done = skipping.run(**changes)
    assert done.returncode == 0, done.stderr
    trained = [1, 2, 6, 8, 9, 10]
    # The weights stay what they were, so a loss depends on the samples alone.
    assert skipping.losses() == {step: whole.losses()[step] for step in trained}
    assert list(skipping.losses("learning_rate").values()) == pytest.approx(
        list(whole.losses("learning_rate").values())[: len(trained)], rel=1e-12
    )
    state = load_trainer_state(skipping.output_dir / "checkpoint-10")
    assert (state.global_step, state.skipped_steps) == (10, 4)
    assert state.consumed_samples == 10 * 2 * 2
    assert state.consumed_tokens == 6 * 2 * 2 * 16
    assert (whole.steps(), skipping.steps()) == ([4, 8, 10], [8, 10])


def test_an_epoch_is_the_run(workplace):
    done = workplace.run(evaluation_strategy="epoch", save_strategy="epoch", save_steps=1)
    assert done.returncode == 0, done.stderr
    assert workplace.steps() == list(workplace.losses("eval_loss")) == [12]


def test_the_evaluation_before_the_first_step_is_that_of_the_model_as_it_is(make_workplace):
    """A run that only evaluates has the same loss; one that resumes does not repeat it."""
    alone, trained = make_workplace("alone"), make_workplace("trained")
    assert alone.run(do_train=False, do_eval=True).returncode == 0
    (loss,) = alone.losses("eval_loss").values()
    changes = {"do_eval": True, "eval_on_start": True, "eval_steps": 4, "save_steps": 4}
    for max_steps in (4, 8):
        done = trained.run(**changes, max_steps=max_steps)
        assert done.returncode == 0, done.stderr
    losses = trained.losses("eval_loss")
    assert list(losses) == [0, 4, 8] and losses[0] == loss > losses[4]


def test_the_run_ends_with_the_best_model(workplace):
    """A rate that destroys the model after step 6 makes an earlier checkpoint the best."""
    changes = {
        "load_best_model_at_end": True, "save_total_limit": 1, "save_steps": 3, "eval_steps": 3,
        "do_predict": True, "split": "60,20,20", "max_grad_norm": 0,
    }  # fmt: skip
    assert workplace.run(**changes, max_steps=6, learning_rate=0.02).returncode == 0
    before = workplace.losses("eval_loss")
    done = workplace.run(**changes, learning_rate=3, min_learning_rate=3)
    assert done.returncode == 0, done.stderr
    losses = workplace.losses("eval_loss")
    best = min(losses, key=losses.get)
    assert best in before and losses[12] > losses[best] + 0.5
    assert workplace.steps() == [best, 12]
    folder = workplace.output_dir / f"checkpoint-{best}"
    assert f"the best model is {folder}" in done.stderr
    summary = json.loads((workplace.output_dir / "summary.json").read_text())
    assert summary["checkpoint"] == str(folder)
    assert summary["test_loss"] == pytest.approx(losses[best], abs=0.3)


def test_the_whole_split_counts_once_whatever_the_batches(make_workplace):
    """The loss of all 25 samples of the validation split, in batches of several sizes."""
    losses = {}
    for rows, processes in ((1, 1), (4, 1), (50, 1), (5, 2)):
        place = make_workplace(f"{rows}-{processes}")
        arguments = place.command(
            eval_iters=-1, do_train=False, do_predict=True, split="60,20,20",
            per_device_eval_batch_size=rows,
        )[3:]  # fmt: skip
        assert run_ranks(PRETRAIN, processes, arguments, logs=place.folder) == [0] * processes
        said = (place.folder / "0.log").read_text()
        assert "an evaluation takes 25 samples of the validation split, which has 25" in said
        summary = json.loads((place.output_dir / "summary.json").read_text())
        losses[rows, processes] = (summary["eval_loss"], summary["test_loss"])
    assert len({round(loss, 3) for loss, _ in losses.values()}) == 1
    for found in losses.values():
        assert found == pytest.approx(losses[1, 1], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("optim", ["muon", "adafactor", "adamw_8bit"])
def test_a_run_of_new_optimizers_goes_on_where_it_stopped(make_workplace, optim):
    """With a growing batch, a plateau, z-loss and rates of groups: the losses of one whole run."""
    whole, stopped = make_workplace("whole"), make_workplace("stopped")
    changes = {
        "optim": optim, "z_loss": 1e-4, "log_layer_grad_norms": True, "embedding_lr_scale": 0.5,
        "lr_scheduler_type": "warmup_stable_decay", "lr_wsd_decay_steps": 4, "decay_steps": 12,
        "gradient_accumulation_steps": 3, "rampup_batch_size": "[2, 2, 12]", "logging_steps": 1,
        "sample_order": "epoch",
    }  # fmt: skip
    done = whole.run(**changes)
    assert done.returncode == 0, done.stderr
    assert stopped.run(**changes, max_steps=5).returncode == 0
    done = stopped.run(**changes)
    assert done.returncode == 0, done.stderr
    assert "the learning rate of step" not in done.stderr
    assert stopped.losses() == whole.losses() and len(whole.losses()) == 12
    assert stopped.losses("grad_norm/layers.0") == whole.losses("grad_norm/layers.0")
    # Steps of 2, 2, 2, 4, 4 samples, and then of 6.
    tokens = list(whole.losses("consumed_tokens").values())
    per_sample = tokens[0] // 2
    assert tokens == [per_sample * n for n in (2, 4, 6, 10, 14, 20, 26, 32, 38, 44, 50, 56)]
    state = load_trainer_state(stopped.output_dir / "checkpoint-12")
    assert state.consumed_samples == 56


@pytest.mark.slow
def test_a_decay_from_a_checkpoint_of_a_plateau(make_workplace):
    """In another folder, on the samples that the plateau would have had."""
    plateau, decay = make_workplace("plateau"), make_workplace("decay")
    common = {"sample_order": "epoch", "lr_scheduler_type": "warmup_stable_decay"}
    common |= {"logging_steps": 1, "save_steps": 4, "min_learning_rate": 0.0}
    done = plateau.run(**common, max_steps=8, lr_wsd_decay_steps=1)
    assert done.returncode == 0, done.stderr
    checkpoint = plateau.output_dir / "checkpoint-4"
    changes = {"max_steps": 7, "lr_wsd_decay_steps": 3, "lr_wsd_decay_style": "linear"}
    done = decay.run(**common, **changes, resume_from_checkpoint=checkpoint)
    assert done.returncode == 0, done.stderr
    assert "the learning rate of step" not in done.stderr
    assert list(decay.losses()) == [5, 6, 7]
    # A loss is of the weights before the update, so the first one is that of the plateau.
    assert decay.losses()[5] == plateau.losses()[5]
    assert decay.losses()[6] != plateau.losses()[6]
    peak = plateau.losses("learning_rate")[4]
    rates = decay.losses("learning_rate")
    assert list(rates.values()) == pytest.approx([peak * 2 / 3, peak / 3, 0.0], abs=1e-12)
