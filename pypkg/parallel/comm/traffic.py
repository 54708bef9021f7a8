"""Counts the communication of a process: operations, elements, bytes and seconds.

There is one count for each group of the mesh and each operation. The size of an operation is the
size of the tensor that this process passes to it: for a gather its own part, for a reduce-scatter
the whole input, for a broadcast the tensor on every rank, for a send the tensor. A receive has size
0.

``Traffic.counting`` replaces the methods of the process groups' class by methods that count, while
its block runs. It sees every operation that Python starts. It does not see operators of Paddle that
communicate inside a kernel. This package uses one of them, the concatenation of logits on GPUs,
when it generates text under tensor parallelism. It does not see sends of parts of a tensor either,
which this package disables in fleet.

Seconds are measured from the call of an operation to its end. On a GPU the host synchronizes with
the device before and after each operation, so nothing overlaps during a measurement. For an
operation that returns at once (``sync_op=False``), only the call is measured.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import paddle
import paddle.distributed as dist
from paddle import Tensor
from paddle.distributed.collective import _get_group_map

from pypkg.parallel import mesh

# By Paddle's method: the operation, and the index of the argument that is sent (None: none).
_METHODS: dict[str, tuple[str, int | None]] = {
    "all_gather": ("all_gather", 0),  # or 1, see _sent
    "all_gather_into_tensor": ("all_gather", 1),
    "all_reduce": ("all_reduce", 0),
    "allreduce": ("all_reduce", 0),
    "all_to_all": ("all_to_all", 1),
    "all_to_all_single": ("all_to_all", 1),
    "all_to_all_tensor": ("all_to_all", 1),
    "barrier": ("barrier", None),
    "broadcast": ("broadcast", 0),
    "gather": ("gather", 0),
    "recv": ("recv", None),
    "reduce": ("reduce", 0),
    "reduce_scatter": ("reduce_scatter", 1),
    "reduce_scatter_tensor": ("reduce_scatter", 1),
    "scatter": ("scatter", 1),
    "scatter_tensor": ("scatter", 1),
    "send": ("send", 0),
}
_METHODS |= {f"{name}_on_calc_stream": what for name, what in _METHODS.items()}
_START_BATCH, _END_BATCH = "_start_coalescing", "_end_coalescing"  # of sends and receives
AXES = ("tensor", "context", "pipeline", "data", "sharding")
OTHER = "other"  # a group that spans several axes, but not all processes
GROUPS = (*AXES, "world", OTHER)


@dataclass
class Count:
    """The sums of one operation in one group: calls, elements, bytes and seconds."""

    operations: int = 0
    elements: int = 0
    bytes: int = 0
    seconds: float = 0.0

    def add(self, other: Count) -> None:
        self.operations += other.operations
        self.elements += other.elements
        self.bytes += other.bytes
        self.seconds += other.seconds


class Traffic:
    """The counts of this process.

    Attributes:
        counts: by group (one of ``GROUPS``) and operation; only those that occurred.
    """

    def __init__(self) -> None:
        self.counts: defaultdict[tuple[str, str], Count] = defaultdict(Count)
        self._names: dict[int, str] = {}  # of groups, by the identity of the process group
        self._in_batch: set[int] = set()

    def total(self, group: str | None = None, operation: str | None = None) -> Count:
        """The sum of the counts of a group and an operation; None: of all groups or operations."""
        total = Count()
        for (of_group, of_operation), count in self.counts.items():
            if group in (None, of_group) and operation in (None, of_operation):
                total.add(count)
        return total

    def clear(self) -> None:
        """Removes all counts."""
        self.counts.clear()

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Counts the operations inside the block. A run of one process has none."""
        if mesh.current().world_size == 1:
            yield
            return
        kind = type(dist.communication.group._get_global_group().process_group)
        replaced = [*_METHODS, _START_BATCH, _END_BATCH]
        before = {name: vars(kind).get(name) for name in replaced}
        for name in replaced:
            if method := getattr(kind, name, None):
                setattr(kind, name, self._counted(name, method))
        try:
            yield
        finally:
            for name, method in before.items():
                if method is not None:
                    setattr(kind, name, method)
                elif name in vars(kind):  # inherited before
                    delattr(kind, name)

    def _counted(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(group: Any, *arguments: Any, **options: Any) -> Any:
            count, key = self.counts[self._name_of(group), self._operation(name)], id(group)
            if name == _START_BATCH:
                self._in_batch.add(key)
            elif name == _END_BATCH:
                self._in_batch.discard(key)
            else:
                sent = _sent(name, arguments)
                count.operations += 1
                count.elements += sum(tensor.size for tensor in sent)
                count.bytes += sum(tensor.size * tensor.element_size() for tensor in sent)
            is_awaited = key not in self._in_batch and not any(a is False for a in arguments)
            start = _now(is_awaited)
            result = method(group, *arguments, **options)
            count.seconds += _now(is_awaited) - start
            return result

        return call

    def _operation(self, name: str) -> str:
        """The operation that a method counts as. The end of a batch waits for its receives."""
        return _METHODS[name][0] if name in _METHODS else "recv"

    def _name_of(self, process_group: Any) -> str:
        key = id(process_group)
        if key not in self._names:
            self._names[key] = _find_name(process_group)
        return self._names[key]


def _sent(name: str, arguments: Sequence[Any]) -> Sequence[Tensor]:
    """The tensors that a call of the method ``name`` sends."""
    place = _METHODS[name][1]
    if place is None:
        return ()
    if isinstance(arguments[0], (list, tuple)):  # all_gather, which takes (input, output) as well
        place = 1
    sent = arguments[place]
    return sent if isinstance(sent, (list, tuple)) else (sent,)


def _find_name(process_group: Any) -> str:
    """The name of a group in ``GROUPS``: that of the axis whose group contains all its members."""
    current = mesh.current()
    axes = {name: group for name in AXES if (group := getattr(current, name)) is not None}
    for number, group in _get_group_map().items():
        if group.process_group is not process_group:
            continue
        if number == 0:
            return "world"
        for name, axis in axes.items():
            if set(group.ranks) <= set(axis.ranks):
                return name
    return OTHER


def _now(is_awaited: bool) -> float:
    """Time in seconds; if ``is_awaited``, after the GPU has finished its work."""
    if is_awaited and paddle.device.get_device().startswith("gpu"):
        paddle.device.synchronize()
    return time.perf_counter()
