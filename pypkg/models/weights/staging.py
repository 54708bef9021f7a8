"""Parts of tensors on their way from the ranks of a machine to those that write them.

A rank copies its parts, one after another, to an area of shared memory. The writers of the tensors
take them out there, each when its turn comes. The order of the tensors is the same on all ranks, so
no two of them wait for each other. An area that is full has room again when the writer of the
oldest part has taken it. Nothing here imports Paddle.
"""

from __future__ import annotations

import mmap
import os
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import numpy as np

from pypkg.console import progress

ALIGNMENT = 64  # bytes; of a part in an area
PAUSE = 0.001  # seconds between two looks at a counter
_PUT, _MAY_TAKE, _DONE = range(3)  # places of the counters in the header
_COUNTERS = 8
_ABSENT = -1  # instead of the position of a part
_ALL = np.iinfo(np.int64).max  # a position beyond all parts
_COPYING_THREADS = min(4, len(os.sched_getaffinity(0)))
_PIECE = 4 << 20  # bytes that a thread copies at a time
_COPIED_AT_ONCE = 256 << 20  # bytes of parts that are not let go before they are copied


class AreaSize(NamedTuple):
    """Size of an area.

    Attributes:
        capacity: bytes for parts, a multiple of ``ALIGNMENT``.
        ranks: number of ranks of the run.
        units: largest number of tensors of a save.
    """

    capacity: int
    ranks: int
    units: int

    @property
    def header(self) -> int:
        """Bytes before the parts."""
        used = 8 * (_COUNTERS + self.ranks + 2 * self.units)
        return -(-used // mmap.PAGESIZE) * mmap.PAGESIZE

    def holds(self, other: AreaSize) -> bool:
        """Whether no number of ``other`` is larger."""
        return all(own >= wanted for own, wanted in zip(self, other, strict=True))


class AreaPlace(NamedTuple):
    """Where processes of the machine find an area.

    Attributes:
        path: below /proc, of the descriptor of the process that made it.
        identity: device and inode of the memory, which another process's descriptor has not.
    """

    path: str
    identity: tuple[int, int]
    size: AreaSize

    def open(self) -> Area:
        """
        Raises:
            OSError: this process cannot see it.
        """
        descriptor = os.open(self.path, os.O_RDWR)
        try:
            status = os.fstat(descriptor)
            if (status.st_dev, status.st_ino) != tuple(self.identity):
                raise FileNotFoundError(f"{self.path} is another file")
            return Area(descriptor, self.size)
        finally:
            os.close(descriptor)


class Area:
    """The shared memory of a rank, as each process sees it.

    Attributes:
        counters: of the rank; see the methods.
        taken: of the rank as a writer: up to which position of the area of each rank it has taken
            out its parts.
        table: position and bytes of the part that the rank has put in, by the number of the tensor.
        data: the parts; position p is at ``p % capacity``.
    """

    def __init__(self, descriptor: int, size: AreaSize) -> None:
        self.size = size
        self._map = mmap.mmap(descriptor, size.header + size.capacity)
        memory = np.frombuffer(self._map, np.uint8)
        numbers = memory[: size.header].view(np.int64)
        self.counters = numbers[:_COUNTERS]
        self.taken = numbers[_COUNTERS : _COUNTERS + size.ranks]
        start = _COUNTERS + size.ranks
        self.table = numbers[start : start + 2 * size.units].reshape(size.units, 2)
        self.data = memory[size.header :]

    def touch(self) -> None:
        """Lets the system allocate all of the memory, which holds nothing yet."""
        self.data[:: mmap.PAGESIZE] = 0

    def empty(self) -> None:
        """As at the start; no other process may be at work on it."""
        self.counters[:] = 0
        self.taken[:] = 0
        self.table[:] = _ABSENT

    def let_take(self) -> None:
        """Lets writers begin: until then they leave the cores to the rank that copies."""
        self.counters[_MAY_TAKE] = 1

    def is_begun(self, unit: int) -> bool:
        """Whether writers may take, and the part of the tensor ``unit`` has a position."""
        return bool(self.counters[_MAY_TAKE]) and self.table[unit, 0] != _ABSENT

    def has_beyond(self, position: int) -> bool:
        """Whether the byte at ``position`` has been put in."""
        return self.counters[_PUT] > position

    def take_nothing_more(self) -> None:
        """Says that the rank, as a writer, waits for no part any more."""
        self.taken[:] = _ALL

    def finish(self) -> None:
        """Says that the rank has written its files, or has failed to."""
        self.counters[_DONE] = 1

    def is_finished(self) -> bool:
        """Whether ``finish`` has been called."""
        return bool(self.counters[_DONE])


def new_area(size: AreaSize) -> tuple[int, AreaPlace, Area]:
    """Descriptor, place and memory of a new area, which has no name in any file system.

    Other processes can open it while the descriptor is open.
    """
    descriptor = os.memfd_create("pypkg-checkpoint")
    os.ftruncate(descriptor, size.header + size.capacity)
    status = os.fstat(descriptor)
    path = f"/proc/{os.getpid()}/fd/{descriptor}"
    place = AreaPlace(path, (status.st_dev, status.st_ino), size)
    return descriptor, place, Area(descriptor, size)


@dataclass(frozen=True)
class Staging:
    """What a rank knows of the areas of its machine, in a save.

    Attributes:
        rank: this one.
        areas: by rank, of those that hand parts to each other through memory, and this rank's.
        places: of the same areas.
    """

    rank: int = 0
    areas: Mapping[int, Area] = field(default_factory=dict)
    places: Mapping[int, AreaPlace] = field(default_factory=dict)


class Sender:
    """Puts the parts of a rank into its area.

    Threads copy several parts at a time: one core does not fill the memory bus, and most parts are
    too small to be worth dividing.

    Args:
        staging: of that rank.
        on_wait: called again and again while there is no room.
    """

    def __init__(self, staging: Staging, on_wait: Callable[[], None] = lambda: None) -> None:
        self._rank, self._areas = staging.rank, staging.areas
        self._area, self._on_wait = staging.areas[staging.rank], on_wait
        self._position = 0  # after the last part
        self._waiting: deque[tuple[int, int, int]] = deque()  # start, end and writer of parts
        self._copies: list[Future[None]] = []
        self._copying = 0  # bytes of the copies
        self._pool = ThreadPoolExecutor(_COPYING_THREADS)  # starts no thread before it is used

    def put(self, unit: int, writer: int, values: np.ndarray) -> None:
        """Begins to copy a part, which must not change before ``flush``; waits for room.

        Args:
            unit: number of the tensor.
            writer: rank that takes the part out.
        """
        progress.report("handing over a checkpoint")
        area, capacity = self._area, self._area.size.capacity
        data = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        start = self._position + -self._position % ALIGNMENT
        if data.size <= capacity < start % capacity + data.size:  # it would lie across the end
            start += capacity - start % capacity
        self._position = start + data.size
        self._waiting.append((start, self._position, writer))
        area.table[unit, 1] = data.size
        area.table[unit, 0] = start
        if data.size <= capacity:
            self._wait_for_room(self._position, start)
            self._copy(area.data[start % capacity :][: data.size], data)
            return
        while data.size:  # a part larger than the area passes in pieces
            room = self._wait_for_room(start + 1, start)
            piece = min(data.size, room + 1, capacity - start % capacity)
            area.data[start % capacity :][:piece] = data[:piece]
            start, data = start + piece, data[piece:]
            self._publish(start)

    def flush(self) -> None:
        """Lets writers take all parts; those that were put may change."""
        self._publish(self._position)

    def _publish(self, position: int) -> None:
        for copy in self._copies:
            copy.result()
        self._copies.clear()
        self._copying = 0
        self._area.counters[_PUT] = position

    def _copy(self, to: np.ndarray, data: np.ndarray) -> None:
        for start in range(0, data.size, _PIECE):
            cut = slice(start, start + _PIECE)
            self._copies.append(self._pool.submit(np.copyto, to[cut], data[cut]))
        self._copying += data.size
        if self._copying > _COPIED_AT_ONCE:
            self.flush()

    def _wait_for_room(self, end: int, put: int) -> int:
        """Returns when positions before ``end`` are free; with how many bytes beyond it are.

        Args:
            put: position up to which parts are in the area, or are being copied.
        """
        seen = -1
        if self._tail() + self._area.size.capacity < end:
            self._publish(put)
        while (room := self._tail() + self._area.size.capacity - end) < 0:
            self._area.let_take()
            if room != seen:
                progress.report("handing over a checkpoint")
                seen = room
            self._on_wait()
            time.sleep(PAUSE)
        return room

    def _tail(self) -> int:
        """Position up to which the writers have taken everything."""
        while self._waiting:
            start, end, writer = self._waiting[0]
            taken = int(self._areas[writer].taken[self._rank])
            if taken < end:
                return max(start, taken)
            self._waiting.popleft()
        return self._position


class Receiver:
    """Takes the parts of the tensors that a rank writes out of the areas of its machine.

    Args:
        staging: of that rank.
        check: called again and again while a part is missing; raises if it will not come.
    """

    def __init__(self, staging: Staging, check: Callable[[], None]) -> None:
        self._areas, self._check = staging.areas, check
        self._taken = staging.areas[staging.rank].taken
        self._lent: dict[int, int] = {}  # position after the last part lent, by rank

    def take(self, unit: int, source: int) -> np.ndarray:
        """The bytes of the part that ``source`` hands over; valid until ``release``.

        Args:
            unit: number of the tensor.
        """
        area, capacity = self._areas[source], self._areas[source].size.capacity
        self._wait(partial(area.is_begun, unit))
        start, count = (int(each) for each in area.table[unit])
        if count <= capacity:
            self._wait(partial(area.has_beyond, start + count - 1))
            self._lent[source] = start + count
            return area.data[start % capacity :][:count]
        return self._collected(area, start, count, source)

    def _collected(self, area: Area, start: int, count: int, source: int) -> np.ndarray:
        """A part that is larger than the area, which gives room back piece by piece."""
        capacity, position, end = area.size.capacity, start, start + count
        part = np.empty(count, np.uint8)
        while position < end:
            self._wait(partial(area.has_beyond, position))
            piece = min(end, int(area.counters[_PUT])) - position
            piece = min(piece, capacity - position % capacity)
            part[position - start :][:piece] = area.data[position % capacity :][:piece]
            position += piece
            self._taken[source] = position
        return part

    def release(self) -> None:
        """Gives room back: what was taken is not needed any more."""
        for source, position in self._lent.items():
            self._taken[source] = position
        self._lent.clear()

    def _wait(self, is_there: Callable[[], object]) -> None:
        while not is_there():
            self._check()
            time.sleep(PAUSE)
