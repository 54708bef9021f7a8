"""The ranks that hold the parts of a parameter, or of optimizer state in its shape."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from pypkg.models.architecture.config import ModelConfig
from pypkg.models.weights.assembly import Assembly, Division
from pypkg.models.weights.tp_shards import tp_shard, whole_shape
from pypkg.parallel import mesh
from pypkg.parallel.comm import gather


def division(
    config: ModelConfig, name: str, shape: Sequence[int], part_bytes: int, is_sliced: bool
) -> Division | None:
    """The division of the parameter ``name`` into parts; None if this rank holds all of it.

    Args:
        shape: shape of the parameter, or of this rank's TP shard of it.
        part_bytes: bytes of this rank's part.
        is_sliced: whether the part is a flat slice, as in ZeRO stage 3.
    """
    current = mesh.current()
    degree = current.tensor_degree
    if degree == 1 and not is_sliced:
        return None
    of_ranks = [tp_shard(config, name, degree, rank) for rank in range(degree)]
    shards = tuple(each for each in of_ranks if each is not None)
    if not shards and not is_sliced:
        return None
    slices = current.sharding_degree if is_sliced else 1
    assembly = Assembly(whole_shape(config, name, shape, degree), shards, tuple(shape), slices)
    holders = partial(gather.holders, over_tensor=bool(shards), over_sharding=is_sliced)
    return Division(holders, part_bytes, assembly)
