"""Collectives outside of the training step. With a world size of 1 each is the identity."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import numpy as np
import paddle
import paddle.distributed as dist

from pypkg.errors import UserError
from pypkg.parallel import mesh
from pypkg.parallel.host_memory import to_host
from pypkg.parallel.launch import watchdog

T = TypeVar("T")


def is_first_rank() -> bool:
    """Whether this is rank 0, which writes files and log lines for the run."""
    return mesh.current().rank == 0


def from_first_rank(make: Callable[[], T]) -> T:
    """Calls ``make`` on rank 0 only and returns its result on every rank.

    Every rank must call this. The result must be picklable. ``make`` may take any time.

    Raises:
        UserError: on every rank, if ``make`` raises it.
    """
    if mesh.current().world_size == 1:
        return make()
    outcome: list = [None]  # (result, error message)
    if is_first_rank():
        try:
            outcome = [(make(), None)]
        except UserError as error:
            outcome = [(None, str(error))]
            cause: UserError | None = error
        else:
            cause = None
        watchdog.wait_for_all()
        dist.broadcast_object_list(outcome, src=0)
        if cause is not None:
            raise cause
    else:
        watchdog.wait_for_all()
        dist.broadcast_object_list(outcome, src=0)
    value, message = outcome[0]
    if message is not None:
        raise UserError(message)
    return value


def from_all_ranks(make: Callable[[], T]) -> list[T]:
    """Calls ``make`` on every rank and returns the results, by rank, on every rank.

    Every rank must call this. The results must be picklable. ``make`` may take any time.

    Raises:
        UserError: on every rank, if ``make`` raises it on any rank.
    """
    if mesh.current().world_size == 1:
        return [make()]
    cause: UserError | None = None
    try:
        own: tuple = (make(), None)
    except UserError as error:
        own, cause = (None, str(error)), error
    outcomes: list = []  # (result, error message) by rank
    watchdog.wait_for_all()
    try:
        dist.all_gather_object(outcomes, own)
    except Exception as error:
        if cause is None:
            raise
        raise cause from error  # a rank that ends after its own error fails the collective
    if cause is not None:
        raise cause
    for _, message in outcomes:
        if message is not None:
            raise UserError(message)
    return [value for value, _ in outcomes]


def broadcast_from_first_rank(values: np.ndarray) -> np.ndarray:
    """Broadcasts ``values`` of rank 0 and returns them on every rank.

    Every rank must call this within the time limit of a collective (30 s over gloo).

    Args:
        values: numbers, of the same shape and dtype on all ranks.
    """
    if mesh.current().world_size == 1:
        return values
    shared = paddle.to_tensor(values)
    dist.broadcast(shared, src=0)
    return to_host(shared)


def on_all_ranks(flag: bool) -> bool:
    """Whether ``flag`` is true on every rank. Every rank must call this."""
    if mesh.current().world_size == 1:
        return flag
    least = paddle.to_tensor([int(flag)], dtype="int32")
    dist.all_reduce(least, op=dist.ReduceOp.MIN)
    return bool(least.item())


def mean_over_token_shards(value: paddle.Tensor) -> paddle.Tensor:
    """Mean of a float32 tensor over the token shards (the data, sharding and context axes).

    Every rank must call this, with a tensor of the same shape.
    """
    current = mesh.current()
    if current.token_shards == 1:
        return value
    total = value.clone()
    for group in current.token_groups:
        dist.all_reduce(total, group=group)
    return total / current.token_shards


def ranks_where(flag: bool) -> list[int]:
    """The ranks on which ``flag`` is true. Every rank must call this."""
    flags: list[bool] = []
    dist.all_gather_object(flags, flag)
    return [rank for rank, each in enumerate(flags) if each]
