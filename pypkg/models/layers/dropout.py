"""Dropout of hidden states under tensor and sequence parallelism."""

from __future__ import annotations

import paddle
import paddle.nn.functional as F

from pypkg.parallel.comm import random_states
from pypkg.parallel.tp_layers import is_sequence_parallel


def dropout(x: paddle.Tensor, probability: float, training: bool, is_split: bool) -> paddle.Tensor:
    """Sets random elements of ``x`` to 0 and scales the others by 1 / (1 - probability).

    All ranks of a tensor group drop the same elements of a replicated ``x``. If sequence
    parallelism splits ``x``, each rank draws its own random numbers for its tokens.

    Args:
        x: of any shape.
        probability: of dropping an element, in [0, 1).
        training: False returns ``x``.
        is_split: whether sequence parallelism splits the tokens of ``x``.
    """
    if not training or probability == 0.0:
        return x
    is_part = is_split and is_sequence_parallel()
    with random_states.stream(random_states.SPLIT if is_part else random_states.WHOLE):
        return F.dropout(x, probability)
