"""One optimizer step over a global batch, whatever the layout."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import paddle
from paddle import Tensor

from pypkg.data import IGNORED_LABEL, Batch
from pypkg.parallel.comm.collective import mean_over_sample_shards
from pypkg.parallel.optimizer.distribute import DistributedModel
from pypkg.parallel.optimizer.updater import Updater


class Engine:
    """Forward, backward and update under the current mesh.

    Args:
        model: the model of this rank, wrapped for the layout.
        updater: averages gradients, clips and updates.
    """

    def __init__(self, model: DistributedModel, updater: Updater) -> None:
        self.model = model
        self.updater = updater

    def forward_backward(self, micro_batches: Sequence[Batch]) -> Tensor:
        """Accumulates this rank's gradients of the mean loss over ``micro_batches``.

        Returns:
            The mean loss, a float32 scalar; not synchronised with the host.
        """
        batches = [to_device(batch) for batch in micro_batches]
        return self.model.forward_backward(batches, self.updater.scale)

    def update(self, learning_rate: float) -> Tensor:
        """One optimizer step; returns the global gradient norm before clipping, a float32 scalar.

        All ranks have to call it.
        """
        return self.updater.step(learning_rate)

    @paddle.no_grad()
    def evaluate(self, micro_batches: Iterable[Batch]) -> float:
        """Mean loss over the labels of ``micro_batches`` and of all sample shards, in nats.

        All ranks have to call it, with the same number of micro batches.
        """
        self.model.eval()
        losses, weights = [], []
        for batch in micro_batches:
            labels = batch["labels"]
            # 1 for a batch whose labels all count, so that a mean of such batches keeps its bits.
            weights.append(float((labels != IGNORED_LABEL).sum() / labels.size))
            loss = self.model.evaluate(to_device(batch))
            losses.append(loss * weights[-1] if weights[-1] else paddle.zeros_like(loss))
        self.model.train()
        means = paddle.stack([paddle.stack(losses).mean(), paddle.to_tensor(weights).mean()])
        loss, weight = mean_over_sample_shards(means).numpy()
        return float(loss / weight)


def to_device(batch: Batch) -> dict[str, Any]:
    """``batch`` with its NumPy arrays as tensors on the device."""
    return {
        name: paddle.to_tensor(value) if isinstance(value, np.ndarray) else value
        for name, value in batch.items()
    }
