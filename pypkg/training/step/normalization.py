"""Normalization of the losses of a step whose micro batches differ in their number of labels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import paddle
import paddle.distributed as dist

from pypkg.data import IGNORED_LABEL, Batch
from pypkg.parallel import mesh


def label_count(batch: Batch) -> int:
    """Number of labels of a batch that count for the loss."""
    return int(np.count_nonzero(batch["labels"] != IGNORED_LABEL))


def loss_weights(counts: Sequence[int]) -> list[float] | None:
    """Factors for the mean losses of micro batches, which make their mean the mean over all labels.

    With c labels in a micro batch, n micro batches on a rank, d sample shards and C labels in the
    global batch, the factor is ``c * n * d / C``. The mean of factor times mean loss over the n * d
    micro batches is then the sum of the losses of all labels, divided by C. If all micro batches
    have the same number of labels, each factor is exactly 1.

    Every rank must call this. The host waits for the sum over the sample shards.

    Args:
        counts: labels of each of this rank's micro batches.

    Returns:
        A factor for each of ``counts``; None if no micro batch of any rank has a label.
    """
    current = mesh.current()
    total = sum(counts)
    if current.sample_shards > 1:
        summed = paddle.to_tensor([total], dtype="int64")
        for group in (current.data, current.sharding):
            if group is not None:
                dist.all_reduce(summed, group=group)
        total = int(summed.numpy()[0])
    if total == 0:
        return None
    return [count * len(counts) * current.sample_shards / total for count in counts]
