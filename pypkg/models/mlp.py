"""The feed-forward block."""

from __future__ import annotations

import paddle
from paddle import nn

from pypkg import ops
from pypkg.models.config import ModelConfig
from pypkg.parallel.layers import column_linear, row_linear


class GatedMLP(nn.Layer):
    """down(silu(gate(x)) * up(x)), with gate and up as one matrix whose columns are gate | up."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden, ffn = config.hidden_size, config.intermediate_size
        self.gate_up_proj = column_linear(hidden, 2 * ffn, config.mlp_bias)
        self.down_proj = row_linear(ffn, hidden, config.mlp_bias)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        """[batch, sequence, hidden] to the same shape."""
        return self.down_proj(ops.swiglu(self.gate_up_proj(x)))
