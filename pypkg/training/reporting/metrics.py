"""Throughput, model FLOPs utilisation and memory of a training run."""

from __future__ import annotations

import math
import resource
import statistics
import time
from dataclasses import dataclass

import paddle

# Dense peak of one GPU in FLOP/s, from NVIDIA's data sheets: (bfloat16 and float16, float32 without
# TF32, which Paddle leaves off by default). The first key in the name of the GPU is used, so a form
# factor comes before its family.
_GPU_PEAKS = {
    "H200 NVL": (835e12, 60e12),
    "H200": (989e12, 67e12),
    "H100 PCIe": (756e12, 51e12),
    "H100 NVL": (835e12, 60e12),
    "H100": (989e12, 67e12),
    "H800": (989e12, 67e12),
    "A100": (312e12, 19.5e12),
    "A800": (312e12, 19.5e12),
    "L40S": (362e12, 91.6e12),
    "V100-PCIE": (112e12, 14e12),
    "V100": (125e12, 15.7e12),
    "4090": (165e12, 82.6e12),
}


@dataclass(frozen=True)
class PeakFlops:
    """The peak FLOP/s of a device, which utilisation refers to, and the source of the number."""

    value: float
    source: str


def peak_flops(dtype: str) -> PeakFlops | None:
    """Peak of the current device: from the data sheet for known GPUs, measured for CPUs.

    None for a GPU that is not in the table, so that no wrong utilisation is reported.
    """
    if not paddle.device.get_device().startswith("gpu"):
        return _measure_cpu_peak()
    name = paddle.device.cuda.get_device_name()
    for key, (half, single) in _GPU_PEAKS.items():
        if key in name:
            return PeakFlops(single if dtype == "float32" else half, f"data sheet of {name}")
    return None


def _measure_cpu_peak(size: int = 1024, runs: int = 50) -> PeakFlops:
    """Best float32 matrix product rate that Paddle reaches here on [size, size] operands."""
    a = paddle.ones([size, size])
    fastest = math.inf
    with paddle.no_grad():
        for _ in range(runs):
            start = time.perf_counter()
            paddle.matmul(a, a)
            fastest = min(fastest, time.perf_counter() - start)
    rate = 2 * size**3 / fastest
    return PeakFlops(rate, f"fastest of {runs} float32 products of {size} x {size} on this CPU")


def peak_memory_bytes() -> int:
    """Peak memory so far in bytes: allocated on the GPU, or the resident set on a CPU."""
    if paddle.device.get_device().startswith("gpu"):
        return paddle.device.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Throughput:
    """Tokens per second over the time spent in training steps alone."""

    def __init__(self, flops_per_token: float, peak: PeakFlops | None) -> None:
        self._flops_per_token = flops_per_token
        self._peak = peak
        self._intervals: list[tuple[float, float]] = []  # tokens, seconds
        self._start = time.perf_counter()

    def restart(self) -> None:
        """Excludes the time since the last interval, such as an evaluation or a checkpoint."""
        self._start = time.perf_counter()

    def interval(self, tokens: float) -> float:
        """Closes an interval of ``tokens`` trained tokens and returns its tokens per second."""
        now = time.perf_counter()
        self._intervals.append((tokens, now - self._start))
        self._start = now
        return tokens / max(self._intervals[-1][1], 1e-9)

    def median_tokens_per_second(self) -> float | None:
        if not self._intervals:
            return None
        return statistics.median(tokens / max(s, 1e-9) for tokens, s in self._intervals)

    def mfu(self, tokens_per_second: float) -> float | None:
        """Model FLOPs utilisation: flops_per_token * tokens/s / peak (PaLM, Chowdhery 2022)."""
        if self._peak is None:
            return None
        return self._flops_per_token * tokens_per_second / self._peak.value
