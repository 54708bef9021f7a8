"""The attention block."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import paddle
from paddle import nn

from pypkg import ops
from pypkg.models.architecture.config import ModelConfig
from pypkg.models.layers.norm import RMSNorm
from pypkg.models.layers.positions import Rotation
from pypkg.models.layers.recompute import ATTENTION, FULL, Recompute, recomputed
from pypkg.models.weights.tp_shards import key_value_range
from pypkg.parallel.tp_layers import (
    column_linear,
    has_call_hooks,
    plain_weight,
    row_linear,
    sum_gradient_over_tensor_group,
    sum_replica_gradients,
    tensor_degree,
    tensor_rank,
)


@dataclass(frozen=True, eq=False)
class AttentionInputs:
    """The inputs of attention other than the hidden states, shared by all layers.

    Args:
        batch, sequence: shape of the input ids.
        masks: mask of each layer type (``ModelConfig.layer_types``).
        rotation: rotary embedding of queries and keys, or None.
        query_scale: factors of the queries, float32 [sequence], or None.
    """

    batch: int
    sequence: int
    masks: Mapping[str, ops.AttentionMask]
    rotation: Rotation | None = None
    query_scale: paddle.Tensor | None = None


class Attention(nn.Layer):
    """Grouped-query attention of layer ``layer_number`` of the model.

    One matrix holds the three input projections; its columns are query | key | value. Under tensor
    parallelism each process has some query heads and the key-value heads that they use.
    """

    def __init__(self, config: ModelConfig, layer_number: int) -> None:
        super().__init__()
        self._layer_type = config.layer_types[layer_number]
        self.backend = PYPKG  # a name of BACKENDS
        self.recompute: Recompute | None = None  # activations recomputed in backward passes
        self._head_dim = config.head_dim
        divisor = config.query_pre_attn_scalar
        self._scale = None if divisor is None else divisor**-0.5
        self._softcap = config.attn_logit_softcapping or 0.0
        degree = tensor_degree()
        first, stop = key_value_range(config, degree, tensor_rank())
        self._heads_q, self._heads_k = config.num_attention_heads // degree, stop - first
        # Exceeds the parameter's width if heads are replicated.
        width = degree * (self._heads_q + 2 * self._heads_k) * config.head_dim
        self.qkv_proj = column_linear(config.hidden_size, width, config.qkv_bias)
        self.o_proj = row_linear(
            config.query_size, config.hidden_size, config.attention_output_bias
        )
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self._sum_partial_gradients(config, first)

    def _sum_partial_gradients(self, config: ModelConfig, first_key_value_head: int) -> None:
        """Sums the gradients of parameters that several processes use, each for its own heads."""
        for norm in (self.q_norm, self.k_norm):
            if norm is not None:
                sum_gradient_over_tensor_group(norm.weight)
        if tensor_degree() > config.num_key_value_heads:
            for parameter in self.qkv_proj.parameters():
                sum_replica_gradients(
                    parameter,
                    self._heads_q * self._head_dim,
                    first_key_value_head,
                    config.num_key_value_heads,
                )

    def forward(self, x: paddle.Tensor, inputs: AttentionInputs) -> paddle.Tensor:
        """The output of the block, shaped like x.

        Args:
            x: [batch, sequence, hidden], or its split tokens (parallel/tp_layers.py).
        """
        is_packed = self._is_packed(inputs)
        if is_packed and not self._recomputes_attention:
            qkv_weight, o_weight = plain_weight(self.qkv_proj), plain_weight(self.o_proj)
            if qkv_weight is not None and o_weight is not None:
                return ops.attention_block(x, qkv_weight, o_weight, *self._arguments(inputs))
        qkv = self.qkv_proj(x)
        attend = self._attend_packed if is_packed else self._attend_split
        return self.o_proj(attend(qkv, inputs))

    def after(
        self, norm: ops.PreNorm, x: paddle.Tensor, inputs: AttentionInputs
    ) -> tuple[paddle.Tensor, paddle.Tensor] | None:
        """Norm and block as one operator: the output, and x + residual; None where it cannot be."""
        if not self._is_packed(inputs) or self._recomputes_a_part or has_call_hooks(self):
            return None
        qkv_weight, o_weight = plain_weight(self.qkv_proj), plain_weight(self.o_proj)
        if qkv_weight is None or o_weight is None:
            return None
        return ops.normed_attention_block(x, norm, qkv_weight, o_weight, *self._arguments(inputs))

    @property
    def _recomputes_a_part(self) -> bool:
        """Whether a part of norm and block is recomputed, and another is not."""
        return self.recompute is not None and self.recompute.granularity != FULL

    @property
    def _recomputes_attention(self) -> bool:
        return self.recompute is not None and self.recompute.granularity == ATTENTION

    def _is_packed(self, inputs: AttentionInputs) -> bool:
        """Whether one operator can take qkv as it is: nothing comes between the projection and it,
        but a rotation by one kind of positions.
        """
        rotation = inputs.rotation
        return (
            self.backend == PYPKG
            and self.q_norm is None
            and inputs.query_scale is None
            and (rotation is None or len(rotation.position_ids) == 1)
        )

    def _arguments(self, inputs: AttentionInputs) -> tuple[Any, ...]:
        """What ``ops.packed_attention`` takes after qkv, and ``ops.attention_block`` after x."""
        rotation = inputs.rotation
        rotary: tuple[Any, ...] = (None, None, None, False)
        if rotation is not None:
            rotary = (rotation.cos, rotation.sin, *rotation.position_ids, rotation.interleaved)
        return (
            *(inputs.batch, self._heads_q, self._heads_k, inputs.masks[self._layer_type]),
            *(*rotary, self._scale, self._softcap),
        )

    def _attend_packed(self, qkv: paddle.Tensor, inputs: AttentionInputs) -> paddle.Tensor:
        # Recompute runs the operator again, on the same qkv.
        overwrite = not self._recomputes_attention

        def attend(qkv: paddle.Tensor) -> paddle.Tensor:
            return ops.packed_attention(qkv, *(*self._arguments(inputs), overwrite))

        return recomputed(self, ATTENTION, attend, qkv)

    def _attend_split(self, qkv: paddle.Tensor, inputs: AttentionInputs) -> paddle.Tensor:
        query, key, value = ops.split_heads(qkv, inputs.batch, self._heads_q, self._heads_k)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query)[0], self.k_norm(key)[0]
        if inputs.rotation is not None:
            query, key = inputs.rotation(query, key)
        if inputs.query_scale is not None:
            query = query * inputs.query_scale.astype(query.dtype).reshape([1, -1, 1, 1])
        attend = partial(
            BACKENDS[self.backend],
            mask=inputs.masks[self._layer_type],
            scale=self._scale,
            softcap=self._softcap,
        )
        out = recomputed(self, ATTENTION, attend, query, key, value)
        return out.reshape([*qkv.shape[:-1], self._heads_q * self._head_dim])


def _plain_attention(*args: Any, **kwargs: Any) -> paddle.Tensor:
    """``ops.flash_attention`` by an implementation that stores [batch, heads, seq, seq] scores."""
    return ops.flash_attention_reference(*args, **kwargs)[0]


PYPKG, PADDLE, REFERENCE = "pypkg", "paddle", "reference"
BACKENDS: dict[str, Callable[..., Any]] = {
    PYPKG: ops.flash_attention,
    PADDLE: ops.paddle_flash_attention,
    REFERENCE: _plain_attention,
}
