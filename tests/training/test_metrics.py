"""Throughput and utilisation: what time counts, and what peak they refer to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import paddle
import pytest
from paddle import Tensor

from pypkg.config import load_settings
from pypkg.data import Batch
from pypkg.training.reporting import metrics
from pypkg.training.reporting.metrics import PeakFlops, Throughput, peak_flops
from pypkg.training.state import TrainerState
from pypkg.training.trainer import Trainer

# Multiprocessors, GHz, FLOP per cycle of one multiprocessor with 16 bits and with float32, from
# NVIDIA's white papers. The clocks of tensor cores of Hopper are below those of float32.
GPUS = {
    "NVIDIA H200": (132, 1.83, 4096, 1.98, 256),
    "NVIDIA H200 NVL": (132, 1.545, 4096, 1.785, 256),
    "NVIDIA H100 80GB HBM3": (132, 1.83, 4096, 1.98, 256),
    "NVIDIA H100 PCIe": (114, 1.62, 4096, 1.755, 256),
    "NVIDIA H100 NVL": (132, 1.545, 4096, 1.785, 256),
    "NVIDIA H800": (132, 1.83, 4096, 1.98, 256),
    "NVIDIA A100-SXM4-80GB": (108, 1.41, 2048, 1.41, 128),
    "NVIDIA A800 80GB PCIe": (108, 1.41, 2048, 1.41, 128),
    "NVIDIA L40S": (142, 2.52, 1024, 2.52, 256),
    "Tesla V100-SXM2-32GB": (80, 1.53, 1024, 1.53, 128),
    "Tesla V100-PCIE-16GB": (80, 1.38, 1024, 1.38, 128),
    "NVIDIA GeForce RTX 4090": (128, 2.52, 512, 2.52, 256),
}


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(paddle.device, "get_device", lambda: "gpu:0")
    return monkeypatch


@pytest.mark.parametrize("name", GPUS)
def test_peak_of_a_gpu(name: str, on_gpu: pytest.MonkeyPatch) -> None:
    on_gpu.setattr(paddle.device.cuda, "get_device_name", lambda: name)
    units, half_clock, half, single_clock, single = GPUS[name]
    for dtype, expected in {
        "bfloat16": units * half_clock * 1e9 * half,
        "float16": units * half_clock * 1e9 * half,
        "float32": units * single_clock * 1e9 * single,
    }.items():
        peak = peak_flops(dtype)
        assert peak is not None
        assert peak.value == pytest.approx(expected, rel=0.02), dtype
        assert peak.source == f"data sheet of {name}"


def test_an_unknown_gpu_has_no_peak(on_gpu: pytest.MonkeyPatch) -> None:
    on_gpu.setattr(paddle.device.cuda, "get_device_name", lambda: "NVIDIA GeForce GTX 970")
    assert peak_flops("float32") is None
    assert Throughput(1e9, None).mfu(10.0) is None


def test_utilisation() -> None:
    assert Throughput(6e9, PeakFlops(3e12, "")).mfu(100.0) == pytest.approx(0.2)


class Clock:
    """What time.perf_counter says, in seconds."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(metrics.time, "perf_counter", clock)
    return clock


def test_median_of_intervals(clock: Clock) -> None:
    throughput = Throughput(1.0, None)
    assert throughput.median_tokens_per_second() is None
    for seconds in (2, 1, 5):
        clock.seconds += seconds
        assert throughput.interval(10) == 10 / seconds
    assert throughput.median_tokens_per_second() == 5


class Engine:
    """Its work takes time on the clock alone: 1 s an update, 100 s an evaluation."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def forward_backward(self, micro_batches: object) -> Tensor:
        return paddle.ones([])

    def update(self, rate: float) -> Tensor:
        self.clock.seconds += 1
        return paddle.ones([])

    def evaluate(self, batches: Iterator[Batch]) -> float:
        self.clock.seconds += 100
        return 1.0


class Data:
    """Batches of 2 samples of 8 tokens."""

    def __init__(self) -> None:
        self.sources = {"train": ["corpus"], "valid": ["corpus"]}

    def train_batches(self, start: int) -> Iterator[Batch]:
        while True:
            tokens = paddle.ones([2, 8], "int64").numpy()
            yield {"input_ids": tokens, "labels": tokens}

    def eval_batches(self) -> Iterator[Batch]:
        return iter(())


class Saver:
    """A checkpoint takes 1000 s."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def save(self, state: TrainerState) -> Path:
        self.clock.seconds += 1000
        return Path("checkpoint")


class Speeds:
    """A reporter that keeps the speeds, and how many tokens had been consumed."""

    def __init__(self) -> None:
        self.values: dict[int, tuple[float, float]] = {}

    def report(self, step: int, metrics: dict[str, float]) -> None:
        if "loss" in metrics:
            seen = metrics["tokens_per_second_per_device"], metrics["consumed_tokens"]
            self.values[step] = seen

    def close(self) -> None:
        pass


@pytest.mark.parametrize("logging_steps", [1, 2, 3, 4, 6])
@pytest.mark.parametrize(("eval_steps", "save_steps"), [(1, 12), (2, 3), (3, 2), (5, 7), (12, 1)])
def test_evaluations_and_checkpoints_do_not_slow_training(
    clock: Clock, tmp_path: Path, logging_steps: int, eval_steps: int, save_steps: int
) -> None:
    """16 tokens a second, whichever of them comes between two log lines."""
    given = {
        "model_name_or_path": "none",
        "input_dir": "none",
        "output_dir": tmp_path,
        "do_train": True,
        "do_eval": True,
        "evaluation_strategy": "steps",
        "max_steps": 12,
        "per_device_train_batch_size": 2,
        "max_seq_length": 8,
        "logging_steps": logging_steps,
        "eval_steps": eval_steps,
        "save_steps": save_steps,
        "disable_tqdm": True,
    }
    speeds = Speeds()
    outcome = Trainer(
        load_settings([word for key, value in given.items() for word in (f"--{key}", str(value))]),
        Engine(clock),
        TrainerState(),
        data=Data(),
        checkpointer=Saver(clock),
        reporters=[speeds],
        throughput=Throughput(1.0, None),
    ).train()
    steps = range(logging_steps, 13, logging_steps)
    assert speeds.values == {step: (16.0, 16 * step) for step in steps}
    assert outcome.tokens_per_second == 16
    evaluations = len([s for s in range(1, 13) if s % eval_steps == 0 or s == 12])
    saves = len([s for s in range(1, 13) if s % save_steps == 0 or s == 12])
    assert clock.seconds == 12 + 100 * evaluations + 1000 * saves
