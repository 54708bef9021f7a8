"""One optimizer step over a global batch, under any layout."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np
import paddle
from paddle import Tensor
from paddle.profiler import RecordEvent

from pypkg.data import Batch
from pypkg.parallel import mesh
from pypkg.parallel.comm.collective import mean_over_token_shards
from pypkg.parallel.context.tokens import own_batch
from pypkg.parallel.optimizer.distribute import DistributedModel
from pypkg.parallel.optimizer.updater import Updater
from pypkg.training.step.normalization import label_count, loss_weights, shares
from pypkg.training.step.phase_times import FORWARD_BACKWARD, UPDATE

_NORMALIZATIONS = ("global", "micro_batch")


@dataclass(eq=False)
class Engine:
    """Forward, backward and update under the current mesh.

    Args:
        model: the model of this rank, wrapped for the layout.
        updater: averages gradients, clips and updates.
        normalization: ``global`` divides the losses of a step by the number of labels of the global
            batch; ``micro_batch`` averages the mean losses of the micro batches.
        labels_vary: whether micro batches may differ in their number of labels. If they cannot,
            both normalizations are equal, and the ranks need not sum the numbers.

    Raises:
        ValueError: another ``normalization``.
    """

    model: DistributedModel
    updater: Updater
    _: KW_ONLY
    normalization: str = "global"
    labels_vary: bool = True

    def __post_init__(self) -> None:
        if self.normalization not in _NORMALIZATIONS:
            raise ValueError(f"loss_normalization {self.normalization!r} is not implemented")
        self._is_global = self.normalization == "global"

    def forward_backward(self, micro_batches: Sequence[Batch]) -> Tensor | None:
        """Accumulates this rank's gradients of the loss of a step. Every rank must call this.

        Args:
            micro_batches: whole samples, even if a context group divides their tokens.

        Returns:
            The loss, a float32 scalar on the device. Its mean over the token shards is the loss of
            the step. None on all ranks if no label of the global batch counts; there is neither a
            gradient nor an update then.
        """
        own = [own_batch(batch) for batch in micro_batches]
        batches = [to_device(batch) for batch in own]
        divides_tokens = mesh.current().context is not None
        if self.labels_vary and (self._is_global or divides_tokens):
            weights = self._weights([label_count(batch) for batch in own])
            if weights is None:
                return None
            for batch, weight in zip(batches, weights, strict=True):
                batch["loss_weight"] = paddle.to_tensor(weight, dtype="float32")
        with RecordEvent(FORWARD_BACKWARD):
            return self.model.forward_backward(batches, self.updater.scale)

    def _weights(self, counts: Sequence[int]) -> Sequence[float] | None:
        """Factors of the losses of micro batches; None if no label of the global batch counts.

        Args:
            counts: labels of this rank in each of its micro batches.
        """
        if self._is_global:
            return loss_weights(counts)
        return [share * mesh.current().context_degree for share in shares(counts)]

    def update(self, learning_rate: float) -> Tensor:
        """One optimizer step; returns the global gradient norm before clipping, a float32 scalar.

        Every rank must call this.
        """
        with RecordEvent(UPDATE):
            return self.updater.step(learning_rate)

    def wait(self) -> None:
        """Waits until this rank holds the updated weights. A forward pass waits by itself."""
        self.updater.wait()

    @paddle.no_grad()
    def evaluate(self, micro_batches: Iterable[Batch]) -> float:
        """Mean loss over the labels of ``micro_batches`` of all token shards, in nats.

        With the normalization ``micro_batch``, it is the mean over the micro batches that have
        labels. Every rank must call this, with the same number of micro batches.

        Returns:
            The mean; NaN if there is no label.
        """
        self.model.eval()
        losses, counts = [], []
        for batch in map(own_batch, micro_batches):
            counts.append(label_count(batch))
            losses.append(self.model.evaluate(to_device(batch)))
        self.model.train()
        weights = loss_weights(counts if self._is_global else shares(counts))
        if weights is None:
            return math.nan
        weighted = paddle.stack(losses) * paddle.to_tensor(weights, dtype="float32")
        return float(mean_over_token_shards(weighted.mean()))


def to_device(batch: Batch) -> dict[str, Any]:
    """``batch`` with its NumPy arrays as tensors on the device."""
    return {
        name: paddle.to_tensor(value) if isinstance(value, np.ndarray) else value
        for name, value in batch.items()
    }
