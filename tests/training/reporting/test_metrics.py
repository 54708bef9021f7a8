"""Throughput and utilisation: what time counts, and what peak they refer to."""

from __future__ import annotations

import paddle
import pytest
from training_testing import Clock

from pypkg.training.reporting.metrics import PeakFlops, Throughput, peak_flops

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


def test_median_of_intervals(clock: Clock) -> None:
    throughput = Throughput(1.0, None)
    assert throughput.median_tokens_per_second() is None
    for seconds in (2, 1, 5):
        clock.seconds += seconds
        assert throughput.interval(10) == 10 / seconds
    assert throughput.median_tokens_per_second() == 5
