"""Reduction of gradients to their owners during the backward pass (ZeRO stage 2).

The gradients of each owner form buckets, in the order in which a backward pass computes them. When
a bucket has all of its gradients, its reduction starts and the backward pass continues. The host
waits for the reduction when the bucket's memory is needed again, and before the update.

Fleet's GroupShardedStage2 is not used. It has one bucket for each owner, which is complete only at
the end of the backward pass, and reduces each matrix above 2^23 elements by itself. Its overlap
adds the gradients of the next micro batch to a buffer that may still be in transit.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import paddle
import paddle.distributed as dist
from paddle import Tensor
from paddle.distributed.communication.group import Group

from pypkg.parallel.linear_gradients import adds_to_main_grad

# Total size of the buckets that are being filled, of which each owner has one.
BUCKET_BYTES = 128 * 2**20
# Maximum number of reductions in flight.
IN_FLIGHT = 2
_ALIGNMENT = 256  # bytes; vector loads of the operators need 16


@dataclass
class _Bucket:
    """Gradients that are reduced together to one owner.

    Attributes:
        owner: rank in the group.
        parameters: in the order of their gradients in the buffer.
        starts: offset of each parameter's gradient in the buffer, in elements, by Paddle name.
        size: of the buffer, in elements.
        buffer: the accumulated gradients, flat; for a single parameter, its gradient. None: no
            memory is allocated.
        filled: Paddle names of the parameters whose gradient is in the buffer.
        missing: number of gradients that the next reduction still waits for, by Paddle name;
            parameters that are complete are left out.
        changed: whether there are gradients that are not reduced yet.
        task: the reduction in flight, or None.
    """

    owner: int
    parameters: list[Tensor] = field(default_factory=list)
    starts: dict[str, int] = field(default_factory=dict)
    size: int = 0
    buffer: Tensor | None = None
    filled: set[str] = field(default_factory=set)
    missing: dict[str, int] = field(default_factory=dict)
    changed: bool = False
    task: Any = None

    def drop(self) -> None:
        """Frees the buffer."""
        self.buffer = None
        self.filled.clear()


class GradientReducer:
    """Takes over gradients during backward passes and reduces them to their owners.

    All ranks of the group must construct it with equal arguments, and their backward passes must
    compute gradients in the same order. The reducer holds the gradients; ``parameter.grad`` is
    empty.

    Args:
        parameters: in the order in which the model uses them.
        owners: index in the group of the rank that gets the sum, by Paddle name.
        dtype: of the sums, a Paddle dtype.
        bucket_bytes: total size of the owners' current buckets. A gradient that is larger than one
            owner's share is reduced by itself, without a copy.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        owners: Mapping[str, int],
        group: Group,
        dtype: paddle.dtype,
        bucket_bytes: int = BUCKET_BYTES,
    ) -> None:
        self._group, self._dtype = group, dtype
        # Sums in float16 could overflow. Other dtypes are divided once, before the update.
        self._divides_first = dtype == paddle.float16
        self._passes = 1
        self._in_flight: deque[_Bucket] = deque()
        item = paddle.empty([1], dtype).element_size()
        self._buckets = _divide(
            parameters, owners, bucket_bytes // group.nranks // item, _ALIGNMENT // item
        )
        for bucket in self._buckets:
            self._expect(bucket)
            for parameter in bucket.parameters:
                parameter._register_backward_hook(self._taker(bucket, parameter))

    def begin_step(self, passes: int) -> None:
        """Sets the number of backward passes after which gradients are reduced."""
        if passes != self._passes:
            self._passes = passes
            for bucket in self._buckets:
                self._expect(bucket)

    @paddle.no_grad()
    def finish(self, over: Group | None = None) -> None:
        """Completes the reductions of a step. The gradients that this rank owns are then means.

        Args:
            over: another group over which the gradients are averaged too.
        """
        for bucket in self._buckets:
            if bucket.changed:  # a parameter had fewer gradients than expected
                self._reduce(bucket)
        self.wait()
        factor = 1.0 if self._divides_first else 1.0 / self._group.nranks
        if over is not None:
            factor *= 1.0 / over.nranks
        for bucket in self._owned():
            assert bucket.buffer is not None
            bucket.buffer.scale_(factor)
            if over is not None:
                dist.all_reduce(bucket.buffer, group=over)

    def wait(self) -> None:
        """Waits for all reductions; this rank then holds only the gradients that it owns."""
        while self._in_flight:
            self._wait(self._in_flight[0])

    def gradients(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(parameter, gradient) for this rank's parameters with a gradient, a view of a buffer."""
        for bucket in self._owned():
            for parameter in bucket.parameters:
                if parameter.name in bucket.filled:
                    yield parameter, self._view(bucket, parameter)

    def buffers(self) -> list[Tensor]:
        """All allocated buffers."""
        return [bucket.buffer for bucket in self._buckets if bucket.buffer is not None]

    def clear(self) -> None:
        """Frees all gradients."""
        for bucket in self._buckets:
            bucket.drop()

    def _owned(self) -> Iterator[_Bucket]:
        for bucket in self._buckets:
            if bucket.owner == self._group.rank and bucket.buffer is not None:
                yield bucket

    def _expect(self, bucket: _Bucket) -> None:
        bucket.missing = dict.fromkeys(bucket.starts, self._passes)

    def _taker(self, bucket: _Bucket, parameter: Tensor) -> Callable[..., None]:
        @paddle.no_grad()
        def take(*_: object) -> None:
            self._wait(bucket)
            self._add(bucket, parameter)
            parameter.clear_gradient(False)
            name = parameter.name
            left = bucket.missing.pop(name, 0) - 1
            if left > 0:
                bucket.missing[name] = left
                if adds_to_main_grad(parameter):
                    parameter.main_grad = self._view(bucket, parameter)
            if not bucket.missing:
                self._reduce(bucket)

        return take

    def _add(self, bucket: _Bucket, parameter: Tensor) -> None:
        """Adds what a backward pass has computed: a gradient, or products in ``main_grad``."""
        if adds_to_main_grad(parameter) and parameter.main_grad is not None:
            products, parameter.main_grad = parameter.main_grad, None
            self._add_gradient(bucket, parameter, products)
        if parameter.grad is not None:
            self._add_gradient(bucket, parameter, parameter.grad)

    def _add_gradient(self, bucket: _Bucket, parameter: Tensor, gradient: Tensor) -> None:
        if self._divides_first:
            gradient.scale_(1.0 / self._group.nranks)
        if gradient.dtype != self._dtype:
            gradient = gradient.astype(self._dtype)
        bucket.changed = True
        if parameter.name in bucket.filled:
            view = self._view(bucket, parameter)
            if view.data_ptr() != gradient.data_ptr():  # else products were added to it
                view.add_(gradient)
            return
        bucket.filled.add(parameter.name)
        if len(bucket.parameters) == 1:
            bucket.buffer = _sharing(gradient)  # keeps the memory when the parameter frees it
            return
        if bucket.buffer is None:
            bucket.buffer = paddle.empty([bucket.size], self._dtype)
        paddle.assign(gradient, self._view(bucket, parameter))

    def _view(self, bucket: _Bucket, parameter: Tensor) -> Tensor:
        assert bucket.buffer is not None
        if len(bucket.parameters) == 1:
            return _sharing(bucket.buffer)
        start = bucket.starts[parameter.name]
        view = bucket.buffer._slice(start, start + parameter.size)
        view.get_tensor()._set_dims(parameter.shape)
        return view

    def _reduce(self, bucket: _Bucket) -> None:
        """Starts the reduction of a bucket."""
        for parameter in bucket.parameters:
            if parameter.name not in bucket.filled:
                self._view(bucket, parameter).zero_()
        while len(self._in_flight) >= IN_FLIGHT:
            self._wait(self._in_flight[0])
        assert bucket.buffer is not None
        bucket.task = dist.reduce(
            bucket.buffer, self._group.ranks[bucket.owner], group=self._group, sync_op=False
        )
        bucket.changed = False
        self._in_flight.append(bucket)
        self._expect(bucket)

    def _wait(self, bucket: _Bucket) -> None:
        """Waits for the reduction of a bucket; frees it if another rank owns it."""
        if bucket.task is None:
            return
        bucket.task.wait()
        bucket.task = None
        self._in_flight.remove(bucket)
        if bucket.owner != self._group.rank:
            bucket.drop()


def _sharing(tensor: Tensor) -> Tensor:
    """A tensor that shares the memory and keeps it alive; ``detach`` would be cleared with it."""
    return tensor._slice(0, tensor.shape[0])


def _divide(
    parameters: Sequence[Tensor], owners: Mapping[str, int], limit: int, unit: int
) -> list[_Bucket]:
    """Buckets of at most ``limit`` elements, or of one parameter, in backward order.

    Args:
        unit: each gradient is padded to a multiple of this number of elements.
    """
    buckets: list[_Bucket] = []
    open_of: dict[int, _Bucket] = {}
    for parameter in reversed(parameters):
        owner = owners[parameter.name]
        padded = -(-parameter.size // unit) * unit
        bucket = open_of.get(owner)
        if bucket is None or bucket.size + padded > limit:
            bucket = open_of[owner] = _Bucket(owner)
            buckets.append(bucket)
        bucket.parameters.append(parameter)
        bucket.starts[parameter.name] = bucket.size
        bucket.size += padded
    return buckets
