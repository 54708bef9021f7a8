"""Normalisation layers with an optional residual add."""

from __future__ import annotations

import paddle
import paddle.nn.functional as F
from paddle import nn

from pypkg import ops
from pypkg.models.architecture.checks import chosen
from pypkg.models.architecture.config import ModelConfig
from pypkg.parallel.tp_layers import has_call_hooks, sum_split_token_gradients


class RMSNorm(nn.Layer):
    """Root-mean-square normalisation of the last dimension."""

    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.weight = self.create_parameter(
            [size], default_initializer=nn.initializer.Constant(1.0)
        )
        self._epsilon = epsilon

    def forward(
        self, x: paddle.Tensor, residual: paddle.Tensor | None = None
    ) -> tuple[paddle.Tensor, paddle.Tensor]:
        """The norm of x + residual, and x + residual itself; both [..., size] like x."""
        if residual is None:
            return ops.rms_norm(x, self.weight, self._epsilon), x
        return ops.rms_norm(x, self.weight, self._epsilon, residual)


def norm_of_block(norm: nn.Layer, residual: paddle.Tensor | None) -> ops.PreNorm | None:
    """``norm(x, residual)`` for an operator that computes a norm together with the next block.

    None if there is no residual, or if ``norm`` is not an ``RMSNorm`` or has call hooks.
    """
    if residual is None or type(norm) is not RMSNorm or has_call_hooks(norm):
        return None
    return ops.PreNorm(norm._parameters["weight"], norm._epsilon, residual)


def weight_of_norm(norm: nn.Layer | None) -> paddle.Tensor | None:
    """The weight of an ``RMSNorm``; None for another layer, or where its call has a hook."""
    if type(norm) is not RMSNorm or has_call_hooks(norm):
        return None
    return norm.weight


class LayerNorm(nn.Layer):
    """Layer normalisation of the last dimension, with a bias."""

    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.weight = self.create_parameter(
            [size], default_initializer=nn.initializer.Constant(1.0)
        )
        self.bias = self.create_parameter([size], is_bias=True)
        self._epsilon = epsilon

    def forward(
        self, x: paddle.Tensor, residual: paddle.Tensor | None = None
    ) -> tuple[paddle.Tensor, paddle.Tensor]:
        """The norm of x + residual, and x + residual itself; both [..., size] like x."""
        if residual is not None:
            x = x + residual
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self._epsilon), x


_NORMS = {"rms_norm": RMSNorm, "layer_norm": LayerNorm}


def make_norm(config: ModelConfig) -> nn.Layer:
    """The normalisation layer that ``config`` describes, over hidden_size."""
    return chosen("norm", config.norm, _NORMS)(config.hidden_size, config.norm_eps)


def make_block_norm(config: ModelConfig) -> nn.Layer:
    """``make_norm`` for a place where sequence parallelism splits the tokens."""
    norm = make_norm(config)
    sum_split_token_gradients(norm)
    return norm
