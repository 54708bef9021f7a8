"""Learned position embedding."""

from __future__ import annotations

import paddle
import paddle.nn.functional as F
from paddle import nn

from pypkg.errors import UserError
from pypkg.models.architecture.config import ModelConfig
from pypkg.parallel.context.tokens import own_tokens


class LearnedPositions(nn.Layer):
    """A table with one vector per position, weight [positions + position_offset, hidden_size]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self._positions, self._offset = config.max_position_embeddings, config.position_offset
        self.weight = self.create_parameter(
            [self._positions + self._offset, config.hidden_size],
            default_initializer=nn.initializer.Constant(0.0),
        )

    def forward(self, seq_length: int, position_ids: paddle.Tensor | None) -> paddle.Tensor:
        """The vectors of the positions of this rank's tokens, [1 or batch, tokens, hidden_size].

        Args:
            seq_length: number of tokens of the sequence.
            position_ids: int64 [batch, sequence]; None: 0, 1, 2, ...

        Raises:
            UserError: the sequence is longer than the table.
        """
        if position_ids is not None:
            return F.embedding(own_tokens(position_ids) + self._offset, self.weight)
        if seq_length > self._positions:
            raise UserError(
                f"the sequence has {seq_length} tokens, but the model has learned positions for "
                f"max_position_embeddings ({self._positions}); use shorter sequences"
            )
        vectors = self.weight[self._offset : self._offset + seq_length]
        return own_tokens(vectors, axis=0).unsqueeze(0)
