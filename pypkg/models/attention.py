"""The attention block."""

from __future__ import annotations

import paddle
from paddle import nn

from pypkg import ops
from pypkg.models.config import ModelConfig
from pypkg.parallel.layers import column_linear, row_linear


class Attention(nn.Layer):
    """Grouped-query attention with rotary positions.

    The three input projections are one matrix, whose columns are query | key | value.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.use_flash_attention = True  # False: an attention that stores its weights
        self._head_dim = config.head_dim
        self._sizes = [config.query_size, config.key_value_size, config.key_value_size]
        self.qkv_proj = column_linear(config.hidden_size, sum(self._sizes), config.qkv_bias)
        self.o_proj = row_linear(
            config.query_size, config.hidden_size, config.attention_output_bias
        )

    def forward(
        self, x: paddle.Tensor, cos: paddle.Tensor, sin: paddle.Tensor, mask: ops.AttentionMask
    ) -> paddle.Tensor:
        """[batch, sequence, hidden] to the same shape; cos, sin are [positions, head_dim / 2]."""
        batch, sequence, _ = x.shape
        query, key, value = (
            part.reshape([batch, sequence, -1, self._head_dim])
            for part in paddle.split(self.qkv_proj(x), self._sizes, axis=-1)
        )
        query, key = ops.rotary_embedding(query, key, cos, sin)
        if self.use_flash_attention:
            out = ops.flash_attention(query, key, value, mask=mask)
        else:
            out, _ = ops.flash_attention_reference(query, key, value, mask=mask)
        return self.o_proj(out.reshape([batch, sequence, -1]))
