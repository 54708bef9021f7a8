"""Areas of shared memory through which the ranks of a machine pass parts of tensors to each other.

An area is a memfd without a name in a file system, so it vanishes with the processes. Other
processes open it under /proc of its rank, and therefore notice when that rank has ended. Nothing
here imports Paddle.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from pypkg.errors import UserError

ALIGNMENT = 64  # of parts in an area, in bytes
PUT, _MAY_TAKE, _DONE, _GIVEN_UP = range(4)  # indices of the counters in the header
_COUNTERS = 8
_ABSENT = -1  # in the table: the part has no position yet
_ALL = np.iinfo(np.int64).max  # a position beyond all parts


class LostRankError(UserError):
    """A rank has ended, or has given up a save, before it sent or took all parts."""


class AreaSize(NamedTuple):
    """Size of an area.

    Attributes:
        capacity: bytes for parts, a multiple of ``ALIGNMENT``.
        ranks: number of ranks of the run.
        units: the largest number of tensors in a save.
    """

    capacity: int
    ranks: int
    units: int

    @property
    def header(self) -> int:
        """Size of the header, which precedes the parts, in bytes."""
        used = 8 * (_COUNTERS + self.ranks + 2 * self.units)
        return -(-used // mmap.PAGESIZE) * mmap.PAGESIZE

    def holds(self, other: AreaSize) -> bool:
        """Whether an area of this size can be used in place of one of the size ``other``."""
        return all(own >= wanted for own, wanted in zip(self, other, strict=True))


class AreaPlace(NamedTuple):
    """The address of an area for the other processes of the machine.

    Attributes:
        path: path under /proc of the file descriptor in the process that created the area.
        identity: (device, inode) of the memory, to detect another file at the same path.
        size: of the area.
    """

    path: str
    identity: tuple[int, int]
    size: AreaSize

    def open(self) -> Area:
        """Maps the area into this process.

        Raises:
            OSError: this process cannot open the area.
        """
        descriptor = os.open(self.path, os.O_RDWR)
        try:
            if not self._is_this(os.fstat(descriptor)):
                raise FileNotFoundError(f"{self.path} is another file")
            return Area(descriptor, self.size)
        finally:
            os.close(descriptor)

    def is_there(self) -> bool:
        """Whether the process that created the area still runs, if this process can open it."""
        try:
            return self._is_this(os.stat(self.path))
        except OSError:
            return False

    def _is_this(self, status: os.stat_result) -> bool:
        return (status.st_dev, status.st_ino) == tuple(self.identity)


class Area:
    """The shared memory of a rank, mapped into this process.

    A position counts the bytes that the rank has put into its area since the save began.

    Attributes:
        counters: the state of the rank; the methods read and set it.
        taken: int64 [ranks]: for each rank, the position in that rank's area up to which this rank,
            as a writer, has taken its parts.
        table: int64 [units, 2]: position and size in bytes of the rank's part of each tensor.
        data: the parts, a ring buffer: position p is at ``p % capacity``.
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
        """Touches all pages, so that the system allocates them. The area must be empty."""
        self.data[:: mmap.PAGESIZE] = 0

    def empty(self) -> None:
        """Resets the area to its initial state. No other process may use it at the same time."""
        self.counters[:] = 0
        self.taken[:] = 0
        self.table[:] = _ABSENT

    def let_take(self) -> None:
        """Records that the rank has copied all its parts, or that its area is full."""
        self.counters[_MAY_TAKE] = 1

    def may_take(self) -> bool:
        """Whether ``let_take`` has been called."""
        return bool(self.counters[_MAY_TAKE])

    def is_begun(self, unit: int) -> bool:
        """Whether the rank has assigned a position to its part of the tensor ``unit``."""
        return self.table[unit, 0] != _ABSENT

    def has_beyond(self, position: int) -> bool:
        """Whether the byte at ``position`` has been copied into the area."""
        return self.counters[PUT] > position

    def take_nothing_more(self) -> None:
        """Records that the rank, as a writer, takes no more parts, so that no rank waits for it."""
        self.taken[:] = _ALL

    def give_up(self) -> None:
        """Records that the rank has given up the save: it sends and takes no more parts."""
        self.counters[_GIVEN_UP] = 1
        self.take_nothing_more()

    def has_given_up(self) -> bool:
        """Whether ``give_up`` has been called."""
        return bool(self.counters[_GIVEN_UP])

    def finish(self) -> None:
        """Records that the rank has finished writing, with or without an error."""
        self.counters[_DONE] = 1

    def is_finished(self) -> bool:
        """Whether ``finish`` has been called."""
        return bool(self.counters[_DONE])


def new_area(size: AreaSize) -> tuple[int, AreaPlace, Area]:
    """Creates an area; returns its file descriptor, its place and its memory.

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
    """The areas that a rank uses in a save.

    Attributes:
        rank: this rank.
        areas: the areas of this rank and of the ranks with which it exchanges parts, by rank.
        places: the places of these areas, by rank.
    """

    rank: int = 0
    areas: Mapping[int, Area] = field(default_factory=dict)
    places: Mapping[int, AreaPlace] = field(default_factory=dict)

    def is_lost(self, rank: int) -> bool:
        """Whether ``rank`` has given up the save, or its process has ended."""
        place = self.places.get(rank)
        return self.areas[rank].has_given_up() or (place is not None and not place.is_there())
