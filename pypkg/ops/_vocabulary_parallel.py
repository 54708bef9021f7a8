"""Softmax statistics of a vocabulary that is divided over a group of processes.

Every process holds the same rows and an equal share of the columns: rank r of a group of n holds
the columns [r * cols, (r + 1) * cols) of a vocabulary of n * cols.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import paddle
import paddle.distributed as dist

Reduce = Callable[[paddle.Tensor], paddle.Tensor]


class VocabularyShard(NamedTuple):
    """The columns that this process holds."""

    start: int  # first vocabulary entry
    vocab_size: int  # of the whole vocabulary
    group: object | None  # a paddle.distributed group; None when this is the whole vocabulary


def shard_of(cols: int, group: object | None) -> VocabularyShard:
    """The shard of ``cols`` columns that this process holds in ``group``."""
    if group is None or group.nranks == 1:
        return VocabularyShard(0, cols, None)
    return VocabularyShard(group.rank * cols, group.nranks * cols, group)


def merge(
    row_max: paddle.Tensor,
    row_sum: paddle.Tensor,
    target: paddle.Tensor,
    reduce_max: Reduce,
    reduce_sum: Reduce,
) -> tuple[paddle.Tensor, paddle.Tensor]:
    """Merges the partial results of one shard with those of the others (csrc cross_entropy.h).

        M = max(row_max),  S = sum(row_sum * exp(row_max - M)),  lse = M + log(S)

    Args:
        row_max, row_sum, target: this shard's max_j x_j, sum_j exp(x_j - row_max) and logit of the
            label (0 when it lies elsewhere), all of the shape of the labels.
        reduce_max, reduce_sum: return the maximum and the sum of a tensor over all shards.

    Returns:
        lse and the logit of the label over the whole vocabulary.
    """
    whole_max = reduce_max(row_max)
    # A shard whose logits are all -inf has row_max - whole_max = nan when the whole row is -inf.
    shrink = paddle.exp(
        paddle.where(row_max == whole_max, paddle.zeros_like(row_max), row_max - whole_max)
    )
    whole_sum, whole_target = reduce_sum(paddle.stack([row_sum * shrink, target]))
    return whole_max + paddle.log(whole_sum), whole_target


def merge_over_group(
    row_max: paddle.Tensor, row_sum: paddle.Tensor, target: paddle.Tensor, group: object
) -> tuple[paddle.Tensor, paddle.Tensor]:
    """``merge`` by two all-reduces over ``group``; every process gets the same result."""

    def reduce(operation: int) -> Reduce:
        def run(tensor: paddle.Tensor) -> paddle.Tensor:
            result = tensor.clone()
            dist.all_reduce(result, op=operation, group=group)
            return result

        return run

    return merge(row_max, row_sum, target, reduce(dist.ReduceOp.MAX), reduce(dist.ReduceOp.SUM))
