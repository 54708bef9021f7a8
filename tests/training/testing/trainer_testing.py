"""What a ``Trainer`` works with, where work takes no time but that of a clock."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import paddle
from paddle import Tensor
from training_testing import Clock, SavesAtOnce

from pypkg.data import Batch
from pypkg.training.state import TrainerState

SETTINGS = {
    "model_name_or_path": "none",
    "input_dir": "none",
    "do_train": True,
    "max_steps": 12,
    "per_device_train_batch_size": 2,
    "max_seq_length": 8,
    "disable_tqdm": True,
}


class TimedEngine:
    """1 s an update, 100 s an evaluation; the losses are the numbers of the steps."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.losses: list[float | None] = [float(step) for step in range(1, 13)]
        self.norms = [1.0] * 12

    def forward_backward(self, micro_batches: Sequence[Batch]) -> Tensor | None:
        loss = self.losses.pop(0)
        return None if loss is None else paddle.to_tensor(loss)

    def wait(self):
        """Nothing is under way."""

    def update(self, rate: float) -> Tensor:
        self.clock.seconds += 1
        return paddle.to_tensor(self.norms.pop(0))

    def evaluate(self, batches: Iterator[Batch]) -> float:
        self.clock.seconds += 100
        return 1.0


class Data:
    """Batches of 2 samples of 8 tokens, each of which takes ``seconds``."""

    def __init__(self, clock: Clock, seconds: float = 0.0) -> None:
        self.sources = {"train": ["corpus"], "valid": ["corpus"]}
        self._clock, self._seconds = clock, seconds

    def train_batches(self, start: int) -> Iterator[Batch]:
        while True:
            self._clock.seconds += self._seconds
            tokens = np.ones([2, 8], np.int64)
            yield {"input_ids": tokens, "labels": tokens}

    def eval_batches(self) -> Iterator[Batch]:
        return iter(())


class Saver(SavesAtOnce):
    """A checkpoint takes 1000 s."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def save(self, state: TrainerState) -> Path:
        self._clock.seconds += 1000
        return Path("checkpoint")


class Rows:
    """A reporter that keeps what is logged of training, by step."""

    def __init__(self) -> None:
        self.by_step: dict[int, dict[str, float]] = {}

    def report(self, step: int, metrics: dict[str, float]) -> None:
        if "loss" in metrics:
            self.by_step[step] = metrics

    def rewind(self, step: int) -> None:
        raise AssertionError(step)

    def of(self, name: str) -> dict[int, float]:
        return {step: metrics[name] for step, metrics in self.by_step.items()}

    def close(self) -> None:
        pass
