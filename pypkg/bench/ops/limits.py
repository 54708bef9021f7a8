"""Limits of the machine, measured in the same run as the operators."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from pypkg.bench.ops.frameworks import Framework

MATMUL_SIZE = 1024


class ThreadedCopy:
    """A memcpy of a given number of bytes, divided over threads."""

    # The start of a thread's work takes tens of microseconds, so each copies at least this much.
    _BYTES_PER_CALL = 128 * 2**20
    # Far larger than any cache. The time of a larger copy is extrapolated, which saves memory.
    _LARGEST = 2**30

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads)
        self._source = self._target = np.zeros(0, np.uint8)

    def seconds(self, moved_bytes: int, in_place: bool = False) -> float:
        """Seconds to read moved_bytes / 2 and to write as many bytes.

        Args:
            moved_bytes: bytes read and written.
            in_place: write inverted bytes to the same place, which may be faster than a copy.
        """
        if moved_bytes > self._LARGEST:
            return self.seconds(self._LARGEST, in_place) * moved_bytes / self._LARGEST
        size = max(self._threads, moved_bytes // 2)
        if self._source.size < size:
            self._source, self._target = np.ones(size, np.uint8), np.zeros(size, np.uint8)
        bounds = np.linspace(0, size, self._threads + 1).astype(np.int64)
        times = max(1, math.ceil(self._BYTES_PER_CALL / (2 * size)))

        def move(part: int) -> None:
            source = self._source[bounds[part] : bounds[part + 1]]
            target = self._target[bounds[part] : bounds[part + 1]]
            for _ in range(times):
                if in_place:
                    np.invert(source, out=source)
                else:
                    np.copyto(target, source)

        start = time.perf_counter()
        list(self._pool.map(move, range(self._threads)))
        return (time.perf_counter() - start) / times


def matmul_rate(framework: Framework, size: int = MATMUL_SIZE, runs: int = 10) -> float:
    """FLOP/s of the framework's fastest float32 product of two [size, size] matrices."""
    values = np.random.default_rng(0).standard_normal((size, size), dtype=np.float32)
    a = framework.tensor(values, None)
    seconds = []
    for _ in range(runs):
        framework.synchronize()
        start = time.perf_counter()
        framework.matmul(a, a)
        framework.synchronize()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


def best_matmul_rate(frameworks: Mapping[str, Framework]) -> tuple[float, str]:
    """The highest ``matmul_rate`` of the frameworks, and the name of that framework."""
    return max((matmul_rate(framework), name) for name, framework in frameworks.items())
