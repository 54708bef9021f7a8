"""Dropout of hidden states, with masks that fit the layout."""

from __future__ import annotations

import paddle
import paddle.nn.functional as F

from pypkg.parallel.comm import random_states
from pypkg.parallel.tp_layers import is_sequence_parallel


def dropout(x: paddle.Tensor, probability: float, training: bool, is_split: bool) -> paddle.Tensor:
    """``x`` with elements set to 0 at random, and the others scaled so that the mean stays.

    Under tensor parallelism the processes of a group drop the same elements of an ``x`` that each
    has whole. Where sequence parallelism has its tokens split, each draws for its own tokens.

    Args:
        is_split: whether ``x`` is one of those that sequence parallelism splits.
    """
    if not training or probability == 0.0:
        return x
    is_part = is_split and is_sequence_parallel()
    with random_states.stream(random_states.SPLIT if is_part else random_states.WHOLE):
        return F.dropout(x, probability)
