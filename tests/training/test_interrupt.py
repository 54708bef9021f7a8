"""Signals: acknowledged at once, honoured at the next point to stop, within a time of grace."""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import paddle
import pytest
from training_testing import SavesAtOnce, healer

from pypkg import pretrain
from pypkg.config import load_settings
from pypkg.console import progress
from pypkg.data import Batch
from pypkg.errors import UserError
from pypkg.training import interrupt
from pypkg.training.interrupt import InterruptRequest
from pypkg.training.reporting.metrics import Throughput
from pypkg.training.start import start_up
from pypkg.training.state import TrainerState
from pypkg.training.trainer import Trainer

STEPS, EVAL_BATCHES = 3, 4


class Engine:
    """Every loss is 1; a signal comes while it evaluates the batch ``signal_at``, or updates."""

    def __init__(self) -> None:
        self.signal_at = 0
        self.signal_at_update = 0
        self.updates = 0
        self.evaluated: list[int] = []  # batches of each evaluation

    def forward_backward(self, micro_batches: list[Batch]) -> paddle.Tensor:
        return paddle.ones([])

    def wait(self):
        """Nothing is under way."""

    def update(self, rate: float) -> paddle.Tensor:
        self.updates += 1
        if self.updates == self.signal_at_update:
            os.kill(os.getpid(), signal.SIGTERM)
        return paddle.ones([])

    def evaluate(self, batches: Iterator[Batch]) -> float:
        self.evaluated.append(0)
        for _ in batches:
            self.evaluated[-1] += 1
            if self.evaluated[-1] == self.signal_at:
                os.kill(os.getpid(), signal.SIGTERM)
        return 1.0


class Data:
    def __init__(self) -> None:
        self.sources = {"train": ["corpus"], "valid": ["corpus"]}

    def train_batches(self, start: int) -> Iterator[Batch]:
        while True:
            yield {"input_ids": np.ones([2, 8], np.int64), "labels": np.ones([2, 8], np.int64)}

    def eval_batches(self) -> Iterator[Batch]:
        batches = self.train_batches(0)
        return (next(batches) for _ in range(EVAL_BATCHES))


class Saver(SavesAtOnce):
    """Keeps step and ``pending_evaluation`` of each checkpoint."""

    def __init__(self) -> None:
        self.saved: list[tuple[int, bool]] = []

    def save(self, state: TrainerState) -> Path:
        self.saved.append((state.global_step, state.pending_evaluation))
        return Path("checkpoint")


class Rows:
    def __init__(self) -> None:
        self.evaluated: list[int] = []

    def report(self, step: int, metrics: dict[str, float]) -> None:
        if "eval_loss" in metrics:
            self.evaluated.append(step)

    def close(self) -> None:
        pass


@pytest.fixture
def trainer(tmp_path: Path) -> Trainer:
    given = {
        "model_name_or_path": "none", "input_dir": "none", "output_dir": tmp_path,
        "do_train": True, "do_eval": True, "max_steps": STEPS, "eval_steps": 2, "save_steps": 2,
        "evaluation_strategy": "steps", "per_device_train_batch_size": 2, "max_seq_length": 8,
        "load_best_model_at_end": True, "disable_tqdm": True,
    }  # fmt: skip
    words = [word for key, value in given.items() for word in (f"--{key}", str(value))]
    settings, state = load_settings(words), TrainerState()
    return Trainer(
        settings, Engine(), state, data=Data(), checkpointer=Saver(),
        healer=healer(settings, state), reporters=[Rows()], throughput=Throughput(1.0, None),
    )  # fmt: skip


def test_an_evaluation_is_cut_short_and_made_up_for_on_resuming(trainer):
    trainer.engine.signal_at = 2
    assert trainer.train().exit_code == 143
    assert trainer.engine.evaluated == [2]
    assert trainer.checkpointer.saved == [(2, True)]
    assert trainer.reporters[0].evaluated == []
    assert trainer.state.best_checkpoint is None

    trainer.engine.signal_at = 0
    assert trainer.train().exit_code == 0
    assert trainer.engine.evaluated == [2, EVAL_BATCHES, EVAL_BATCHES]
    assert trainer.reporters[0].evaluated == [2, 3]
    assert trainer.checkpointer.saved == [(2, True), (3, False)]
    assert trainer.state.best_checkpoint == "checkpoint-2"


def test_a_signal_in_the_evaluation_before_the_first_step(trainer):
    """There is nothing to save, and the next run evaluates again."""
    trainer.settings = replace(trainer.settings, eval_on_start=True)
    trainer.engine.signal_at = 2
    assert trainer.train().exit_code == 143
    assert trainer.engine.evaluated == [2]
    assert trainer.checkpointer.saved == [] and trainer.engine.updates == 0


def test_the_evaluation_before_the_first_step_is_of_no_checkpoint(trainer):
    trainer.settings = replace(trainer.settings, eval_on_start=True)
    assert trainer.train().exit_code == 0
    assert trainer.reporters[0].evaluated == [0, 2, 3]
    assert trainer.checkpointer.saved == [(2, False), (3, False)]
    assert trainer.state.best_checkpoint == "checkpoint-2"
    again = trainer.state.global_step
    assert trainer.train().exit_code == 0 and trainer.state.global_step == again
    assert trainer.reporters[0].evaluated == [0, 2, 3]  # a run that resumes has had it


def test_an_evaluation_has_a_batch_at_least(trainer):
    """The mean over no batch would be none."""
    trainer.engine.signal_at_update = 2
    assert trainer.train().exit_code == 143
    assert trainer.engine.evaluated == [1]
    assert trainer.checkpointer.saved == [(2, True)]


def test_a_signal_in_the_last_batch_keeps_the_result(trainer):
    trainer.engine.signal_at = EVAL_BATCHES
    assert trainer.train().exit_code == 143
    assert trainer.reporters[0].evaluated == [2]
    assert trainer.checkpointer.saved == [(2, False)]


def test_evaluation_alone_ends_after_the_batch(trainer):
    trainer.engine.signal_at = 3
    assert trainer.evaluate_only().exit_code == 143
    assert trainer.engine.evaluated == [3]
    assert trainer.reporters[0].evaluated == []
    trainer.engine.signal_at = 0
    assert trainer.evaluate_only().exit_code == 0
    assert trainer.reporters[0].evaluated == [0]


def test_signals_are_acknowledged_and_only_a_second_ctrl_c_interrupts(capfd):
    with InterruptRequest("the run saves") as request:
        os.kill(os.getpid(), signal.SIGTERM)
        assert "SIGTERM: the run saves" in capfd.readouterr().err
        os.kill(os.getpid(), signal.SIGTERM)  # as paddle.distributed.launch does
        os.kill(os.getpid(), signal.SIGTERM)
        assert capfd.readouterr().err == ""
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert request.signal_number == signal.SIGTERM


def test_sigusr1_is_a_sigterm_that_launchers_hand_on(capfd):
    with InterruptRequest("the run saves") as request:
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert request.signal_number == signal.SIGTERM
    assert capfd.readouterr().err == "\nSIGTERM: the run saves\n"


def test_what_is_not_done_within_the_grace_is_given_up(monkeypatch, capfd):
    monkeypatch.setenv("PYPKG_GRACE_SECONDS", "0.1")
    ended, codes = threading.Event(), []

    def exit_now(code: int) -> None:
        codes.append(code)
        ended.set()

    monkeypatch.setattr(interrupt.os, "_exit", exit_now)
    with InterruptRequest("the run saves"):
        os.kill(os.getpid(), signal.SIGTERM)
        assert ended.wait(60)
    assert codes == [143]
    told = capfd.readouterr().err
    assert "SIGTERM: the run saves, within 0.1 s" in told
    assert "error: SIGTERM came 0.1 s ago (PYPKG_GRACE_SECONDS)" in told


def test_a_run_that_ends_within_the_grace_is_left_alone(monkeypatch):
    monkeypatch.setenv("PYPKG_GRACE_SECONDS", "3000")
    before = threading.enumerate()
    with InterruptRequest("the run saves"):
        os.kill(os.getpid(), signal.SIGTERM)
    for thread in threading.enumerate():
        if isinstance(thread, threading.Timer):
            thread.join(60)
    assert not [each for each in threading.enumerate() if each not in before]


@pytest.mark.parametrize("value", ["0", "-1", "soon", "inf"])
def test_a_grace_that_is_no_time(monkeypatch, value):
    monkeypatch.setenv("PYPKG_GRACE_SECONDS", value)
    with pytest.raises(UserError, match=f"PYPKG_GRACE_SECONDS is '{value}'"):
        InterruptRequest("the run saves")


def code_of_pretrain(monkeypatch, load: Callable[..., None]) -> int:
    """The exit code of the command where ``load`` reads the settings."""
    before = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGUSR1)}
    monkeypatch.setattr(start_up, "load_run_settings", load)
    try:
        return pretrain.main(["run.json"])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_sigterm_before_the_first_step_ends_with_its_code(monkeypatch, capfd, number):
    def load(*_: object) -> None:
        os.kill(os.getpid(), number)

    assert code_of_pretrain(monkeypatch, load) == 143
    assert capfd.readouterr().err == "stopped by SIGTERM; the last checkpoint is untouched\n"


def test_a_full_disk_is_no_crash(monkeypatch, capfd):
    """Of any file; those with a message of their own say which."""

    def load(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "run.log")

    assert code_of_pretrain(monkeypatch, load) == 2
    told = capfd.readouterr().err
    assert (
        told.startswith("error: the disk is full: ") and "run.log" in told and "Trace" not in told
    )


@pytest.mark.parametrize(("starts", "code"), [(True, 2), (False, 1)])
def test_exhausted_memory_is_no_crash(monkeypatch, capfd, starts, code):
    """The supervisor starts a run again that had made steps, and none that never fits."""

    def load(*_: object) -> None:
        if not starts:
            progress.end_start()
        raise MemoryError("ResourceExhaustedError: Cannot allocate 2.0GB memory on GPU 0.")

    assert code_of_pretrain(monkeypatch, load) == code
    told = capfd.readouterr().err
    assert "error: memory is exhausted: Cannot allocate 2.0GB memory on GPU 0. Lower " in told
    assert "per_device_train_batch_size" in told and "Trace" not in told


def test_a_signal_is_honoured_where_nobody_reads_what_is_said(capfd):
    """Ctrl-C also ends the reader of ``2>&1 | tee``; a closed pipe must not cost the checkpoint."""
    reading, writing = os.pipe()
    os.close(reading)
    kept = os.dup(2)
    os.dup2(writing, 2)
    try:
        with InterruptRequest("the run saves") as request:
            os.kill(os.getpid(), signal.SIGINT)
            assert request.signal_number == signal.SIGINT
    finally:
        os.dup2(kept, 2)
        for each in (kept, writing):
            os.close(each)
