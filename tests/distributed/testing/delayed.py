"""Operations that only start do nothing until they are waited for, and are recorded.

On CPU processes gloo completes an operation when it is called. With this a tensor that is read or
overwritten too early gives a wrong result, and a trace shows what lies between start and wait.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import paddle
from paddle import Tensor

from pypkg.parallel.optimizer.zero import gradient_reducer, sliced_layers, weight_broadcast


class Task:
    def __init__(self, run: Callable[[], object], trace: Trace, number: int) -> None:
        self._run: Callable[[], object] | None = run
        self._trace, self._number = trace, number

    def wait(self) -> None:
        if self._run is not None:
            self._trace.waited(self._number)
            self._run()
            self._run = None


class Trace:
    """How many operations of a kind there were, and how many had computation beside them."""

    def __init__(self) -> None:
        self._computed = 0
        self._started: list[tuple[str, int]] = []  # the kind, and what was computed by then
        self._overlapped: set[int] = set()

    def watch(self, model: paddle.nn.Layer) -> None:
        """Takes forward passes of layers with parameters, and gradients, as computation."""
        for layer in model.sublayers():
            if layer.parameters(include_sublayers=False):
                layer.register_forward_pre_hook(self._compute)
        for parameter in model.parameters():
            parameter._register_backward_hook(self._compute)

    def start(self, kind: str, run: Callable[[], object]) -> Task:
        self._started.append((kind, self._computed))
        return Task(run, self, len(self._started) - 1)

    def waited(self, number: int) -> None:
        if self._started[number][1] < self._computed:
            self._overlapped.add(number)

    def counts(self) -> dict[str, list[int]]:
        """By kind: operations, and those that something was computed beside."""
        found: dict[str, list[int]] = {}
        for number, (kind, _) in enumerate(self._started):
            of_kind = found.setdefault(kind, [0, 0])
            of_kind[0] += 1
            of_kind[1] += number in self._overlapped
        return found

    def _compute(self, *_: object) -> None:
        self._computed += 1


@contextlib.contextmanager
def delayed() -> Iterator[Trace]:
    """Delays the operations of the ZeRO stages inside of the block."""
    trace = Trace()
    reduce, reduce_scatter = gradient_reducer.dist.reduce, sliced_layers.stream.reduce_scatter
    gather, broadcast = sliced_layers._all_gather, weight_broadcast.dist.broadcast

    def starting(kind: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def start(*arguments: Any, sync_op: bool = True, **options: Any) -> Any:
            if sync_op:
                return run(*arguments, **options)
            return trace.start(kind, lambda: run(*arguments, **options))

        return start

    def starting_gather(own: Tensor, size: int, group: Any) -> tuple[Tensor, Task]:
        whole = paddle.full([size], -1e9, own.dtype)
        process_group = group.process_group
        return whole, trace.start("gather", lambda: process_group.all_gather(own, whole))

    gradient_reducer.dist.reduce = starting("reduce", reduce)
    sliced_layers.stream.reduce_scatter = starting("reduce_scatter", reduce_scatter)
    sliced_layers._all_gather = starting_gather
    weight_broadcast.dist.broadcast = starting("broadcast", broadcast)
    try:
        yield trace
    finally:
        gradient_reducer.dist.reduce = reduce
        sliced_layers.stream.reduce_scatter = reduce_scatter
        sliced_layers._all_gather = gather
        weight_broadcast.dist.broadcast = broadcast
