"""The feed-forward block."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import paddle
import paddle.nn.functional as F
from paddle import nn

from pypkg import ops
from pypkg.models.architecture.checks import chosen
from pypkg.models.architecture.config import ModelConfig
from pypkg.parallel.tp_layers import (
    JoinedLayers,
    column_linear,
    has_call_hooks,
    joined_layers,
    plain_weights,
    row_linear,
)

_Activation = Callable[[paddle.Tensor], paddle.Tensor]
_PLAIN: dict[str, _Activation] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate=True),
    "relu": F.relu,
}


class GatedMLP(nn.Layer):
    """down(activation(gate(x)) * up(x)). One matrix holds the packed projections gate | up."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden, ffn = config.hidden_size, config.intermediate_size
        self.gate_up_proj = column_linear(hidden, 2 * ffn, config.mlp_bias)
        self.down_proj = row_linear(ffn, hidden, config.mlp_bias)
        self._activation = config.activation
        self._gated = chosen("activation", config.activation, ops.GATED)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        """The output of the block for ``x``, both [batch, sequence, hidden]."""
        joined = self._joined()
        if joined is not None:
            weights = (joined.column_weight, joined.row_weight)
            return joined.leave(ops.gated_mlp_block(joined.enter(x), *weights, self._activation))
        return self.down_proj(self._gated(self.gate_up_proj(x)))

    def _joined(self) -> JoinedLayers | None:
        layers = self._sub_layers  # a look-up here is several times faster than an attribute
        return joined_layers(layers["gate_up_proj"], layers["down_proj"])

    def after(
        self, norm: ops.PreNorm, x: paddle.Tensor
    ) -> tuple[paddle.Tensor, paddle.Tensor] | None:
        """Norm and block as one operator: the output, and x + residual; None if that cannot be."""
        joined = self._joined()
        if joined is None or joined.is_divided or has_call_hooks(self):
            return None
        weights = (joined.column_weight, joined.row_weight)
        return ops.normed_gated_mlp_block(x, norm, *weights, self._activation)

    def step_weights(self) -> tuple[paddle.Tensor, paddle.Tensor] | None:
        """The weights of both projections; None where there is more than these products."""
        before, after = plain_weights(self.gate_up_proj), plain_weights(self.down_proj)
        if before is None or after is None or has_call_hooks(self):
            return None
        has_bias = before[1] is not None or after[1] is not None
        return None if has_bias else (before[0], after[0])


class MLP(nn.Layer):
    """down(activation(up(x)))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden, ffn = config.hidden_size, config.intermediate_size
        self.up_proj = column_linear(hidden, ffn, config.mlp_bias)
        self.down_proj = row_linear(ffn, hidden, config.mlp_bias)
        self._activation = chosen("activation", config.activation, _PLAIN)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        """The output of the block for ``x``, both [batch, sequence, hidden]."""
        return self.down_proj(self._activation(self.up_proj(x)))

    def after(self, norm: ops.PreNorm, x: paddle.Tensor) -> None:
        """None: there is no operator for norm and block together."""

    def step_weights(self) -> None:
        """There is no such operator."""


def make_mlp(config: ModelConfig) -> nn.Layer:
    """The feed-forward block that ``config`` describes."""
    return GatedMLP(config) if config.gated_mlp else MLP(config)
