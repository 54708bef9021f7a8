"""Softmax statistics of a vocabulary that is divided over a group of ranks.

Each rank holds the same rows and a part of the columns. Rank r of a group of n holds the columns
[r * share, (r + 1) * share) with share = ceil(vocab_size / n). Columns beyond the end of the
vocabulary are padding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import paddle
import paddle.distributed as dist
from paddle.distributed.communication.group import Group

Reduce = Callable[[paddle.Tensor], paddle.Tensor]


class VocabularyShard(NamedTuple):
    """The columns that this process holds."""

    start: int  # first vocabulary entry
    vocab_size: int  # of the whole vocabulary
    group: Group | None  # None when this is the whole vocabulary


def shard_of(cols: int, group: Group | None, vocab_size: int | None = None) -> VocabularyShard:
    """The shard of ``cols`` columns, padding included, that this process holds in ``group``.

    Args:
        vocab_size: entries of the whole vocabulary; None for all columns of all processes.

    Raises:
        ValueError: shards of ``vocab_size`` do not have ``cols`` columns, or this shard is empty.
    """
    rank, size = (0, 1) if group is None else (group.rank, group.nranks)
    if vocab_size is None:
        vocab_size = size * cols
    if cols != -(-vocab_size // size) or rank * cols >= vocab_size:
        raise ValueError(
            f"rank {rank} of {size} cannot hold {cols} entries of a vocabulary of {vocab_size}"
        )
    return VocabularyShard(rank * cols, vocab_size, None if size == 1 else group)


def merge(
    row_max: paddle.Tensor,
    row_sum: paddle.Tensor,
    target: paddle.Tensor,
    reduce_max: Reduce,
    reduce_sum: Reduce,
) -> tuple[paddle.Tensor, paddle.Tensor]:
    """Merges the partial results of all shards (csrc/kernels/cross_entropy/cross_entropy.h).

        M = max(row_max),  S = sum(row_sum * exp(row_max - M)),  lse = M + log(S)

    Args:
        row_max, row_sum, target: max_j x_j, sum_j exp(x_j - row_max) and the logit of the label in
            this shard, float32 in the shape of the labels. ``target`` is 0 if another shard holds
            the label.
        reduce_max, reduce_sum: return the maximum and the sum of a tensor over all shards.

    Returns:
        lse and the logit of the label over the whole vocabulary, in the shape of the labels.
    """
    whole_max = reduce_max(row_max)
    # A shard whose logits are all -inf has row_max - whole_max = nan when the whole row is -inf.
    shrink = paddle.exp(
        paddle.where(row_max == whole_max, paddle.zeros_like(row_max), row_max - whole_max)
    )
    whole_sum, whole_target = reduce_sum(paddle.stack([row_sum * shrink, target]))
    return whole_max + paddle.log(whole_sum), whole_target


def merge_over_group(
    row_max: paddle.Tensor, row_sum: paddle.Tensor, target: paddle.Tensor, group: Group
) -> tuple[paddle.Tensor, paddle.Tensor]:
    """``merge`` with two all-reduces over ``group``; the result is equal on all processes."""

    def reduce(operation: Literal[0, 1]) -> Reduce:  # of dist.ReduceOp
        def run(tensor: paddle.Tensor) -> paddle.Tensor:
            result = tensor.clone()
            dist.all_reduce(result, op=operation, group=group)
            return result

        return run

    return merge(row_max, row_sum, target, reduce(dist.ReduceOp.MAX), reduce(dist.ReduceOp.SUM))
