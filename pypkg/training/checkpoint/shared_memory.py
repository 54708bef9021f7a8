"""Shared memory through which the ranks of a machine exchange parts of tensors."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence

from pypkg.errors import UserError
from pypkg.models.weights.area import ALIGNMENT, Area, AreaPlace, AreaSize, Staging, new_area
from pypkg.models.weights.save_plan import SavePlan
from pypkg.parallel import mesh
from pypkg.parallel.comm.collective import from_all_ranks
from pypkg.parallel.endpoints import hosts

# Bytes of a synchronous save: parts that wait for their writer, and the largest part beside them.
_WAITING = 64 << 20
_LARGEST = 512 << 20


class SharedMemoryError(UserError):
    """The system did not allocate the memory of an area."""


class SharedMemory:
    """This rank's area of shared memory, and the areas of the other ranks of its machine.

    The areas are kept for later saves, because the first use of memory takes time. They are not in
    a file system (memfd), so they vanish with the processes.

    Args:
        limit: for asynchronous saves, the largest size of the area in bytes. An area is never
            larger than the parts that this rank sends. None: saves are synchronous, and only parts
            for other ranks go through the area. It holds 64 MiB beside the largest part, of which
            up to 512 MiB count. A larger part goes through it in pieces that its writer joins.
    """

    def __init__(self, limit: int | None) -> None:
        self._limit = None if limit is None else max(ALIGNMENT, limit - limit % ALIGNMENT)
        size, found = mesh.current().world_size, hosts()
        self._hosts = found if len(found) == size else [str(rank) for rank in range(size)]
        self._descriptor: int | None = None
        self._own: tuple[AreaPlace, Area] | None = None
        self._touching: threading.Thread | None = None
        self._told: Sequence[AreaPlace] = []
        self._areas: dict[int, Area] = {}
        self._is_visible = True  # until a rank cannot open the area of another rank

    def is_shared(self, ranks: Sequence[int]) -> bool:
        """Whether ``ranks`` can open the areas of each other. The result is the same on all of
        them."""
        host = self._hosts[ranks[0]]
        return self._is_visible and all(self._hosts[rank] == host for rank in ranks)

    def neighbours(self) -> tuple[tuple[int, ...], ...]:
        """The ranks of each machine, which see the areas of each other; the same on all ranks."""
        found: dict[str, list[int]] = {}
        for rank, host in enumerate(self._hosts):
            found.setdefault(host, []).append(rank)
        return tuple(map(tuple, found.values())) if self._is_visible else ()

    def prepare(self, plan: SavePlan) -> None:
        """Creates the area for ``plan``. With a limit, a thread touches its pages in advance.

        Raises:
            SharedMemoryError: the system does not allocate the memory.
        """
        current, units = mesh.current(), plan.units(self.is_shared)
        parts = plan.part_bytes(units, current.rank)
        if self._limit is None:
            to_others = [_aligned(size) for writer, size in parts if writer != current.rank]
            capacity = _WAITING + min(max(to_others, default=0), _LARGEST)
        else:
            needed = sum(_aligned(size) for _, size in parts)
            capacity = max(ALIGNMENT, min(needed, self._limit))
        wanted = AreaSize(capacity, current.world_size, len(units))
        if self._own is not None and self._own[0].size.holds(wanted):
            return
        self._close()
        try:
            self._descriptor, place, area = new_area(wanted)
        except OSError as error:
            raise SharedMemoryError(
                f"shared memory of {wanted.capacity >> 20} MiB for a checkpoint: {error.strerror}"
            ) from error
        self._own = place, area
        if self._limit is not None:
            self._touching = threading.Thread(target=area.touch, daemon=True)
            self._touching.start()

    def emptied(self, plan: SavePlan) -> AreaPlace:
        """Empties this rank's area, makes it large enough for ``plan`` and returns its place.

        No save may be in progress.

        Raises:
            SharedMemoryError: the system does not allocate the memory.
        """
        self.prepare(plan)
        if self._touching is not None:
            self._touching.join()
        assert self._own is not None  # ``prepare`` has made it
        place, area = self._own
        area.empty()
        return place

    def staging(self, places: Sequence[AreaPlace]) -> Staging:
        """The areas for a save. Every rank must call this.

        Args:
            places: the place of each rank's empty area.
        """
        rank = mesh.current().rank
        assert self._own is not None  # it is prepared
        area = self._own[1]
        if places != self._told:
            self._told, self._areas = places, {rank: area}
            self._is_visible = all(from_all_ranks(lambda: self._open(places)))
        shown = self._areas if self._is_visible else {rank: area}
        return Staging(rank, shown, {each: places[each] for each in shown})

    def _open(self, places: Sequence[AreaPlace]) -> bool:
        """Opens the areas of the other ranks of this machine; returns whether that succeeded."""
        own = mesh.current().rank
        for rank, place in enumerate(places):
            if rank != own and self._hosts[rank] == self._hosts[own]:
                try:
                    self._areas[rank] = place.open()
                except OSError:
                    return False
        return True

    def _close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
        self._descriptor = self._own = None

    def __del__(self) -> None:
        self._close()


def _aligned(size: int) -> int:
    """``size`` rounded up, as a part takes it up in an area."""
    return -(-size // ALIGNMENT) * ALIGNMENT
