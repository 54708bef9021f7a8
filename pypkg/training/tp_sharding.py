"""How tensor parallelism shards the parameters of a model, and arrays of the same shapes."""

from __future__ import annotations

from functools import cached_property

import numpy as np
from paddle import Tensor

from pypkg.models.architecture.config import ModelConfig
from pypkg.models.building import parameter_shapes
from pypkg.models.pretrained import whole_value
from pypkg.models.weights.tp_shards import side_by_side, tp_shard
from pypkg.parallel.optimizer.pieces import MatrixLayout
from pypkg.parallel.optimizer.protocol import ReadSlices
from pypkg.parallel.tp_layers import tensor_degree, tensor_rank


class ModelTpSharding:
    """The ``TpSharding`` (parallel/optimizer/protocol.py) of a model under the current mesh."""

    def __init__(self, config: ModelConfig) -> None:
        self._config = config

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self._shapes

    @cached_property  # asked for each tensor of a save, while training pauses
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return parameter_shapes(self._config)

    def layout(self, name: str) -> MatrixLayout:
        axis, widths = side_by_side(self._config, name)
        degree = tensor_degree()
        shards = [tp_shard(self._config, name, degree, rank) for rank in range(degree)]
        return MatrixLayout(
            self.shapes()[name],
            axis,
            widths,
            tuple(each.ranges for each in shards if each is not None),
            0 if shards[0] is None else shards[0].length,
        )

    def gather(self, name: str, shard: Tensor, writer: int) -> np.ndarray | None:
        return whole_value(self._config, name, shard, writer)

    def read(self, name: str, read: ReadSlices, rows: tuple[int, int] | None = None) -> np.ndarray:
        shard = tp_shard(self._config, name, tensor_degree(), tensor_rank())
        if shard is None:
            return read(()) if rows is None else read((slice(*rows),))
        return shard.read(read, rows)
