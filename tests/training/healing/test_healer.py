"""Rollbacks, on an engine whose weight and losses follow from the samples alone."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
from paddle import Tensor
from training_testing import SavesAtOnce

from pypkg.config import load_settings
from pypkg.data import Batch
from pypkg.errors import UserError
from pypkg.training.healing.healer import Healer
from pypkg.training.healing.left_out import LeftOut
from pypkg.training.ledger import OVERWRITTEN, current_events, events, record
from pypkg.training.reporting.metrics import Throughput
from pypkg.training.reporting.reporters import JsonLinesReporter, read_metrics
from pypkg.training.state import TrainerState
from pypkg.training.trainer import Trainer

SAMPLES = 2  # of a step; step n has samples 2n - 2 and 2n - 1


class Data:
    """Samples of 8 tokens, each of which is the sample's number."""

    def __init__(self) -> None:
        self.sources = {"train": ["corpus"]}

    def train_batches(self, start: int) -> Iterator[Batch]:
        while True:
            tokens = np.repeat(np.arange(start, start + SAMPLES)[:, None], 8, axis=1)
            yield {"input_ids": tokens, "labels": tokens}
            start += SAMPLES

    def eval_batches(self, split: str = "valid") -> Iterator[Batch]:
        return iter(())

    def documents(self, first: int, stop: int) -> dict[str, list[int]]:
        return {"corpus": list(range(100 + first, 100 + stop))}


class Engine:
    """A weight that is driven by samples and learning rates; bad samples give bad values."""

    def __init__(self, losses: dict[int, float], norms: dict[int, float]) -> None:
        self.weight, self.steps = 1.0, 0
        self._losses, self._norms = losses, norms
        self._sample = 0

    def forward_backward(self, micro_batches: Sequence[Batch]) -> Tensor:
        self._sample = int(micro_batches[0]["input_ids"][0, 0])
        self.steps += 1
        loss = self._losses.get(self._sample // SAMPLES + 1, 2.0 + self.weight / 1000)
        return paddle.to_tensor(loss)

    def wait(self):
        """Nothing is under way."""

    def update(self, rate: float) -> Tensor:
        norm = self._norms.get(self._sample // SAMPLES + 1, 1.0)
        if math.isfinite(norm):
            self.weight += rate * (1 + math.sin(self._sample))
        return paddle.to_tensor(norm)


class Checkpoints(SavesAtOnce):
    """Folders, and in memory what they hold."""

    def __init__(self, output_dir: Path, engine: Engine) -> None:
        self.output_dir, self.engine = output_dir, engine
        self.held: dict[Path, tuple[TrainerState, float]] = {}

    def save(self, state: TrainerState) -> Path:
        folder = self.output_dir / f"checkpoint-{state.global_step}"
        folder.mkdir(exist_ok=True)
        self.held[folder] = copy.deepcopy(state), self.engine.weight
        return folder

    def reload(self, checkpoint: Path) -> TrainerState:
        state, self.engine.weight = self.held[checkpoint]
        return copy.deepcopy(state)


class Run:
    """A trainer of 12 steps in ``output_dir``, with bad values at some steps' samples.

    Args:
        losses, norms: by the number of the step that has these samples.
        start: state and weight of an earlier run's checkpoint.
    """

    def __init__(
        self,
        output_dir: Path,
        losses: dict[int, float] | None = None,
        norms: dict[int, float] | None = None,
        start: tuple[TrainerState, float] | None = None,
        **settings: Any,
    ) -> None:
        given = {
            "model_name_or_path": "none", "input_dir": "none", "output_dir": output_dir,
            "do_train": True, "max_steps": 12, "per_device_train_batch_size": SAMPLES,
            "max_seq_length": 8, "disable_tqdm": True, "save_steps": 4, "logging_steps": 1,
            "learning_rate": 1.0, "min_learning_rate": 0.0, "warmup_steps": 2,
        } | settings  # fmt: skip
        loaded = load_settings([w for k, v in given.items() for w in (f"--{k}", str(v))])
        output_dir.mkdir(exist_ok=True)
        self.output_dir = output_dir
        self.engine = Engine(losses or {}, norms or {})
        self.state = TrainerState()
        self.checkpoints = Checkpoints(output_dir, self.engine)
        folder = None
        if start is not None:
            self.state.become(copy.deepcopy(start[0]))
            self.engine.weight = start[1]
            folder = self.checkpoints.save(self.state)
        data = Data()
        self.metrics = output_dir / "metrics.jsonl"
        self.trainer = Trainer(
            loaded,
            self.engine,
            self.state,
            data=data,
            checkpointer=self.checkpoints,
            healer=Healer(
                loaded,
                self.state,
                checkpointer=self.checkpoints,
                samples=data,
                start=folder,
                events=current_events(output_dir),
            ),
            reporters=[JsonLinesReporter(self.metrics, self.state.global_step)],
            throughput=Throughput(1.0, None),
        )

    def train(self) -> Run:
        self.trainer.train()
        return self

    def result(self) -> tuple[Any, ...]:
        """What has to be the same where a run is the same."""
        names = ("loss", "learning_rate", "grad_norm", "consumed_tokens")
        rows = [[row["global_step"], *map(row.get, names)] for row in read_metrics(self.metrics)]
        return rows, self.engine.weight, self.state

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in events(self.output_dir) if event["event"] == kind]


BAD = [
    ({7: math.nan}, {}, "the loss is nan"),
    ({7: math.inf}, {7: math.nan}, "the loss is inf"),
    ({}, {7: math.nan}, "the gradient norm is nan"),
    ({}, {7: math.inf}, "the gradient norm is inf"),
]


@pytest.mark.parametrize(("losses", "norms", "reason"), BAD)
@pytest.mark.parametrize("logging_steps", [1, 3, 12])
def test_a_bad_step_ends_as_if_it_had_been_skipped_by_hand(
    tmp_path: Path, losses: Any, norms: Any, reason: str, logging_steps: int
) -> None:
    """Whenever the host learns of it: at a log line or before a save."""
    steps = {"logging_steps": logging_steps}
    by_hand = Run(tmp_path / "hand", losses, norms, skip_data_intervals="[[7, 7]]", **steps).train()
    healed = Run(tmp_path / "healed", losses, norms, **steps).train()
    assert healed.result() == by_hand.result()
    assert (healed.state.global_step, healed.state.skipped_steps) == (12, 1)
    (event,) = healed.events("rollback")
    assert event.items() >= {
        "step": 7, "reason": reason, "to_step": 4, "steps": [7, 7], "samples": [12, 14],
        "checkpoint": str(tmp_path / "healed" / "checkpoint-4"),
    }.items()  # fmt: skip
    for run, why in ((by_hand, "skip_data_intervals"), (healed, "rollback")):
        (event,) = run.events("skipped")
        assert event.items() >= {
            "step": 7, "reason": why, "samples": [12, 14], "documents": {"corpus": [112, 113]}
        }.items()  # fmt: skip


def test_a_line_of_the_ledger_names_few_documents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step of a large batch has thousands."""
    few, many = list(range(100)), [*range(5, 1005, 10), 2000]
    monkeypatch.setattr(Data, "documents", lambda *_: {"few": few, "many": many})
    (event,) = Run(tmp_path, {7: math.nan}).train().events("skipped")
    assert event["documents"] == {"few": few, "many": {"count": 101, "first": 5, "last": 2000}}


def test_several_bad_steps_and_the_last_one(tmp_path: Path) -> None:
    healed = Run(tmp_path, {6: math.nan, 12: math.nan}, {7: math.nan}).train()
    assert [event["step"] for event in healed.events("rollback")] == [6, 7, 12]
    assert [event["to_step"] for event in healed.events("rollback")] == [4, 4, 8]
    assert (healed.state.global_step, healed.state.skipped_steps) == (12, 3)
    assert healed.checkpoints.held[tmp_path / "checkpoint-12"][0].skipped_steps == 3
    assert [row["global_step"] for row in read_metrics(healed.metrics)] == [
        step for step in range(1, 12) if step not in (6, 7)
    ]


def test_the_same_ledger_gives_the_same_run(tmp_path: Path) -> None:
    """From the start in another folder, and from a checkpoint of before the rollback."""
    bad: dict[int, float] = {6: math.nan, 11: math.inf}
    first = Run(tmp_path / "first", bad).train()
    (tmp_path / "again").mkdir()
    ledger = (tmp_path / "first" / "ledger.jsonl").read_bytes()
    (tmp_path / "again" / "ledger.jsonl").write_bytes(ledger)
    again = Run(tmp_path / "again", bad).train()
    assert again.result() == first.result()
    assert again.engine.steps == 10  # none of them twice
    assert (tmp_path / "again" / "ledger.jsonl").read_bytes() == ledger
    start = first.checkpoints.held[tmp_path / "first" / "checkpoint-4"]
    resumed = Run(tmp_path / "first", bad, start=start).train()
    assert resumed.result()[1:] == first.result()[1:]
    assert (tmp_path / "first" / "ledger.jsonl").read_bytes() == ledger


@pytest.mark.parametrize(("batch", "steps"), [(1, [12, 13]), (4, [4])])
def test_samples_stay_left_out_where_the_global_batch_changes(batch: int, steps: list[int]) -> None:
    """Samples 12 to 14 are in steps 13 and 14 of one sample, and in step 4 of four."""
    left_out = LeftOut(lambda step: False, [{"event": "rollback", "samples": [12, 14]}])
    found = [n for n in range(20) if left_out.reason(n + 1, n * batch, (n + 1) * batch)]
    assert found == [n if batch == 1 else n - 1 for n in steps]


def test_too_many_rollbacks_stop_the_run(tmp_path: Path) -> None:
    bad: dict[int, float] = dict.fromkeys(range(6, 13), math.nan)
    run = Run(tmp_path, bad)
    with pytest.raises(UserError, match=r"the loss is nan at step 9 .*max_rollbacks \(3\)"):
        run.train()
    assert [event["step"] for event in run.events("rollback")] == [6, 7, 8]
    assert [event["step"] for event in run.events("stopped")] == [9]
    start = run.checkpoints.held[tmp_path / "checkpoint-4"]
    again = Run(tmp_path, bad, start=start)  # with the three left out, and counting anew
    with pytest.raises(UserError, match="at step 12 "):
        again.train()


def test_rollbacks_of_long_ago_do_not_count(tmp_path: Path) -> None:
    bad: dict[int, float] = {5: math.nan, 6: math.nan, 9: math.nan, 10: math.nan}
    with pytest.raises(UserError, match="at step 10 "):
        Run(tmp_path / "few", bad).train()
    Run(tmp_path / "window", bad, rollback_window=5).train()


@pytest.mark.parametrize(
    ("settings", "bad", "message"),
    [
        ({"max_rollbacks": 0}, 7, r"max_rollbacks \(0\)"),
        ({}, 3, "there is no checkpoint to go back to"),
        ({"save_strategy": "no"}, 7, "there is no checkpoint to go back to"),
        ({"ignore_save_lr_and_optim": True}, 7, "there is no checkpoint to go back to"),
    ],
)
def test_where_there_is_no_way_back_the_run_stops(
    tmp_path: Path, settings: dict[str, Any], bad: int, message: str
) -> None:
    run = Run(tmp_path, {bad: math.nan}, **settings)
    with pytest.raises(UserError, match=rf"the loss is nan at step {bad} .*{message}"):
        run.train()
    assert [event["event"] for event in events(tmp_path)] == ["stopped"]


def test_it_goes_back_to_the_checkpoint_that_it_started_from(tmp_path: Path) -> None:
    first = Run(tmp_path / "first").train()
    start = first.checkpoints.held[tmp_path / "first" / "checkpoint-4"]
    run = Run(tmp_path / "second", {6: math.nan}, start=start).train()
    assert [event["to_step"] for event in run.events("rollback")] == [4]


def test_steps_before_the_bad_one_are_left_out_as_well(tmp_path: Path) -> None:
    """Back to before them; the checkpoint among them is of steps that are left out."""
    bad: dict[int, float] = {9: math.nan}
    by_hand = Run(tmp_path / "hand", bad, skip_data_intervals="[[7, 9]]").train()
    healed = Run(tmp_path / "healed", bad, rollback_skip_steps=3).train()
    assert healed.result() == by_hand.result()
    (event,) = healed.events("rollback")
    assert (event["to_step"], event["steps"], event["samples"]) == (4, [7, 9], [12, 18])
    assert not (tmp_path / "healed" / "checkpoint-8").exists()


def test_but_none_that_the_oldest_checkpoint_holds(tmp_path: Path) -> None:
    healed = Run(tmp_path, {6: math.nan}, rollback_skip_steps=5).train()
    (event,) = healed.events("rollback")
    assert (event["to_step"], event["steps"]) == (4, [5, 6])


def test_a_spike_is_left_out_only_if_asked(tmp_path: Path) -> None:
    spikes: dict[int, float] = {11: 9.0}
    assert Run(tmp_path / "off", spikes, spike_window=8).train().events("rollback") == []
    on = {"spike_window": 8, "loss_spike_threshold": 10}
    healed = Run(tmp_path / "on", spikes, **on).train()
    by_hand = Run(tmp_path / "hand", spikes, **on, skip_data_intervals="[[11, 11]]").train()
    assert healed.result() == by_hand.result()
    (event,) = healed.events("rollback")
    assert event["reason"].startswith("the loss is 9, ")
    norms = Run(
        tmp_path / "norm", {}, {11: 50.0}, spike_window=8, grad_norm_spike_threshold=10
    ).train()
    (event,) = norms.events("rollback")
    assert event["reason"].startswith("the gradient norm is 50, ")


def test_a_resumed_run_finds_the_same_spike(tmp_path: Path) -> None:
    """Its window began before the checkpoint."""
    on = {"spike_window": 8, "loss_spike_threshold": 10}
    first = Run(tmp_path / "first", {11: 9.0}, **on).train()
    start = first.checkpoints.held[tmp_path / "first" / "checkpoint-8"]
    resumed = Run(tmp_path / "second", {11: 9.0}, start=start, **on).train()
    assert [event["step"] for event in resumed.events("rollback")] == [11]
    assert resumed.result()[1:] == first.result()[1:]


def test_a_run_that_starts_anew_in_the_folder_forgets_the_rollbacks(tmp_path: Path) -> None:
    Run(tmp_path, {7: math.nan}).train()
    record(tmp_path, OVERWRITTEN, step=0)
    assert Run(tmp_path).train().state.skipped_steps == 0


def test_a_bad_step_is_not_saved_when_a_signal_stops_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path, {6: math.nan}, logging_steps=12)
    monkeypatch.setattr(
        "pypkg.training.trainer.watchdog.is_to_stop", lambda number: run.state.global_step == 7
    )
    monkeypatch.setattr("pypkg.training.trainer.watchdog.finish", lambda signal_number: 15)
    with caplog.at_level(logging.WARNING, "pypkg"):
        run.train()
    assert "the loss is nan at step 6: nothing is saved" in caplog.text
    assert [folder.name for folder in run.checkpoints.held] == ["checkpoint-4"]
