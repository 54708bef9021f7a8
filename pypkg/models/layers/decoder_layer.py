"""A decoder layer.

It returns two tensors: the output of its last branch (attention or MLP), and the residual stream
before that output is added. The next norm adds them in a fused operator, so that the residual
stream is read and written once per norm.
"""

from __future__ import annotations

import paddle
from paddle import nn

from pypkg import ops
from pypkg.models.architecture.checks import chosen
from pypkg.models.architecture.config import ModelConfig
from pypkg.models.layers import recompute
from pypkg.models.layers.attention import Attention, AttentionInputs
from pypkg.models.layers.dropout import dropout
from pypkg.models.layers.mlp import make_mlp
from pypkg.models.layers.norm import make_block_norm, norm_of_block, weight_of_norm
from pypkg.models.layers.recompute import Recompute, recomputed
from pypkg.models.layers.residual import RESIDUALS, State
from pypkg.parallel.tp_layers import has_call_hooks


class DecoderLayer(nn.Layer):
    """Attention and MLP, each with its norms and added to the residual stream.

    Args:
        layer_number: index of the layer in the whole model, from 0; its entry in
            ``config.layer_types`` is the type of its attention.
    """

    def __init__(self, config: ModelConfig, layer_number: int) -> None:
        super().__init__()
        self.input_layernorm = make_block_norm(config)
        self.self_attn = Attention(config, layer_number)
        self.post_attention_layernorm = make_block_norm(config)
        self.mlp = make_mlp(config)
        self.attention_branch_norm = make_block_norm(config) if config.branch_norm else None
        self.mlp_branch_norm = make_block_norm(config) if config.branch_norm else None
        self.recompute: Recompute | None = None  # activations recomputed in backward passes
        self.hidden_dropout = 0.0  # probability, applied to the output of each branch
        self._add = chosen("residual", config.residual, RESIDUALS)
        self._alpha = config.residual_alpha
        joins = self._add is RESIDUALS["pre"] and not config.branch_norm
        self._joins_norms = joins  # a norm and its branch may run as one operator

    def forward(
        self, x: paddle.Tensor, residual: paddle.Tensor | None, inputs: AttentionInputs
    ) -> State:
        """The forward pass of the layer.

        Args:
            x: [batch, sequence, hidden], output of the previous branch; under sequence parallelism
                the tokens of this rank (parallel/tp_layers.py).
            residual: the residual stream before ``x`` is added, of the same shape; None: ``x`` is
                the whole residual stream.
            inputs: masks and rotation, shared by all layers.

        Returns:
            The output of the last branch, and the residual stream before it is added (or None, as
            for the arguments); both of the shape of ``x``.
        """
        return recomputed(self, recompute.FULL, self._forward, x, residual, inputs)

    def _forward(
        self, x: paddle.Tensor, residual: paddle.Tensor | None, inputs: AttentionInputs
    ) -> State:
        state = self._joined_attention(x, residual, inputs) or self._add(
            self.input_layernorm,
            lambda y: self._attention(y, inputs),
            (x, residual),
            self._alpha,
        )
        return self._joined_feed_forward(*state) or self._add(
            self.post_attention_layernorm, self._feed_forward, state, self._alpha
        )

    def _joined_attention(
        self, x: paddle.Tensor, residual: paddle.Tensor | None, inputs: AttentionInputs
    ) -> State | None:
        """Norm and attention as one operator; None if they cannot run as one."""
        layers = self._sub_layers  # a look-up here is several times faster than an attribute
        norm = norm_of_block(layers["input_layernorm"], residual) if self._is_plain else None
        return None if norm is None else layers["self_attn"].after(norm, x, inputs)

    def _joined_feed_forward(
        self, x: paddle.Tensor, residual: paddle.Tensor | None
    ) -> State | None:
        """Norm and MLP as one operator; None if they cannot run as one."""
        layers = self._sub_layers
        first = layers["post_attention_layernorm"]
        norm = norm_of_block(first, residual) if self._is_plain else None
        return None if norm is None else layers["mlp"].after(norm, x)

    def step_weights(self) -> ops.LayerWeights | None:
        """Weights for ``ops.decoder_step``; None if that operator cannot run the layer."""
        first = weight_of_norm(self.input_layernorm)
        second = weight_of_norm(self.post_attention_layernorm)
        attention, mlp = self.self_attn.step_weights(), self.mlp.step_weights()
        if first is None or second is None or attention is None or mlp is None:
            return None
        if not self._is_plain or has_call_hooks(self):
            return None
        return ops.LayerWeights(first, *attention, second, *mlp)

    @property
    def _is_plain(self) -> bool:
        """Whether the output of a branch is added unchanged to the input of its norm."""
        is_dropped = self.hidden_dropout and self.training
        return self._joins_norms and not is_dropped

    def _attention(self, x: paddle.Tensor, inputs: AttentionInputs) -> paddle.Tensor:
        x = recomputed(self, recompute.ATTENTION_BLOCK, self.self_attn, x, inputs)
        x = dropout(x, self.hidden_dropout, self.training, is_split=True)
        return _through(self.attention_branch_norm, x)

    def _feed_forward(self, x: paddle.Tensor) -> paddle.Tensor:
        x = dropout(self.mlp(x), self.hidden_dropout, self.training, is_split=True)
        return _through(self.mlp_branch_norm, x)


def _through(norm: nn.Layer | None, x: paddle.Tensor) -> paddle.Tensor:
    return x if norm is None else norm(x)[0]
