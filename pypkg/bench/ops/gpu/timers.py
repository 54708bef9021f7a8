"""Times of a function on the GPU or the CPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import product

import torch


class CudaTimer:
    """Times calls with CUDA events.

    Each call follows a write to a buffer larger than the L2 cache. Inputs therefore come from
    device memory. The host runs ahead of the device, so that launch overhead does not count.
    """

    def __init__(self) -> None:
        self._flushed = torch.empty(512 << 20, dtype=torch.int8, device="cuda")

    def times(self, run: Callable[[], object], repeats: int = 25) -> list[float]:
        """Seconds of each repeat."""
        for _ in range(3):
            run()
        pairs = [
            (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            for _ in range(repeats)
        ]
        for start, end in pairs:
            self._flushed.zero_()
            start.record()
            run()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) * 1e-3 for start, end in pairs]


class CpuTimer:
    def times(self, run: Callable[[], object], repeats: int = 5) -> list[float]:
        """Seconds of each repeat."""
        run()
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        return times


def copy_bandwidth(timer: CudaTimer | CpuTimer, device: str) -> float:
    """Bytes per second of a large copy; read and written bytes both count."""
    size = copy_size(device)
    source, target = (torch.ones(size, dtype=torch.int8, device=device) for _ in range(2))
    return 2 * size / statistics.median(timer.times(lambda: target.copy_(source)))


def matmul_rate(timer: CudaTimer | CpuTimer, device: str) -> float:
    """FLOP per second of a large bfloat16 matrix product."""
    n = matmul_size(device)
    a, b = (torch.randn(n, n, device=device).to(torch.bfloat16) for _ in range(2))
    return 2 * n**3 / statistics.median(timer.times(lambda: a @ b))


def product_rates(timer: CudaTimer | CpuTimer, device: str) -> list[dict[str, float]]:
    """FLOP per second of bfloat16 products [rows, inputs] x [inputs, outputs] of decoder layers, by
    shape. ``pypkg plan --gpu`` reads them."""
    measured = []
    for rows, (inputs, outputs) in product(*_products(device)):
        a = torch.randn(rows, inputs, device=device).to(torch.bfloat16)
        b = torch.randn(inputs, outputs, device=device).to(torch.bfloat16)
        seconds = statistics.median(timer.times(partial(torch.matmul, a, b)))
        rate = 2 * rows * inputs * outputs / seconds
        measured.append(
            {"rows": rows, "inputs": inputs, "outputs": outputs, "flops_per_second": rate}
        )
    return measured


def _products(device: str) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...]]:
    """Rows, and inputs with outputs: of LLaMA-2 7B, and of 70B divided by 8 in tensor groups."""
    if device != "cuda":
        return (16,), ((64, 192), (64, 64))
    llama_7b = (4096, 12288), (4096, 4096), (4096, 22016), (11008, 4096), (4096, 32000)
    llama_70b = (8192, 1280), (1024, 8192), (8192, 7168), (3584, 8192), (8192, 4000)
    return (2048, 4096, 16384), (*llama_7b, *llama_70b)


def matmul_size(device: str) -> int:
    return 8192 if device == "cuda" else 256


def copy_size(device: str) -> int:
    return 1 << 30 if device == "cuda" else 1 << 24
