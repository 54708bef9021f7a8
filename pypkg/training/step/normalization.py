"""Normalization of the losses of a step whose micro batches differ in their number of labels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import paddle
import paddle.distributed as dist

from pypkg.data import IGNORED_LABEL, Batch
from pypkg.parallel import mesh
from pypkg.parallel.host_memory import to_host


def label_count(batch: Batch) -> int:
    """Number of labels of a batch that count for the loss."""
    return int(np.count_nonzero(batch["labels"] != IGNORED_LABEL))


def loss_weights(counts: Sequence[float]) -> list[float] | None:
    """Factors for the mean losses of micro batches that make their mean the mean over all labels.

    With c labels in a micro batch, n micro batches on a rank, d token shards and C labels in the
    global batch, the factor is ``c * n * d / C``. The mean of factor times mean loss over the n * d
    micro batches is then the sum of the losses of all labels, divided by C. If all micro batches
    have the same number of labels, each factor is exactly 1.

    Every rank must call this. The host waits for the sum over the token shards.

    Args:
        counts: number of labels, or another weight, of each of this rank's micro batches.

    Returns:
        A factor for each of ``counts``; None if no micro batch of any rank has a label.
    """
    current = mesh.current()
    total = sum(counts)
    if current.token_shards > 1:
        summed = paddle.to_tensor([total], dtype="float64")  # exact for numbers of labels
        for group in current.token_groups:
            dist.all_reduce(summed, group=group)
        total = float(to_host(summed)[0])
    if total == 0:
        return None
    return [count * len(counts) * current.token_shards / total for count in counts]


def shares(counts: Sequence[int]) -> list[float]:
    """This rank's share of the labels of each micro batch; 0 if it has none.

    Only the ranks of a context group divide the labels of a micro batch. They must call this
    together.

    Args:
        counts: labels of each of this rank's micro batches.
    """
    group = mesh.current().context
    if group is None:
        return [float(min(count, 1)) for count in counts]
    summed = paddle.to_tensor(list(counts), dtype="int64")
    dist.all_reduce(summed, group=group)
    return [own / max(all_, 1) for own, all_ in zip(counts, to_host(summed).tolist(), strict=True)]
