"""The training loop on an engine whose work takes no time but that of a clock."""

from __future__ import annotations

import logging
import math
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from paddle import Tensor
from trainer_testing import SETTINGS, Data, Rows, Saver, TimedEngine
from training_testing import Clock, healer

from pypkg.config import load_settings
from pypkg.errors import UserError
from pypkg.parallel import mesh
from pypkg.training.reporting.metrics import Throughput
from pypkg.training.reporting.outcome import Outcome
from pypkg.training.reporting.progress import Progress
from pypkg.training.state import TrainerState
from pypkg.training.step.engine import Engine
from pypkg.training.trainer import Trainer


@pytest.fixture
def rows() -> Rows:
    return Rows()


@pytest.fixture
def make_trainer(clock: Clock, rows: Rows, tmp_path: Path) -> Any:
    def make(
        seconds_per_batch: float = 0.0, state: TrainerState | None = None, **settings: Any
    ) -> Trainer:
        given = SETTINGS | {"output_dir": tmp_path} | settings
        words = [word for key, value in given.items() for word in (f"--{key}", str(value))]
        loaded, state = load_settings(words), state or TrainerState()
        return Trainer(
            loaded,
            TimedEngine(clock),
            state,
            data=Data(clock, seconds_per_batch),
            checkpointer=Saver(clock),
            healer=healer(loaded, state),
            reporters=[rows],
            throughput=Throughput(1.0, None),
        )

    return make


@pytest.mark.parametrize("logging_steps", [1, 2, 3, 4, 6])
@pytest.mark.parametrize(("eval_steps", "save_steps"), [(1, 12), (2, 3), (3, 2), (5, 7), (12, 1)])
def test_evaluations_and_checkpoints_do_not_slow_training(
    make_trainer: Any,
    clock: Clock,
    rows: Rows,
    logging_steps: int,
    eval_steps: int,
    save_steps: int,
) -> None:
    """16 tokens a second, whichever of them comes between two log lines."""
    outcome = make_trainer(
        do_eval=True,
        evaluation_strategy="steps",
        logging_steps=logging_steps,
        eval_steps=eval_steps,
        save_steps=save_steps,
    ).train()
    steps = range(logging_steps, 13, logging_steps)
    assert rows.of("tokens_per_second_per_device") == dict.fromkeys(steps, 16.0)
    assert rows.of("consumed_tokens") == {step: 16 * step for step in steps}
    assert outcome.tokens_per_second == 16
    evaluations = len([s for s in range(1, 13) if s % eval_steps == 0 or s == 12])
    saves = len([s for s in range(1, 13) if s % save_steps == 0 or s == 12])
    assert clock.seconds == 12 + 100 * evaluations + 1000 * saves


def test_a_log_line_tells_means_over_its_steps(make_trainer: Any, rows: Rows) -> None:
    """4 micro batches of 0.25 s and an update of 1 s make a step of 64 tokens."""
    trainer = make_trainer(0.25, gradient_accumulation_steps=4, logging_steps=3, save_strategy="no")
    outcome = trainer.train()
    assert rows.of("loss") == {3: 2.0, 6: 5.0, 9: 8.0, 12: 11.0}
    assert rows.of("data_wait_seconds_per_step") == dict.fromkeys((3, 6, 9, 12), 1.0)
    assert rows.of("tokens_per_second_per_device") == dict.fromkeys((3, 6, 9, 12), 32.0)
    assert (outcome.state.initial_loss, outcome.final_loss) == (1.0, 11.0)
    assert outcome.state.consumed_samples == 96


def test_counts_are_those_of_all_ranks(
    monkeypatch: pytest.MonkeyPatch, make_trainer: Any, rows: Rows
) -> None:
    """Of 8 ranks, of which pairs share their samples; speed is that of one."""
    degrees = mesh.Degrees(data=2, sharding=2, tensor=2)
    monkeypatch.setattr(mesh, "_current", mesh.Mesh(degrees))
    outcome = make_trainer(logging_steps=4, save_strategy="no").train()
    assert rows.of("consumed_tokens") == {4: 256, 8: 512, 12: 768}
    assert outcome.state.consumed_samples == 96
    assert rows.of("tokens_per_second_per_device") == dict.fromkeys((4, 8, 12), 8.0)


@pytest.mark.parametrize("first", [1, 2, 9])
def test_skipped_steps_take_samples_alone(make_trainer: Any, rows: Rows, first: int) -> None:
    """Two of twelve steps; the learning rate, which rises by 0.1 a step, waits."""
    trainer = make_trainer(
        skip_data_intervals=f"[[{first}, {first + 1}]]",
        warmup_steps=12,
        learning_rate=1.2,
        logging_steps=1,
        save_strategy="no",
    )
    outcome = trainer.train()
    trained = [step for step in range(1, 13) if step not in (first, first + 1)]
    updates = dict(zip(trained, range(1, 11), strict=True))
    assert rows.of("loss") == updates
    assert rows.of("learning_rate") == pytest.approx({s: 0.1 * n for s, n in updates.items()})
    assert outcome.state.initial_loss == 1.0
    assert (outcome.state.consumed_samples, outcome.state.consumed_tokens) == (24, 160)


def test_a_run_resumed_before_its_first_update_records_its_initial_loss(make_trainer: Any) -> None:
    state = TrainerState(global_step=2, skipped_steps=2, consumed_samples=4)
    trainer = make_trainer(state=state, skip_data_intervals="[[1, 2]]", save_strategy="no")
    assert trainer.train().state.initial_loss == 1.0


def test_an_evaluation_of_an_earlier_step_makes_no_checkpoint_the_best(make_trainer: Any) -> None:
    """The evaluation is at step 6, and a signal asks for a checkpoint at step 8."""
    trainer = make_trainer(
        do_eval=True, evaluation_strategy="steps", eval_steps=6, save_steps=12,
        load_best_model_at_end=True,
    )  # fmt: skip
    update, rates = trainer.engine.update, []

    def interrupted(rate: float) -> Tensor:
        rates.append(rate)
        if len(rates) == 8:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(rate)

    trainer.engine.update = interrupted
    assert trainer.train().exit_code == 128 + signal.SIGTERM
    assert (trainer.state.global_step, trainer.evaluator.loss) == (8, 1.0)
    assert trainer.state.best_checkpoint is None


@pytest.mark.parametrize(
    ("best_loss", "best_checkpoint"), [(None, None), (0.5, "checkpoint-4"), (2.0, "checkpoint-4")]
)
def test_a_checkpoint_without_an_evaluation_is_not_the_best(
    make_trainer: Any, best_loss: float | None, best_checkpoint: str | None
) -> None:
    """A signal asks for one at step 1; the first evaluation, of loss 1.0, is at step 6."""
    trainer = make_trainer(
        do_eval=True, evaluation_strategy="steps", eval_steps=6, save_steps=6,
        load_best_model_at_end=True,
    )  # fmt: skip
    trainer.state.best_loss, trainer.state.best_checkpoint = best_loss, best_checkpoint
    update = trainer.engine.update

    def interrupted(rate: float) -> Tensor:
        os.kill(os.getpid(), signal.SIGTERM)
        return update(rate)

    trainer.engine.update = interrupted
    assert trainer.train().exit_code == 128 + signal.SIGTERM
    assert trainer.state.global_step == 1
    assert (trainer.state.best_loss, trainer.state.best_checkpoint) == (best_loss, best_checkpoint)
    trainer.engine.update = update
    trainer.train()
    better = best_loss is None or best_loss > 1
    expected = (1.0, "checkpoint-6") if better else (best_loss, best_checkpoint)
    assert (trainer.state.best_loss, trainer.state.best_checkpoint) == expected


@pytest.mark.parametrize("step", [1, 5, 6, 8])
def test_the_step_whose_loss_is_not_finite_is_named(make_trainer: Any, step: int) -> None:
    trainer = make_trainer(logging_steps=4, save_strategy="no")
    trainer.engine.losses[step - 1] = math.nan
    with pytest.raises(UserError, match=f"the loss is nan at step {step} "):
        trainer.train()


@pytest.mark.parametrize("step", [1, 5, 8])
@pytest.mark.parametrize("norm", [math.nan, math.inf])
def test_a_step_whose_gradient_norm_is_not_finite_is_not_saved(
    make_trainer: Any, step: int, norm: float
) -> None:
    """Its loss is finite, and a checkpoint is due before the log line."""
    trainer = make_trainer(logging_steps=12, save_steps=1)
    saved = record_saves(trainer)
    trainer.engine.norms[step - 1] = norm
    with pytest.raises(UserError, match=f"the gradient norm is {norm} at step {step} "):
        trainer.train()
    assert saved == list(range(1, step))


def test_a_loss_scale_makes_norms_that_are_not_finite_common(make_trainer: Any, rows: Rows) -> None:
    trainer = make_trainer(logging_steps=4, save_strategy="no", fp16=True)
    trainer.engine.norms[1] = math.inf
    trainer.train()
    assert list(rows.of("loss")) == [4, 8, 12]


def record_saves(trainer: Trainer) -> list[int]:
    """Steps whose checkpoints are written from now on."""
    saved, save = [], trainer.checkpointer.save

    def recorded(state: TrainerState) -> Path:
        saved.append(state.global_step)
        return save(state)

    trainer.checkpointer.save = recorded
    return saved


def test_steps_without_labels_change_nothing_and_say_so_once(
    make_trainer: Any,
    rows: Rows,
    clock: Clock,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Steps 2, 3 and 5 to 8: not updated, left out of means, and their samples count as read."""
    trainer = make_trainer(logging_steps=2, save_strategy="no")
    for step in (2, 3, 5, 6, 7, 8):
        trainer.engine.losses[step - 1] = None
    with caplog.at_level(logging.WARNING, "pypkg"):
        outcome = trainer.train()
    assert clock.seconds == 6  # of as many updates
    assert rows.of("loss") == {2: 1.0, 4: 4.0, 10: 9.5, 12: 11.5}
    assert outcome.state.consumed_samples == 24
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("step 2 has no label that counts for the loss")


def test_the_step_after_one_without_labels_is_named(make_trainer: Any) -> None:
    trainer = make_trainer(logging_steps=4, save_strategy="no")
    trainer.engine.losses[1:3] = [None, math.nan]
    with pytest.raises(UserError, match="the loss is nan at step 3 "):
        trainer.train()


def test_time_left_after_a_resume(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """From step 6 on, two steps took 20 s; four are left."""
    given = SETTINGS | {"output_dir": tmp_path}
    settings = load_settings([w for k, v in given.items() for w in (f"--{k}", str(v))])
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock)
    with caplog.at_level(logging.INFO, "pypkg"), Progress(settings, 6) as progress:
        clock.seconds += 20
        metrics = {"loss": 1.5, "tokens_per_second_per_device": 1234.0, "grad_norm/layers.0": 0.5}
        progress.log(8, metrics)
        clock.seconds += 7180
        progress.log(9, {"eval_loss": 1.25})
    assert [record.getMessage() for record in caplog.records] == [
        "step 8/12 | loss 1.5000 | 1,234 tokens/s | 0m40s left",
        "step 9/12 | eval loss 1.2500 | 2h00m left",
    ]


class EvaluatedModel:
    """A model whose loss is in its batch, and that knows its mode."""

    def __init__(self) -> None:
        self.training = True

    def train(self) -> None:
        self.training = True

    def eval(self) -> None:
        self.training = False

    def evaluate(self, batch: dict[str, Tensor]) -> Tensor:
        assert not self.training
        return batch["loss"]


# Losses 1, 2, 6 of 4, 0, 2 labels.
EVALUATED = [
    {"loss": np.array(loss, np.float32), "labels": np.array([1] * count + [-100] * (4 - count))}
    for loss, count in ((1, 4), (2, 0), (6, 2))
]


@pytest.mark.parametrize(
    ("normalization", "expected"), [("global", (4 + 12) / 6), ("micro_batch", 3.5)]
)
def test_evaluation_is_a_mean_and_returns_to_training(normalization: str, expected: float) -> None:
    model = EvaluatedModel()
    engine = Engine(model, None, normalization=normalization)
    assert engine.evaluate(EVALUATED) == pytest.approx(expected, rel=1e-6)
    assert model.training


def test_evaluation_without_labels() -> None:
    assert math.isnan(Engine(EvaluatedModel(), None).evaluate(EVALUATED[1:2]))


def test_losses_of_an_earlier_part_of_the_run_complete_the_outcome() -> None:
    """A run that has nothing left to do tells the last losses in metrics.jsonl."""
    rows = [{"loss": 3.0}, {"eval_loss": 2.5}, {"loss": 2.0}, {"eval_loss": 1.5}, {"loss": 1.0}]
    empty = Outcome(TrainerState(), None, None, None, None, 0)
    complete = empty.completed_from(rows)
    assert (complete.final_loss, complete.eval_loss) == (1.0, 1.5)
    known = Outcome(TrainerState(), 0.5, 0.25, None, None, 0).completed_from(rows)
    assert (known.final_loss, known.eval_loss) == (0.5, 0.25)
