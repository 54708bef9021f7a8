"""The plan of a save: which rank writes which tensors into which file.

A plan depends only on the shapes of the tensors and on the ranks that hold them, so every rank
makes the same one. Nothing here imports Paddle.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import heapify, heapreplace
from typing import Any

import numpy as np

from pypkg.models.weights.assembly import Assembly, Division, JoinedTensor
from pypkg.models.weights.formats.safetensors import TensorSpec
from pypkg.models.weights.formats.stored_tensor import Shape

# A rank with this many times the mean bytes of its neighbours, or fewer, hands nothing on.
_EVEN_ENOUGH = 1.02


@dataclass(frozen=True)
class Unit:
    """A parameter, or a state tensor of one, that is copied to host memory as a whole.

    Attributes:
        shape: of the parameter.
        specs: the tensors that hold it in a file, by name.
        ranks: the ranks that may write it.
        division: its parts on the ranks; None if a rank holds all of it, or this one nothing.
        copies: the ranks that may write an equal copy instead, for each copy.
    """

    name: str
    shape: Shape
    specs: Mapping[str, TensorSpec]
    ranks: Sequence[int]
    division: Division | None = None
    copies: Sequence[Sequence[int]] = ()

    @property
    def num_bytes(self) -> int:
        """Bytes of its tensors in a file."""
        return sum(spec.num_bytes for spec in self.specs.values())


@dataclass(frozen=True)
class TensorSet:
    """Tensors of the whole model that are written to files with a common stem.

    Attributes:
        stem: stem of the names of the files, such as "model".
        units: the units in the order of the model.
        read: gathers the unit of a name on the given rank, one of those that may write it; returns
            None on the others.
            Every rank calls it for all units without a division, in order.
        to_file: returns the tensors of a unit, by name, from the whole value.
        max_file_size: bytes; a larger tensor gets a file of its own. None: no limit.
        part: returns this rank's part of a unit with a division, by name.
    """

    stem: str
    units: Sequence[Unit]
    read: Callable[[str, int], np.ndarray | None]
    to_file: Callable[[str, JoinedTensor], Mapping[str, JoinedTensor]]
    max_file_size: int | None = None
    part: Callable[[str], np.ndarray] | None = None

    def total_size(self) -> int:
        """Bytes of all tensors."""
        return sum(unit.num_bytes for unit in self.units)


@dataclass(frozen=True)
class PlannedFile:
    """A file of a set, the rank that writes it, and its tensors in order."""

    stem: str
    name: str
    rank: int
    specs: Mapping[str, TensorSpec]


@dataclass(frozen=True)
class PlannedUnit:
    """A unit as its writer handles it; it is sent to the process that writes.

    Attributes:
        number: number of the unit in the plan.
        dtype: dtype of its tensors.
        writer: the rank that writes it.
        sources: the ranks that pass their parts to the writer, in the order of ``assembly``. A
            single one passes the whole unit.
        to_file: as ``TensorSet.to_file``.
    """

    number: int
    name: str
    dtype: str
    writer: int
    sources: tuple[int, ...]
    assembly: Assembly
    to_file: Callable[[str, JoinedTensor], Mapping[str, JoinedTensor]]

    def tensors(self, parts: Sequence[np.ndarray]) -> Mapping[str, JoinedTensor]:
        """The tensors of the file, by name, from the parts of ``sources``."""
        return self.to_file(self.name, self.assembly.join(parts))


def no_memory_is_shared(ranks: Sequence[int]) -> bool:
    """A ``share_memory`` for ranks that exchange parts through process groups only."""
    return False


class SavePlan:
    """Spreads the units of all ``sets`` evenly, by bytes, over the ranks that may write them.

    A rank that would still write more than its neighbours hands whole units to them. Units that are
    divided over ranks are not handed on, nor are others beside them.

    Args:
        neighbours: groups of ranks that can hand each other whole units through shared memory.

    Attributes:
        files: all files of all ranks.
    """

    def __init__(self, sets: Sequence[TensorSet], neighbours: Sequence[Sequence[int]] = ()) -> None:
        self._sets = sets
        units = [(each.stem, unit) for each, unit in self._all_units()]
        self._holders = _assign(units)
        # A rank does not know how units are divided of which it holds nothing.
        is_divided = any(unit.division is not None for _, unit in units)
        self.neighbours = () if is_divided else neighbours
        self._writers = _relieved(units, self._holders, self.neighbours)
        self.files = [file for each in sets for file in self._files_of(each)]

    def without_neighbours(self) -> SavePlan:
        """The plan for ranks that share no memory."""
        return SavePlan(self._sets) if self.neighbours else self

    def files_of(self, rank: int) -> list[PlannedFile]:
        """The files that ``rank`` writes, in the order in which it gets their tensors."""
        return [file for file in self.files if file.rank == rank]

    def num_bytes_of(self, rank: int) -> int:
        """Bytes of the tensors that ``rank`` writes."""
        return sum(spec.num_bytes for file in self.files_of(rank) for spec in file.specs.values())

    def units(
        self, share_memory: Callable[[Sequence[int]], bool] = no_memory_is_shared
    ) -> list[PlannedUnit]:
        """All units in the order in which the ranks pass their parts.

        Args:
            share_memory: whether the given ranks exchange parts through shared memory. If they do
                not, ``TensorSet.read`` gathers the unit on its only source.
        """
        found: list[PlannedUnit] = []
        for each, unit in self._all_units():
            writer = self._writers[each.stem, unit.name]
            sources: tuple[int, ...] = (self._holders[each.stem, unit.name],)
            assembly = Assembly(unit.shape)
            if unit.division is not None and share_memory(unit.division.holders(writer)):
                sources, assembly = unit.division.holders(writer), unit.division.assembly
            dtype = next(iter(unit.specs.values())).dtype
            planned = (len(found), unit.name, dtype, writer, sources, assembly, each.to_file)
            found.append(PlannedUnit(*planned))
        return found

    def parts_of(
        self, rank: int, units: Sequence[PlannedUnit]
    ) -> Iterator[tuple[PlannedUnit, np.ndarray]]:
        """Yields the parts that ``rank`` passes on. Every rank must iterate to the end."""
        for planned, (each, unit) in zip(units, self._all_units(), strict=True):
            if len(planned.sources) == 1:
                (source,) = planned.sources
                value = each.read(unit.name, source)
                if source == rank:
                    assert value is not None  # ``read`` returns it on the rank of its argument
                    yield planned, value
            elif rank in planned.sources:
                assert each.part is not None  # a unit with a division has one
                yield planned, each.part(unit.name)

    def part_bytes(self, units: Sequence[PlannedUnit], rank: int) -> list[tuple[int, int]]:
        """The writer and the bytes of each part of ``units`` that ``rank`` passes on."""
        return [
            (
                planned.writer,
                unit.num_bytes
                if len(planned.sources) == 1 or unit.division is None
                else unit.division.part_bytes,
            )
            for planned, (_, unit) in zip(units, self._all_units(), strict=True)
            if rank in planned.sources
        ]

    def _all_units(self) -> Iterator[tuple[TensorSet, Unit]]:
        return ((each, unit) for each in self._sets for unit in each.units)

    def indices(self) -> dict[str, dict[str, Any]]:
        """Index of each set of several files, by its name, in Hugging Face's form."""
        found = {}
        for each in self._sets:
            files = [file for file in self.files if file.stem == each.stem]
            if len(files) > 1:
                found[index_name(each.stem)] = {
                    "metadata": {"total_size": each.total_size()},
                    "weight_map": {name: file.name for file in files for name in file.specs},
                }
        return found

    def _files_of(self, tensors: TensorSet) -> list[PlannedFile]:
        of_ranks: dict[int, dict[str, TensorSpec]] = {}
        for unit in tensors.units:
            of_ranks.setdefault(self._writers[tensors.stem, unit.name], {}).update(unit.specs)
        shards = [
            (rank, shard)
            for rank, specs in sorted(of_ranks.items(), key=lambda each: each[0])
            for shard in split_by_size(specs, tensors.max_file_size)
        ]
        shards = shards or [(0, {})]  # a set without tensors is an empty file
        return [
            PlannedFile(
                tensors.stem,
                shard_name(tensors.stem, number, len(shards)),
                rank,
                shard,
            )
            for number, (rank, shard) in enumerate(shards, start=1)
        ]


def split_by_size(
    specs: Mapping[str, TensorSpec], max_size: int | None
) -> list[dict[str, TensorSpec]]:
    """The tensors of each file shard of at most ``max_size`` bytes, in order."""
    shards: list[dict[str, TensorSpec]] = []
    size = 0
    for name, spec in specs.items():
        if not shards or (max_size is not None and size + spec.num_bytes > max_size):
            shards.append({})
            size = 0
        shards[-1][name] = spec
        size += spec.num_bytes
    return shards


def shard_name(stem: str, number: int, count: int) -> str:
    """Name of the file ``number``, from 1 on, of ``count``, as Hugging Face's tools have it."""
    if count == 1:
        return f"{stem}.safetensors"
    return f"{stem}-{number:05d}-of-{count:05d}.safetensors"


def index_name(stem: str) -> str:
    """Name of the index of several files."""
    return f"{stem}.safetensors.index.json"


def as_it_is(name: str, value: JoinedTensor) -> dict[str, JoinedTensor]:
    """``TensorSet.to_file`` where a file holds the unit itself."""
    return {name: value}


def _assign(units: Sequence[tuple[str, Unit]]) -> dict[tuple[str, str], int]:
    """The rank that writes each unit, by stem and name: the least loaded of its possible ranks.

    These are ``Unit.ranks``, or the ranks of the copy that ``_chosen_copies`` returns. Units with
    the fewest possible ranks are assigned first, and of these the largest. If loads are equal, the
    lowest rank writes.
    """
    chosen = _chosen_copies(units)
    possible = [(stem, unit, chosen.get((stem, unit.name), unit.ranks)) for stem, unit in units]
    loads: Counter[int] = Counter()
    found: dict[tuple[str, str], int] = {}
    # A heap of (load, rank) for each sequence of ranks, by its id: units of one place share the
    # sequence, and to compare or hash a long one per unit would cost as much as a linear search.
    heaps: dict[int, list[tuple[int, int]]] = {}
    possible.sort(key=lambda each: (len(each[2]), -each[1].num_bytes))
    for stem, unit, ranks in possible:
        heap = heaps.get(id(ranks))
        if heap is None:
            heap = heaps[id(ranks)] = [(loads[rank], rank) for rank in ranks]
            heapify(heap)
        # Loads only grow, so an entry that another heap has outdated is too small, never too large.
        while heap[0][0] != loads[heap[0][1]]:
            heapreplace(heap, (loads[heap[0][1]], heap[0][1]))
        rank = heap[0][1]
        loads[rank] += unit.num_bytes
        heapreplace(heap, (loads[rank], rank))
        found[stem, unit.name] = rank
    return found


def _relieved(
    units: Sequence[tuple[str, Unit]],
    holders: Mapping[tuple[str, str], int],
    neighbours: Sequence[Sequence[int]],
) -> dict[tuple[str, str], int]:
    """The rank that writes each unit, after ranks with too many bytes have handed some on.

    The largest unit goes first that brings neither of two ranks beyond the mean of the group.

    Args:
        holders: the rank that writes each unit if it hands nothing on.
    """
    writers = dict(holders)
    loads: Counter[int] = Counter()
    for stem, unit in units:
        loads[holders[stem, unit.name]] += unit.num_bytes
    groups = [ranks for ranks in neighbours if len(ranks) > 1]
    means = [sum(loads[rank] for rank in ranks) / len(ranks) for ranks in groups]
    group_of = {
        rank: number
        for number, ranks in enumerate(groups)
        for rank in ranks
        if loads[rank] > _EVEN_ENOUGH * means[number]
    }
    for stem, unit in sorted(units, key=lambda each: -each[1].num_bytes) if group_of else ():
        rank = holders[stem, unit.name]
        number = group_of.get(rank)
        if number is None or loads[rank] <= _EVEN_ENOUGH * means[number]:
            continue
        least = min(groups[number], key=lambda each: (loads[each], each))
        if unit.num_bytes <= min(loads[rank] - means[number], means[number] - loads[least]):
            writers[stem, unit.name] = least
            loads[rank] -= unit.num_bytes
            loads[least] += unit.num_bytes
    return writers


def _chosen_copies(units: Sequence[tuple[str, Unit]]) -> dict[tuple[str, str], Sequence[int]]:
    """The ranks of the copy that is written, of each unit with copies, by stem and name.

    The largest unit is first, and goes to the ranks with the smallest mean load. A unit loads its
    possible ranks evenly, because those are assigned later.
    """
    copied = [each for each in units if each[1].copies]
    if not copied:
        return {}
    totals: Counter[int] = Counter()  # bytes by the id of the ranks, as in ``_assign``
    possible: dict[int, Sequence[int]] = {}
    for _, unit in units:
        if not unit.copies:
            possible[id(unit.ranks)] = unit.ranks
            totals[id(unit.ranks)] += unit.num_bytes
    loads: defaultdict[int, float] = defaultdict(float)
    for key, ranks in possible.items():
        for rank in ranks:
            loads[rank] += totals[key] / len(ranks)
    found: dict[tuple[str, str], Sequence[int]] = {}
    for stem, unit in sorted(copied, key=lambda each: -each[1].num_bytes):
        ranks = min(
            (unit.ranks, *unit.copies),
            key=lambda each: sum(loads[rank] for rank in each) / len(each),
        )
        even = unit.num_bytes / len(ranks)
        for rank in ranks:
            loads[rank] += even
        found[stem, unit.name] = ranks
    return found
