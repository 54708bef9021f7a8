"""How tensor parallelism shards the parameters of a model, and arrays of the same shapes."""

from __future__ import annotations

import numpy as np
from paddle import Tensor

from pypkg.models.architecture.config import ModelConfig
from pypkg.models.building import parameter_shapes
from pypkg.models.pretrained import whole_value
from pypkg.models.weights.tp_shards import tp_shard
from pypkg.parallel.optimizer.protocol import ReadSlices
from pypkg.parallel.tp_layers import tensor_degree, tensor_rank


class ModelTpSharding:
    """The ``TpSharding`` (parallel/optimizer/protocol.py) of a model under the current mesh."""

    def __init__(self, config: ModelConfig) -> None:
        self._config = config

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return parameter_shapes(self._config)

    def gather(self, name: str, shard: Tensor, writer: int) -> np.ndarray | None:
        return whole_value(self._config, name, shard, writer)

    def read(self, name: str, read: ReadSlices, rows: tuple[int, int] | None = None) -> np.ndarray:
        shard = tp_shard(self._config, name, tensor_degree(), tensor_rank())
        if shard is None:
            return read(()) if rows is None else read((slice(*rows),))
        return shard.read(read, rows)
