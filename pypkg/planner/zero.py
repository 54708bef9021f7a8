"""Gradients and optimizer state of the ZeRO stages, as in parallel/optimizer/zero/stages.py.

Each class holds the parameters of a rank on the tape, receives their gradients from the backward
passes, and allocates what an update allocates. Optimizer state does not change within a step and is
counted separately (``state``). Stage 3 is in sliced_layers.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from pypkg.models.architecture.parameter_shapes import ParameterShape
from pypkg.parallel.update_rules import moment_bytes, scalars, updated_by_muon
from pypkg.planner.operators import COMMUNICATION, GRADIENTS, WORKSPACE, Operators
from pypkg.planner.tape import Parameter, Tensor

WEIGHTS, MASTER_WEIGHTS, MOMENTS, BUCKETS = "weights", "master weights", "moments", "buckets"
BUCKET_BYTES = 128 * 2**20  # data_parallel.py and gradient_reducer.py have the same
ALIGNMENT = 256  # bytes; of fleet's flat storages and of gradient_reducer.py
IN_FLIGHT = 2  # gradient_reducer.py
# Temporary bytes of a rule's operators: per element of all that it updates at once, and per element
# of the largest parameter in float32, in 16 bits with master weights, and in 16 bits without.
# Counted on a CPU with one to four matrices (tests/planner/time/test_update_memory.py).
_WORKSPACES = {
    "adamw": (0, (0, 0, 10)),
    "adamw_16bit_moment": (0, (10, 14, 18)),
    "adamw_8bit": (0, (8, 14, 18)),
    "lion": (0, (24, 24, 28)),
    "adafactor": (8, (16, 16, 20)),
    "muon": (4, (20, 20, 20)),
}
_FLOAT = 4


@dataclass(frozen=True)
class UpdateLayout:
    """How the parameters of a rank are updated.

    Attributes:
        sharding, rank: degree of the sharding group and the rank in it; of stage 0 1 and 0.
        data: replicas: data-parallel ranks, and those of a context group.
        has_main_grad: whether gradients of 16 bits accumulate in float32.
        reduces_once: whether stage 2 reduces in the last backward pass of a step alone.
        offloads: whether optimizer state is in host memory.
        optim: the optimizer.
        has_masters: whether parameters of 16 bits have master weights.
    """

    sharding: int = 1
    rank: int = 0
    data: int = 1
    has_main_grad: bool = False
    reduces_once: bool = False
    offloads: bool = False
    optim: str = "adamw"
    has_masters: bool = True


def aligned(elements: int, item: int) -> int:
    """``elements`` of ``item`` bytes, padded to a multiple of ALIGNMENT bytes; in elements."""
    unit = ALIGNMENT // item
    return -(-elements // unit) * unit


def owners(shapes: Sequence[ParameterShape], ranks: int, is_sorted: bool) -> list[int]:
    """The owner of each parameter: one after another goes to the rank with the fewest elements.

    Args:
        is_sorted: whether the largest parameters come first (fleet's DygraphShardingOptimizer,
            stage 1) instead of the order of the model (GroupShardedOptimizerStage2).
    """
    order = list(range(len(shapes)))
    if is_sorted:
        order.sort(key=lambda place: shapes[place].size, reverse=True)
    held, found = [0] * ranks, [0] * len(shapes)
    for place in order:
        found[place] = held.index(min(held))
        held[found[place]] += shapes[place].size
    return found


def fullest(shapes: Sequence[ParameterShape], found: Sequence[int], ranks: int) -> int:
    """The rank that owns most elements."""
    held = [0] * ranks
    for shape, owner in zip(shapes, found, strict=True):
        held[owner] += shape.size
    return held.index(max(held))


class Stage0:
    """Whole parameters, gradients and state on every rank.

    Args:
        shapes: shapes of this rank's parameters, in the order of the model.

    Attributes:
        parameters: by name.
        order: in stage 3 the layers in the order in which a micro batch needs their weights.
    """

    def __init__(
        self, ops: Operators, shapes: Sequence[ParameterShape], layout: UpdateLayout
    ) -> None:
        self.order: list[str] = []
        self._ops, self._shapes, self._layout = ops, shapes, layout
        self._gradient_bytes = _FLOAT if layout.has_main_grad else ops.dtype_bytes
        self._main: dict[str, Tensor] = {}
        self.parameters = {each.name: self._parameter(each) for each in shapes}
        self._watch()

    def _parameter(self, shape: ParameterShape) -> Parameter:
        return self._ops.tape.parameter(shape.name, shape.size * self._ops.dtype_bytes, WEIGHTS)

    def _watch(self) -> None:
        if self._layout.has_main_grad:
            for parameter in self.parameters.values():
                parameter.on_gradient = self._add_to_main

    def _add_to_main(self, parameter: Parameter) -> None:
        """main_grad.py: float32, made by the first gradient."""
        if parameter.name not in self._main:
            elements = parameter.num_bytes // self._ops.dtype_bytes
            self._main[parameter.name] = self._ops.floats(elements, GRADIENTS)
        parameter.clear_gradient()

    def call(self, name: str, function: Callable[[], Sequence[Tensor]]) -> Sequence[Tensor]:
        """Runs a layer."""
        return function()

    def begin_recompute(self, last: str, incoming: list[Tensor | None]) -> None:
        """Called when the backward pass of ``last`` has begun, before its layers are recomputed."""

    def owned(self) -> list[ParameterShape]:
        """The parameters that this rank updates; a sliced one with the size of its slice."""
        return list(self._shapes)

    def state(self) -> dict[str, int]:
        """Bytes of optimizer state by term; on a CPU with the scalars of each parameter."""
        optim, whole = self._layout.optim, {each.name: each.shape for each in self._shapes}
        owned = self.owned()
        held = [] if self._layout.offloads else owned
        has_masters = self._layout.has_masters and self._ops.dtype_bytes < _FLOAT
        masters = sum(each.size for each in held) * _FLOAT if has_masters else 0
        moments = sum(moment_bytes(optim, e.name, whole[e.name], e.size) for e in held)
        count = sum(scalars(optim, each.name, whole[each.name]) for each in owned)
        numbers = 0 if self._ops.is_gpu else _FLOAT * count
        return {MASTER_WEIGHTS: masters, MOMENTS: moments + numbers}

    def begin_step(self, micro_batches: int) -> None:
        """Says how many backward passes follow until ``step``."""

    def begin_pass(self) -> None:
        """A forward pass of a micro batch begins."""

    def accumulate_all(self) -> None:
        """Accumulates all gradients, as after the backward passes of a step."""
        for parameter in reversed(self.parameters.values()):
            parameter.accumulate(self._ops.like(parameter, GRADIENTS))

    def wait(self) -> None:
        """Waits for the messages of the passes."""

    def step(self) -> None:
        """Averages, clips and updates."""
        if self._layout.data > 1:
            self._average(each.size for each in self._shapes)
        self._update()

    def clear(self) -> None:
        """Drops the gradients."""
        self._main.clear()
        for parameter in self.parameters.values():
            parameter.clear_gradient()

    def _average(self, sizes: Iterable[int]) -> None:
        """data_parallel.py: one bucket at a time is joined, and split, which copies, unless it is
        one gradient."""
        held, count = 0, 0
        for size in (*(each * self._gradient_bytes for each in sizes), BUCKET_BYTES):
            if count and held + size > BUCKET_BYTES:
                if count > 1:
                    self._ops.tape.empty(2 * held, BUCKETS)
                held, count = 0, 0
            held, count = held + size, count + 1

    def _update(self) -> None:
        """The norm widens gradients of 16 bits, one at a time; offload moves one's state."""
        largest = max((each.size for each in self.owned()), default=0)
        if self._gradient_bytes < _FLOAT:
            self._ops.floats(largest, WORKSPACE)
        if self._layout.offloads:
            tensors = 2 + (self._ops.dtype_bytes < _FLOAT)
            self._ops.floats(tensors * largest, MOMENTS)
        self._ops.tape.empty(self._workspace(), WORKSPACE)

    def _workspace(self) -> int:
        """Bytes of the copies that the operators of the update rule make."""
        optim, whole = self._layout.optim, {each.name: each.shape for each in self._shapes}
        of_all, of_largest = _WORKSPACES[optim]
        sizes = [
            each.size
            for each in self.owned()
            if optim != "muon" or updated_by_muon(each.name, whole[each.name])
        ]
        form = 1 if self._layout.has_masters else 2
        form = form if self._ops.dtype_bytes < _FLOAT else 0
        return of_all * sum(sizes) + of_largest[form] * max(sizes, default=0)


class Stage1(Stage0):
    """Gradients are reduced to their owners before the update."""

    def __init__(
        self, ops: Operators, shapes: Sequence[ParameterShape], layout: UpdateLayout
    ) -> None:
        self._owners = owners(shapes, layout.sharding, is_sorted=True)
        super().__init__(ops, shapes, layout)

    def owned(self) -> list[ParameterShape]:
        pairs = zip(self._shapes, self._owners, strict=True)
        return [shape for shape, owner in pairs if owner == self._layout.rank]

    def step(self) -> None:
        if not self._ops.is_gpu:  # gloo's reduce sums a copy
            largest = max(each.size for each in self._shapes)
            self._ops.tape.empty(largest * self._gradient_bytes, COMMUNICATION)
        if self._layout.data > 1:
            self._average(each.size for each in self.owned())
        self._update()


@dataclass(eq=False)
class _Bucket:
    """A bucket of gradient_reducer.py."""

    owner: int
    names: list[str]
    size: int = 0
    buffer: Tensor | None = None
    filled: set[str] | None = None
    missing: dict[str, int] | None = None


class Stage2(Stage0):
    """Gradients are reduced in buckets while the backward pass runs (gradient_reducer.py)."""

    def __init__(
        self, ops: Operators, shapes: Sequence[ParameterShape], layout: UpdateLayout
    ) -> None:
        self._owners = owners(shapes, layout.sharding, is_sorted=False)
        self._passes = 1
        self._in_flight: list[_Bucket] = []
        super().__init__(ops, shapes, layout)

    def _parameter(self, shape: ParameterShape) -> Parameter:
        """A part of its owner's flat storage."""
        item, tape = self._ops.dtype_bytes, self._ops.tape
        memory = tape.memory(aligned(shape.size, item) * item, WEIGHTS)
        return Parameter(shape.name, shape.size * item, memory)

    def owned(self) -> list[ParameterShape]:
        pairs = zip(self._shapes, self._owners, strict=True)
        return [shape for shape, owner in pairs if owner == self._layout.rank]

    def _watch(self) -> None:
        self._buckets = self._divide()
        self._bucket_of = {name: bucket for bucket in self._buckets for name in bucket.names}
        for parameter in self.parameters.values():
            parameter.on_gradient = self._take

    def _divide(self) -> list[_Bucket]:
        item, found = self._gradient_bytes, []
        limit = BUCKET_BYTES // self._layout.sharding // item
        open_of: dict[int, _Bucket] = {}
        for shape, owner in zip(reversed(self._shapes), reversed(self._owners), strict=True):
            size, bucket = aligned(shape.size, item), open_of.get(owner)
            if bucket is None or bucket.size + size > limit:
                bucket = open_of[owner] = _Bucket(owner, [])
                found.append(bucket)
            bucket.names.append(shape.name)
            bucket.size += size
        return found

    def begin_step(self, micro_batches: int) -> None:
        self._passes = micro_batches if self._layout.reduces_once else 1
        for bucket in self._buckets:
            bucket.missing = dict.fromkeys(bucket.names, self._passes)

    def _take(self, parameter: Parameter) -> None:
        bucket = self._bucket_of[parameter.name]
        self._wait(bucket)
        self._add(bucket, parameter)
        parameter.clear_gradient()
        assert bucket.missing is not None
        left = bucket.missing.pop(parameter.name) - 1
        if left:
            bucket.missing[parameter.name] = left
        if not bucket.missing:
            self._reduce(bucket)

    def _add(self, bucket: _Bucket, parameter: Parameter) -> None:
        gradient, elements = parameter.gradient, parameter.num_bytes // self._ops.dtype_bytes
        assert gradient is not None
        if self._gradient_bytes != self._ops.dtype_bytes:
            gradient = self._ops.floats(elements, GRADIENTS)
        if len(bucket.names) > 1 and bucket.buffer is None:
            bucket.buffer = self._ops.tape.empty(bucket.size * self._gradient_bytes, GRADIENTS)
        elif bucket.buffer is None:
            bucket.buffer = gradient.detach()

    def _reduce(self, bucket: _Bucket) -> None:
        while len(self._in_flight) >= IN_FLIGHT:
            self._wait(self._in_flight[0])
        assert bucket.buffer is not None
        if not self._ops.is_gpu:
            self._ops.tape.empty(bucket.buffer.num_bytes, COMMUNICATION)
        self._in_flight.append(bucket)
        bucket.missing = dict.fromkeys(bucket.names, self._passes)

    def _wait(self, bucket: _Bucket) -> None:
        if bucket not in self._in_flight:
            return
        self._in_flight.remove(bucket)
        if bucket.owner != self._layout.rank:
            bucket.buffer = None

    def wait(self) -> None:
        while self._in_flight:
            self._wait(self._in_flight[0])

    def step(self) -> None:
        self._update()

    def clear(self) -> None:
        for bucket in self._buckets:
            bucket.buffer = None
