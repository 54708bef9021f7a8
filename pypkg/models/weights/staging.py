"""Passes parts of tensors from the ranks of a machine to the ranks that write them.

A rank copies its parts one after the other to its area of shared memory, and the writers of the
tensors take them from there. The order of the tensors is the same on all ranks, so ranks do not
deadlock. A full area has room again when the writer of its oldest part has taken that part. Nothing
here imports Paddle.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TypeAlias

import numpy as np

from pypkg import _native
from pypkg.console import progress
from pypkg.models.weights.area import ALIGNMENT, PUT, Area, LostRankError, Staging

PAUSE = 0.001  # seconds between two reads of a counter
_SECONDS_BETWEEN_LOOKS = 1.0  # interval of the checks whether an awaited rank still runs
_MOST_THREADS = 4  # limit of the threads that copy
_PIECE = 4 << 20  # bytes that a thread copies in one call
_PIECES = 8  # that a thread gets at once, because it takes time to wake a thread
_COPIED_AT_ONCE = 256 << 20  # limit of the bytes of parts that are being copied

_Piece: TypeAlias = tuple[np.ndarray, np.ndarray]  # target and source, equally long


class _Patience:
    """Checks, once a second, whether the rank for which a loop waits still runs."""

    def __init__(self, staging: Staging) -> None:
        self._staging = staging
        self._due = time.monotonic() + _SECONDS_BETWEEN_LOOKS

    def is_over(self, rank: int) -> bool:
        """Whether ``rank`` has ended or given up the save."""
        if time.monotonic() < self._due:
            return False
        self._due = time.monotonic() + _SECONDS_BETWEEN_LOOKS
        return self._staging.is_lost(rank)


class Sender:
    """Copies the parts of this rank into its area.

    Threads copy several parts at a time, because one core does not use the whole memory bandwidth
    and most parts are too small to be divided. If each rank has one core, no threads are started.

    Args:
        staging: the areas of this rank.
        on_wait: called repeatedly while the area is full.

    Raises:
        LostRankError: in each method, if the rank that must take the oldest part has ended.
    """

    def __init__(self, staging: Staging, on_wait: Callable[[], None] = lambda: None) -> None:
        self._rank, self._areas, self._staging = staging.rank, staging.areas, staging
        self._area, self._on_wait = staging.areas[staging.rank], on_wait
        self._position = 0  # end of the last part
        self._waiting: deque[tuple[int, int, int]] = deque()  # start, end and writer of parts
        self._copies: list[Future[None]] = []
        self._pieces: list[_Piece] = []  # that no thread has got
        self._copying = 0  # bytes that are not known to be copied
        self._threads = _copying_threads(len(staging.areas))
        self._pool = ThreadPoolExecutor(self._threads) if self._threads > 1 else None

    def put(self, unit: int, writer: int, values: np.ndarray) -> None:
        """Starts to copy a part; waits while the area is full.

        Args:
            unit: number of the tensor.
            writer: the rank that takes the part.
            values: the part, which must not change until ``flush`` returns.
        """
        progress.report("handing over a checkpoint")
        area, capacity = self._area, self._area.size.capacity
        data = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        start = self._position + -self._position % ALIGNMENT
        if data.size <= capacity < start % capacity + data.size:  # it would wrap around
            start += capacity - start % capacity
        self._position = start + data.size
        self._waiting.append((start, self._position, writer))
        area.table[unit, 1] = data.size
        area.table[unit, 0] = start
        if data.size <= capacity:
            self._wait_for_room(self._position, start)
            self._copy(area.data[start % capacity :][: data.size], data)
            return
        while data.size:  # a part larger than the area is passed in pieces
            room = self._wait_for_room(start + 1, start)
            piece = min(data.size, room + 1, capacity - start % capacity)
            area.data[start % capacity :][:piece] = data[:piece]
            start, data = start + piece, data[piece:]
            self._publish(start)

    def flush(self) -> None:
        """Completes all copies and lets the writers take them. The parts may change afterwards."""
        self._publish(self._position)

    def _publish(self, position: int) -> None:
        for first in range(self._threads):
            self._start(self._pieces[first :: self._threads])
        self._pieces.clear()
        for copy in self._copies:
            copy.result()
        self._copies.clear()
        self._copying = 0
        self._area.counters[PUT] = position

    def _copy(self, to: np.ndarray, data: np.ndarray) -> None:
        for start in range(0, data.size, _PIECE):
            cut = slice(start, start + _PIECE)
            self._pieces.append((to[cut], data[cut]))
            if len(self._pieces) == _PIECES * self._threads:
                self._start(self._pieces[:_PIECES])
                del self._pieces[:_PIECES]
        self._copying += data.size
        if self._copying > _COPIED_AT_ONCE:
            self.flush()

    def _start(self, pieces: list[_Piece]) -> None:
        """Lets a thread copy ``pieces``, or copies them if there are no threads."""
        if self._pool is None:
            _copy_pieces(pieces)
        elif pieces:
            self._copies.append(self._pool.submit(_copy_pieces, pieces))

    def _wait_for_room(self, end: int, put: int) -> int:
        """Waits until the bytes up to position ``end`` are free; returns the free bytes after it.

        Args:
            put: position up to which parts are in the area or are being copied.
        """
        seen, patience = -1, _Patience(self._staging)
        if self._tail() + self._area.size.capacity < end:
            self._publish(put)
        while (room := self._tail() + self._area.size.capacity - end) < 0:
            self._area.let_take()
            if room != seen:
                progress.report("handing over a checkpoint")
                seen = room
            if patience.is_over(writer := self._waiting[0][2]):
                raise LostRankError(
                    f"rank {writer} of this machine has ended before it wrote what rank "
                    f"{self._rank} sent to it"
                )
            self._on_wait()
            time.sleep(PAUSE)
        return room

    def _tail(self) -> int:
        """The position up to which the writers have taken all parts."""
        while self._waiting:
            start, end, writer = self._waiting[0]
            taken = int(self._areas[writer].taken[self._rank])
            if taken < end:
                return max(start, taken)
            self._waiting.popleft()
        return self._position


def _copy_pieces(pieces: list[_Piece]) -> None:
    for to, data in pieces:
        _native.streaming_copy(to, data)


def _copying_threads(ranks: int) -> int:
    """Number of copying threads: the rank's share of the cores, or of those that it is bound to."""
    cores = len(os.sched_getaffinity(0))
    if cores == os.cpu_count():
        cores //= ranks
    return max(1, min(_MOST_THREADS, cores))


class Receiver:
    """Takes the parts of the tensors that this rank writes from the areas of its machine.

    Args:
        staging: the areas of this rank.
        check: called repeatedly while a part is missing; it may raise to stop waiting.
    """

    def __init__(self, staging: Staging, check: Callable[[], None]) -> None:
        self._areas, self._check, self._staging = staging.areas, check, staging
        self._taken = staging.areas[staging.rank].taken
        self._lent: dict[int, int] = {}  # end of the last part in use, by rank

    def wait_for_copies(self) -> None:
        """Waits until all ranks of the machine have copied their parts, or their areas are full.

        Training pauses for the copies, and writing at the same time would take a core from them.

        Raises:
            LostRankError: a rank has ended.
        """
        for rank, area in self._areas.items():
            self._wait(area.may_take, rank)

    def take(self, unit: int, source: int) -> np.ndarray:
        """The bytes of a part, uint8 [size]; valid until ``release``.

        Args:
            unit: number of the tensor.
            source: the rank that sends the part.

        Raises:
            LostRankError: ``source`` has ended.
        """
        area, capacity = self._areas[source], self._areas[source].size.capacity
        self._wait(partial(area.is_begun, unit), source)
        start, count = (int(each) for each in area.table[unit])
        if count <= capacity:
            self._wait(partial(area.has_beyond, start + count - 1), source)
            self._lent[source] = start + count
            return area.data[start % capacity :][:count]
        return self._collected(area, start, count, source)

    def _collected(self, area: Area, start: int, count: int, source: int) -> np.ndarray:
        """A part that is larger than the area, joined from the pieces that are sent."""
        capacity, position, end = area.size.capacity, start, start + count
        part = np.empty(count, np.uint8)
        while position < end:
            self._wait(partial(area.has_beyond, position), source)
            piece = min(end, int(area.counters[PUT])) - position
            piece = min(piece, capacity - position % capacity)
            part[position - start :][:piece] = area.data[position % capacity :][:piece]
            position += piece
            self._taken[source] = position
        return part

    def release(self) -> None:
        """Frees the memory of all parts that were taken."""
        for source, position in self._lent.items():
            self._taken[source] = position
        self._lent.clear()

    def _wait(self, is_there: Callable[[], object], source: int) -> None:
        patience = _Patience(self._staging)
        while not is_there():
            self._check()
            if patience.is_over(source) and not is_there():
                raise LostRankError(
                    f"rank {source} of this machine has ended before it sent a part of a tensor "
                    f"that rank {self._staging.rank} writes"
                )
            time.sleep(PAUSE)
