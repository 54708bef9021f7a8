"""Which ranks see the same folder, in a run whose machines do not share one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from pypkg.parallel import mesh
from pypkg.parallel.comm.collective import from_all_ranks, from_first_rank

T = TypeVar("T")


@dataclass(frozen=True)
class Places:
    """The ranks grouped by the folder that they see.

    Ranks that see the same folder form a place. The lowest rank of a place is its leader.

    Attributes:
        leader_of: leader of each rank's place, by rank; empty if all ranks see the same folder.
    """

    leader_of: tuple[int, ...] = ()

    @property
    def leaders(self) -> list[int]:
        """The leaders of all places, in order; the first is rank 0."""
        return sorted(set(self.leader_of)) or [0]

    @property
    def is_one(self) -> bool:
        """Whether all ranks see the same folder."""
        return len(self.leaders) == 1

    @property
    def index(self) -> int:
        """Index of this rank's place in ``leaders``."""
        return 0 if self.is_one else self.leaders.index(self.leader_of[mesh.current().rank])

    @property
    def is_leader(self) -> bool:
        """Whether this rank leads its place."""
        return self.leaders[self.index] == mesh.current().rank

    def ranks(self, index: int) -> list[int]:
        """The ranks of the place with this index in ``leaders``."""
        if self.is_one:
            return list(range(mesh.current().world_size))
        leader = self.leaders[index]
        return [rank for rank, each in enumerate(self.leader_of) if each == leader]

    def from_leaders(self, make: Callable[[], T]) -> list[T]:
        """Calls ``make`` on the leaders and returns the results, by place, on every rank.

        Every rank must call this. The results must be picklable. ``make`` may take any time.

        Raises:
            UserError: on every rank, if ``make`` raises it on any leader.
        """
        if self.is_one:
            return [from_first_rank(make)]
        of_ranks = from_all_ranks(lambda: [make()] if self.is_leader else [])
        return [result for each in of_ranks for result in each]

    def from_leader(self, make: Callable[[], T]) -> T:
        """As ``from_leaders``, but returns only the result of this rank's leader."""
        return self.from_leaders(make)[self.index]
