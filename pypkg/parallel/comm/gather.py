"""Gathers tensors of the model on the rank that writes them, from the ranks that hold parts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import NamedTuple

import paddle
import paddle.distributed as dist
from paddle import Tensor
from paddle.distributed.communication.group import Group

from pypkg.parallel import mesh


class Place(NamedTuple):
    """The ranks that hold a tensor of the whole model.

    Attributes:
        stage: a pipeline stage that holds the tensor.
        owner: the only sharding rank of the stage that holds it, as for optimizer state in ZeRO
            stages 1 and 2. None: every sharding rank holds the tensor, or a slice of it.
    """

    stage: int
    owner: int | None = None


def places(names: Iterable[str], held: Mapping[str, int | None]) -> dict[str, tuple[Place, ...]]:
    """The places of the tensors of all pipeline stages. Every rank must call this.

    A tied embedding, and optimizer state of it, has two places: the first and the last stage hold
    copies that are equal bit for bit (tied_copies.py).

    Args:
        names: of the tensors of the whole model.
        held: ``Place.owner`` of each tensor of this rank's pipeline stage, by name.

    Returns:
        The places by name, in the order of ``names``, without names that no stage has. The first
        place of a name is that of the first stage that has it.
    """
    group = mesh.current().pipeline
    stages: list[Mapping[str, int | None]] = []
    if group is None:
        stages = [held]
    else:
        dist.all_gather_object(stages, dict(held), group=group)
    found: dict[str, list[Place]] = {}
    for stage, owners in enumerate(stages):
        for name, owner in owners.items():
            found.setdefault(name, []).append(Place(stage, owner))
    return {name: tuple(found[name]) for name in names if name in found}


def possible_writers(place: Place) -> tuple[int, ...]:
    """The ranks that can write a tensor: those of its pipeline stage with its ``owner``, if any."""
    return _possible_writers(mesh.current(), place)


@cache  # asked for each tensor of a save
def _possible_writers(current: mesh.Mesh, place: Place) -> tuple[int, ...]:
    return tuple(
        rank
        for rank, at in _grid(current)
        if at.pipeline == place.stage and place.owner in (None, at.sharding)
    )


def _grid(current: mesh.Mesh) -> Iterator[tuple[int, mesh.Coordinates]]:
    """Each rank with its coordinates."""
    return ((rank, current.coordinates(rank)) for rank in range(current.world_size))


def holders(writer: int, over_tensor: bool, over_sharding: bool) -> tuple[int, ...]:
    """The ranks that hold the parts of a tensor of ``writer``, by tensor rank, then sharding rank.

    They have the writer's data, context and pipeline coordinates.

    Args:
        writer: a rank that holds a part.
        over_tensor: whether the ranks of a tensor group hold TP shards of the tensor.
        over_sharding: whether the ranks of a sharding group hold slices of it.
    """
    current = mesh.current()
    at = current.coordinates(writer)
    tensor, sharding = None if over_tensor else at.tensor, None if over_sharding else at.sharding
    return _holders(current, (at.data, at.context), at.pipeline, tensor, sharding)


@cache  # the writers of a group share the result
def _holders(
    current: mesh.Mesh,
    replica: tuple[int, int],
    pipeline: int,
    tensor: int | None,
    sharding: int | None,
) -> tuple[int, ...]:
    """Ranks at these coordinates (None: any), ordered by tensor rank, then sharding rank."""
    found = {
        (at.tensor, at.sharding): rank
        for rank, at in _grid(current)
        if (at.data, at.context, at.pipeline) == (*replica, pipeline)
        and tensor in (None, at.tensor)
        and sharding in (None, at.sharding)
    }
    return tuple(found[place] for place in sorted(found))


def takes_part(writer: int) -> bool:
    """Whether this rank sends a part of a tensor to ``writer``, or is ``writer``."""
    current = mesh.current()
    at = current.coordinates(writer)
    own = current.pipeline_rank, current.data_rank, current.context_rank
    return own == (at.pipeline, at.data, at.context)


def is_sliced(parameter: Tensor) -> bool:
    """Whether this rank holds only its slice of ``parameter`` at the moment (ZeRO stage 3)."""
    return getattr(parameter, "status", "all") == "part"


def for_tensor_group(tensor: Tensor, like: Tensor | None, writer: int) -> Tensor | None:
    """This rank's TP shard of a tensor, if its tensor group contains ``writer``.

    The ranks of the sharding group must call this together if ``tensor`` is a slice.

    Args:
        tensor: this rank's TP shard, or its flat slice of the TP shard.
        like: a tensor with the shape of the TP shard, if ``tensor`` is a slice; else None.

    Returns:
        The TP shard on the ranks of the writer's tensor group; None on the others.
    """
    current, at = mesh.current(), mesh.current().coordinates(writer)
    if like is None:
        return tensor if current.sharding_rank == at.sharding else None
    parts = list(at_member(tensor, current.sharding, at.sharding))
    if not parts:
        return None
    size = math.prod(like.shape)
    return paddle.concat(parts)[:size].reshape(like.shape)


@paddle.no_grad()
def at_member(tensor: Tensor, group: Group | None, member: int) -> Iterator[Tensor]:
    """Yields the tensors of all ranks of ``group`` in order on ``member``; nothing on the others.

    Every rank of the group must iterate to the end. A rank sends only when ``member`` is ready to
    receive, so at most one tensor is in flight. Sends and receives replace a gather, because a
    member that waits for its disk could exceed the time limit of a gather.

    Args:
        tensor: the tensor of this rank; shape and dtype are equal on all ranks.
        group: None: this rank alone.
        member: index of the receiver in the group.
    """
    tensor = tensor.detach()
    if group is None:
        yield tensor
        return
    turn = paddle.zeros([1], "int32")
    if group.rank != member:
        dist.recv(turn, src=group.ranks[member], group=group)
        dist.send(tensor.contiguous(), dst=group.ranks[member], group=group)
        return
    for index, rank in enumerate(group.ranks):
        if index == member:
            yield tensor
            continue
        dist.send(turn, dst=rank, group=group)
        received = paddle.empty(tensor.shape, tensor.dtype)
        dist.recv(received, src=rank, group=group)
        yield received
