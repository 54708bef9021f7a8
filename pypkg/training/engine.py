"""One optimizer step over a global batch, whatever the layout."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import paddle
from paddle import Tensor

from pypkg.data import Batch
from pypkg.parallel.comm.collective import mean_over_sample_shards
from pypkg.parallel.optimizer.step import Updater

# Yields the arguments of the model's loss from a sample position on; input_ids and labels are
# int64 [batch, sequence].
BatchSource = Callable[[int], Iterator[Batch]]


class Engine:
    """Forward, backward and update of a model under the current mesh.

    Args:
        model: what this process holds: a whole model, its tensor-parallel part, or a pipeline
            stage, which brings a schedule of its own.
        updater: reduces gradients, clips and updates.
    """

    def __init__(self, model: paddle.nn.Layer, updater: Updater) -> None:
        self.model = model
        self.updater = updater
        self._is_pipeline = hasattr(model, "forward_backward")

    def forward_backward(self, micro_batches: Sequence[Batch]) -> Tensor:
        """Adds this process's gradients of the mean loss over ``micro_batches``.

        Returns:
            That mean loss, a float32 scalar; not synchronised with the host.
        """
        batches = [to_device(batch) for batch in micro_batches]
        if self._is_pipeline:
            return self.model.forward_backward(batches, self.updater.scale)
        total = None
        for batch in batches:
            loss = self.updater.loss(**batch) / len(batches)
            self.updater.scale(loss).backward()
            total = loss.detach() if total is None else total + loss.detach()
        return total

    def update(self, learning_rate: float) -> Tensor:
        """One optimizer step; returns the global gradient norm before clipping."""
        return self.updater.step(learning_rate)

    @paddle.no_grad()
    def evaluate(self, micro_batches: Iterable[Batch]) -> float:
        """Mean loss over ``micro_batches`` and over all sample shards, without gradients."""
        self.model.eval()
        losses = [self._loss(to_device(batch)) for batch in micro_batches]
        self.model.train()
        return float(mean_over_sample_shards(paddle.stack(losses).mean()).item())

    def _loss(self, batch: dict[str, Any]) -> Tensor:
        return self.model.evaluate(batch) if self._is_pipeline else self.updater.loss(**batch)


def to_device(batch: Batch) -> dict[str, Any]:
    """The arrays of ``batch`` as tensors; what else it holds stays."""
    return {
        name: paddle.to_tensor(value) if isinstance(value, np.ndarray) else value
        for name, value in batch.items()
    }
