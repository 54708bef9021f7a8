"""Normalisation layers."""

from __future__ import annotations

import paddle
from paddle import nn

from pypkg import ops


class RMSNorm(nn.Layer):
    """Root-mean-square normalisation of the last dimension, with the residual add before it."""

    def __init__(self, hidden_size: int, epsilon: float) -> None:
        super().__init__()
        self.weight = self.create_parameter(
            [hidden_size], default_initializer=nn.initializer.Constant(1.0)
        )
        self._epsilon = epsilon

    def forward(
        self, x: paddle.Tensor, residual: paddle.Tensor | None = None
    ) -> tuple[paddle.Tensor, paddle.Tensor]:
        """The norm of x + residual, and x + residual itself; both [..., hidden_size] like x."""
        if residual is None:
            return ops.rms_norm(x, self.weight, self._epsilon), x
        return ops.rms_norm(x, self.weight, self._epsilon, residual=residual)
