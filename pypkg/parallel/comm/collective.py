"""What the ranks of a run tell each other outside of a training step.

In a process by itself every function here is the identity.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import paddle
import paddle.distributed as dist

from pypkg.errors import UserError
from pypkg.parallel import mesh

T = TypeVar("T")


def is_first_rank() -> bool:
    """Whether this process writes files and log lines for all."""
    return mesh.current().rank == 0


def from_first_rank(make: Callable[[], T]) -> T:
    """Calls ``make`` on the first rank alone; every rank returns what it gave.

    All ranks have to call this. What ``make`` returns has to be picklable.

    Raises:
        UserError: the first rank's, on every rank.
    """
    if mesh.current().world_size == 1:
        return make()
    told: list = [None]
    if is_first_rank():
        try:
            told = [(make(), None)]
        except UserError as error:
            told = [(None, str(error))]
            cause: UserError | None = error
        else:
            cause = None
        dist.broadcast_object_list(told, src=0)
        if cause is not None:
            raise cause
    else:
        dist.broadcast_object_list(told, src=0)
    value, message = told[0]
    if message is not None:
        raise UserError(message)
    return value


def mean_over_sample_shards(value: paddle.Tensor) -> paddle.Tensor:
    """Mean of a float32 tensor over the processes that train on samples of their own."""
    current = mesh.current()
    if current.sample_shards == 1:
        return value
    total = value.clone()
    for group in (current.data, current.sharding):
        if group is not None:
            dist.all_reduce(total, group=group)
    return total / current.sample_shards


def ranks_where(flag: bool) -> list[int]:
    """The ranks on which ``flag`` is true; all of them have to call this."""
    flags: list[bool] = []
    dist.all_gather_object(flags, flag)
    return [rank for rank, each in enumerate(flags) if each]
