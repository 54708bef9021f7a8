"""How the processes of a layout divide a model's parameters, for what is shaped like them."""

from __future__ import annotations

import numpy as np
from paddle import Tensor

from pypkg.models.architecture.config import ModelConfig
from pypkg.models.pretrained import parameter_shapes, whole_value
from pypkg.models.weights.tp_shards import tp_shard
from pypkg.parallel.tp_layers import tensor_degree, tensor_rank


class ModelPartition:
    """How tensor and pipeline parallelism divide a model, as its updater wants to know it."""

    def __init__(self, config: ModelConfig) -> None:
        self._config = config

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the whole model's parameters, in its order."""
        return parameter_shapes(self._config)

    def gather(self, name: str, part: Tensor) -> np.ndarray:
        """What is shaped like the whole parameter ``name``, from the parts of the tensor group."""
        return whole_value(self._config, name, part)

    def take(self, name: str, whole: np.ndarray) -> np.ndarray:
        """The inverse of ``gather``: this process's part."""
        part = tp_shard(self._config, name, tensor_degree(), tensor_rank())
        return whole if part is None else part.take(whole)
