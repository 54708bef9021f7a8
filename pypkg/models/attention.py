"""The attention block."""

from __future__ import annotations

from dataclasses import dataclass

import paddle
from paddle import nn

from pypkg import ops
from pypkg.models.config import ModelConfig
from pypkg.models.norm import RMSNorm
from pypkg.models.positions import Rotation
from pypkg.parallel.layers import column_linear, row_linear


@dataclass(frozen=True, eq=False)
class AttentionInputs:
    """What attention needs beside the hidden states; the same for all layers, or for many.

    Args:
        mask: which tokens see which.
        rotation: of queries and keys by their positions, or None.
        query_scale: [sequence] factors of the queries, or None.
    """

    mask: ops.AttentionMask
    rotation: Rotation | None = None
    query_scale: paddle.Tensor | None = None


class Attention(nn.Layer):
    """Grouped-query attention.

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
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None

    def forward(self, x: paddle.Tensor, inputs: AttentionInputs) -> paddle.Tensor:
        """[batch, sequence, hidden] to the same shape."""
        batch, sequence, _ = x.shape
        query, key, value = (
            part.reshape([batch, sequence, -1, self._head_dim])
            for part in paddle.split(self.qkv_proj(x), self._sizes, axis=-1)
        )
        if self.q_norm is not None:
            query, key = self.q_norm(query)[0], self.k_norm(key)[0]
        if inputs.rotation is not None:
            query, key = inputs.rotation(query, key)
        if inputs.query_scale is not None:
            query = query * inputs.query_scale.astype(query.dtype).reshape([1, -1, 1, 1])
        if self.use_flash_attention:
            out = ops.flash_attention(query, key, value, mask=inputs.mask)
        else:
            out, _ = ops.flash_attention_reference(query, key, value, mask=inputs.mask)
        return self.o_proj(out.reshape([batch, sequence, -1]))
