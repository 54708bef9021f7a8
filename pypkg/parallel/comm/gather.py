"""What several processes hold in parts, brought together one array at a time."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import numpy as np
import paddle
import paddle.distributed as dist
from paddle import Tensor
from paddle.distributed.communication.group import Group

from pypkg import progress
from pypkg.parallel import mesh
from pypkg.parallel.host import to_host
from pypkg.parallel.launch import watchdog


def is_sliced(parameter: Tensor) -> bool:
    """Whether stage 3 of sharding has only this process's slice of ``parameter`` now."""
    return getattr(parameter, "status", "all") == "part"


def unsliced(parameter: Tensor) -> Tensor:
    """``parameter`` as the layers use it, from all slices if it is in slices; it stays as it is.

    All processes of the sharding group have to call this.
    """
    return joined(parameter.fw_storage, parameter) if is_sliced(parameter) else parameter


def joined(part: Tensor, like: Tensor) -> Tensor:
    """Flat slices of the sharding group's processes as one tensor of the shape of ``like``."""
    parts: list[Tensor] = []
    dist.all_gather(parts, part.detach(), group=mesh.current().sharding)
    return paddle.concat(parts)[: int(np.prod(like.shape))].reshape(like.shape)


def over_stages(
    names: Sequence[str], held: Collection[str], read: Callable[[str], np.ndarray]
) -> Iterator[tuple[str, np.ndarray]]:
    """Named arrays of all pipeline stages, in the order of ``names``, one at a time.

    Every process has to go through it, and those of a stage call ``read`` in the same order. The
    process of rank 0 gets all arrays; others get those of their own stage, of which a copy that an
    earlier stage has too is left out.

    Args:
        names: of the whole model.
        held: those that this process's stage has.
        read: the array of one of them.
    """
    group = mesh.current().pipeline
    if group is None:
        for name in names:
            if name in held:
                _get_on(name)
                yield name, read(name)
        return
    watchdog.wait_for_all()
    holders = _holders(held, group)
    for name in names:
        if name not in holders:
            continue
        _get_on(name)
        array = read(name) if group.rank == holders[name] else None
        if is_gathering():
            array = to_first_rank(array, holders[name])
        if array is not None:
            yield name, array


def _get_on(name: str) -> None:
    """Before ranks hand over an array: rank 0 may write the one before to a slow disk."""
    progress.report(f"gathering {name}")
    if mesh.current().world_size > mesh.current().data_degree:
        watchdog.wait_for_all()


def _holders(held: Collection[str], pipeline: Group) -> dict[str, int]:
    """The first stage that has each name."""
    lists: list[list[str]] = []
    dist.all_gather_object(lists, sorted(held), group=pipeline)
    return {
        name: stage
        for stage, names in reversed(list(enumerate(lists)))
        for name in names
    }  # fmt: skip


def is_gathering() -> bool:
    """Whether this process is in the pipeline of rank 0."""
    current = mesh.current()
    return current.data_rank == current.sharding_rank == current.tensor_rank == 0


def to_first_rank(array: np.ndarray | None, stage: int) -> np.ndarray | None:
    """Brings an array of a pipeline stage to rank 0; all processes of its pipeline call this.

    Args:
        array: on the process of ``stage``; None on the others.

    Returns:
        It, on rank 0 and on the process of ``stage``; None on the others.
    """
    group = mesh.current().pipeline
    if group is None or stage == 0:
        return array
    source = group.ranks[stage]
    described: list[Any] = [None if array is None else (array.shape, str(array.dtype))]
    dist.broadcast_object_list(described, src=source, group=group)
    shape, dtype = described[0]
    # Bytes, since NumPy and the process groups do not know the same types.
    if array is None:
        sent = paddle.empty([int(np.prod(shape)) * np.dtype(dtype).itemsize], dtype="uint8")
    else:
        sent = paddle.to_tensor(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    dist.broadcast(sent, src=source, group=group)
    if group.rank == 0:
        array = to_host(sent).view(dtype).reshape(shape)
    return array
