"""Shapes of the parameters that a rank holds, without a model."""

from __future__ import annotations

from dataclasses import replace

from pypkg.models.architecture.config import ModelConfig
from pypkg.models.architecture.layer_split import ModelChunk
from pypkg.models.architecture.parameter_shapes import ParameterShape, whole_parameters
from pypkg.models.weights.tp_shards import tp_shard


def parameters(
    config: ModelConfig, chunk: ModelChunk, degree: int = 1, rank: int = 0
) -> list[ParameterShape]:
    """The parameters of a model chunk on one rank, in the order of the model.

    Args:
        degree, rank: size of the tensor-parallel group, and this rank's index in it.
    """
    found = []
    for whole in whole_parameters(config, chunk):
        shard = tp_shard(config, whole.name, degree, rank)
        if shard is not None:
            before, after = whole.shape[: shard.axis], whole.shape[shard.axis + 1 :]
            whole = replace(whole, shape=(*before, shard.length, *after))
        found.append(whole)
    return found
