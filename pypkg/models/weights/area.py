"""The areas of shared memory in which the ranks of a machine put parts of tensors for each other.

No file system has a name for an area: it goes with the processes. A rank that has ended is told by
that, as other processes find its area no more. Nothing here imports Paddle.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from pypkg.errors import UserError

ALIGNMENT = 64  # bytes; of a part in an area
PUT, _MAY_TAKE, _DONE, _GIVEN_UP = range(4)  # places of the counters in the header
_COUNTERS = 8
_ABSENT = -1  # instead of the position of a part
_ALL = np.iinfo(np.int64).max  # a position beyond all parts


class LostRankError(UserError):
    """A rank has ended, or has given up a save, that has yet to hand over or to take parts."""


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
            if not self._is_this(os.fstat(descriptor)):
                raise FileNotFoundError(f"{self.path} is another file")
            return Area(descriptor, self.size)
        finally:
            os.close(descriptor)

    def is_there(self) -> bool:
        """Whether the process that made the area still runs, for one that could open it."""
        try:
            return self._is_this(os.stat(self.path))
        except OSError:
            return False

    def _is_this(self, status: os.stat_result) -> bool:
        return (status.st_dev, status.st_ino) == tuple(self.identity)


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
        """Says that the rank has copied its parts, or that it has no more room for them."""
        self.counters[_MAY_TAKE] = 1

    def may_take(self) -> bool:
        """Whether ``let_take`` has been called."""
        return bool(self.counters[_MAY_TAKE])

    def is_begun(self, unit: int) -> bool:
        """Whether the part of the tensor ``unit`` has a position."""
        return self.table[unit, 0] != _ABSENT

    def has_beyond(self, position: int) -> bool:
        """Whether the byte at ``position`` has been put in."""
        return self.counters[PUT] > position

    def take_nothing_more(self) -> None:
        """Says that the rank, as a writer, waits for no part any more."""
        self.taken[:] = _ALL

    def give_up(self) -> None:
        """Says that the rank puts in no more parts, and takes none."""
        self.counters[_GIVEN_UP] = 1
        self.take_nothing_more()

    def has_given_up(self) -> bool:
        """Whether ``give_up`` has been called."""
        return bool(self.counters[_GIVEN_UP])

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

    def is_lost(self, rank: int) -> bool:
        """Whether ``rank`` has given up the save, or its process has ended."""
        place = self.places.get(rank)
        return self.areas[rank].has_given_up() or (place is not None and not place.is_there())
