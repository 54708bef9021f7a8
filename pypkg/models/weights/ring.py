"""Bytes that pass from one process to another through shared memory, in order.

Counters at the beginning of the memory say how many bytes the one process has put in and the other
has taken out. Nothing here imports Paddle.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from pypkg import progress
from pypkg.models.weights.tensor_writer import BLOCK

ALIGNMENT = 64  # bytes; of a tensor in the ring, so that no element lies across its end
_HEADER = mmap.PAGESIZE  # bytes before the ring
_PUT, _TAKEN, _MAY_TAKE, _DONE = range(4)  # places of the counters in the header
PAUSE = 0.002  # seconds between two looks at a counter
_COPYING_THREADS = min(4, len(os.sched_getaffinity(0)))  # one core does not fill the memory bus
_LARGE = 1 << 20  # bytes that are worth more than one thread


class Ring:
    """The shared memory, as either process sees it.

    Args:
        descriptor: of the memory.
        capacity: bytes of the ring, a multiple of 64.
    """

    def __init__(self, descriptor: int, capacity: int) -> None:
        self._map = mmap.mmap(descriptor, size_of_memory(capacity))
        memory = np.frombuffer(self._map, np.uint8)
        self._counters = memory[: 4 * 8].view(np.int64)
        self._bytes = memory[_HEADER:]
        self._pool = ThreadPoolExecutor(_COPYING_THREADS)  # starts no thread before it is used

    def touch(self) -> None:
        """Lets the system allocate all of the memory, which holds nothing yet."""
        self._bytes[:: mmap.PAGESIZE] = 0

    def empty(self) -> None:
        """As at the start."""
        self._counters[:] = 0

    def taken(self) -> int:
        """Bytes that have been taken out so far."""
        return int(self._counters[_TAKEN])

    def let_take(self) -> None:
        """Lets the other process begin: until then it leaves the cores to the one that copies."""
        self._counters[_MAY_TAKE] = 1

    def finish(self) -> None:
        """Says that all has been done with what was taken out."""
        self._counters[_DONE] = 1

    def is_finished(self) -> bool:
        """Whether the other process has called ``finish``."""
        return bool(self._counters[_DONE])

    def put(self, data: np.ndarray, is_taken: Callable[[], bool]) -> None:
        """Appends the elements of ``data`` in C order; waits for room.

        Args:
            is_taken: whether there is still a process that takes; without one bytes go nowhere.
        """
        progress.report("handing over a checkpoint")
        if (place := self._free(data.nbytes)) is not None:
            self._copy(place.view(data.dtype).reshape(data.shape), data)
            self._counters[_PUT] += data.nbytes
            return
        left = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
        while left.size:
            room = self._free()
            assert room is not None  # any size will do
            if not room.size:
                if not is_taken():
                    return
                self.let_take()
                time.sleep(PAUSE)
                continue
            count = min(room.size, left.size)
            room[:count] = left[:count]
            self._counters[_PUT] += count
            left = left[count:]
            progress.report("handing over a checkpoint")

    def _copy(self, to: np.ndarray, data: np.ndarray) -> None:
        if data.nbytes < _LARGE:
            np.copyto(to, data)
            return
        rows = -(-len(data) // _COPYING_THREADS)
        cuts = [slice(start, start + rows) for start in range(0, len(data), rows)]
        list(self._pool.map(lambda cut: np.copyto(to[cut], data[cut]), cuts))

    def _free(self, wanted: int | None = None) -> np.ndarray | None:
        """Free bytes that follow what was put in, up to the end of the memory.

        Args:
            wanted: their number; None if there are not so many. Without it all of them.
        """
        position = int(self._counters[_PUT])
        start = position % self._bytes.size
        room = min(self._bytes.size - (position - self.taken()), self._bytes.size - start)
        if wanted is None:
            wanted = room
        return self._bytes[start : start + wanted] if wanted <= room else None

    def take(self, count: int, giver_is_alive: Callable[[], bool]) -> Iterator[np.ndarray]:
        """The next ``count`` bytes in pieces, each of which is valid until the next.

        Raises:
            EOFError: the process that gives has ended.
        """
        while count:
            position = self.taken()
            held = int(self._counters[_PUT]) - position
            start = position % self._bytes.size
            piece = min(held, count, self._bytes.size - start, BLOCK)
            if piece < count:  # whole elements
                piece -= piece % ALIGNMENT
            if not piece or not self._counters[_MAY_TAKE]:
                if not giver_is_alive():
                    raise EOFError("the process that trains has ended")
                time.sleep(PAUSE)
                continue
            yield self._bytes[start : start + piece]
            self._counters[_TAKEN] = position + piece
            count -= piece


def size_of_memory(capacity: int) -> int:
    """Bytes of the shared memory of a ring."""
    return _HEADER + capacity


def aligned(num_bytes: int) -> int:
    """``num_bytes``, up to the next multiple of ``ALIGNMENT``."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT
