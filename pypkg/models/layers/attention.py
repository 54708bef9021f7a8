"""The attention block."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import paddle
from paddle import nn

from pypkg import ops
from pypkg.models.architecture.config import ModelConfig
from pypkg.models.layers.kv_cache import KVCache
from pypkg.models.layers.norm import RMSNorm, weight_of_norm
from pypkg.models.layers.positions import Rotation
from pypkg.models.layers.recompute import ATTENTION, FULL, Recompute, recomputed
from pypkg.models.weights.tp_shards import key_value_range
from pypkg.parallel.context.heads import attended_heads, heads_for_tokens, tokens_for_heads
from pypkg.parallel.context.ring import ring_attention
from pypkg.parallel.context.tokens import context_degree, exchanges_heads, is_ring
from pypkg.parallel.tp_layers import (
    JoinedLayers,
    column_linear,
    has_call_hooks,
    joined_layers,
    plain_weights,
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
        batch, sequence: shape of the input ids; whole where a context group divides the tokens.
        masks: mask of each layer type (``ModelConfig.layer_types``).
        rotation: rotary embedding of queries and keys, or None.
        query_scale: factors of the queries, float32 [sequence] or [batch, sequence], or None; in a
            ring of this rank's queries, as the positions of ``rotation`` are.
        cache: of the tokens before these, which keeps these too; None: there are none before.
    """

    batch: int
    sequence: int
    masks: Mapping[str, ops.AttentionMask]
    rotation: Rotation | None = None
    query_scale: paddle.Tensor | None = None
    cache: KVCache | None = None

    @cached_property
    def is_packable(self) -> bool:
        """Whether one operator can take the output of the qkv projection.

        It rotates queries and keys by one kind of positions and does nothing else to them.
        """
        rotation = self.rotation
        return (
            not is_ring()
            and self.query_scale is None
            and (rotation is None or len(rotation.position_ids) == 1)
        )


class Attention(nn.Layer):
    """Grouped-query attention of layer ``layer_number`` of the model.

    One matrix holds the three input projections; its columns are query | key | value. Under tensor
    parallelism each process has some query heads and the key-value heads that they use.
    """

    def __init__(self, config: ModelConfig, layer_number: int) -> None:
        super().__init__()
        self._number = layer_number
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
        self._attended = attended_heads(self._heads_q, self._heads_k)
        # Exceeds the parameter's width if heads are replicated.
        width = degree * (self._heads_q + 2 * self._heads_k) * config.head_dim
        self.qkv_proj = column_linear(config.hidden_size, width, config.qkv_bias)
        self.o_proj = row_linear(
            config.query_size, config.hidden_size, config.attention_output_bias
        )
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self._has_head_norms = config.qk_norm
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
        if is_packed and not self._recomputes_attention and context_degree() == 1:
            joined = self._joined()
            if joined is not None:
                weights = (joined.column_weight, joined.row_weight)
                x = joined.enter(x)
                return joined.leave(ops.attention_block(x, *weights, *self._arguments(inputs)))
        qkv = self.qkv_proj(x)
        attend = self._attend_packed if is_packed else self._attend_split
        if not exchanges_heads():
            return self.o_proj(attend(qkv, inputs))
        of_own_heads = tokens_for_heads(qkv, inputs.batch, self._heads_q, self._heads_k)
        out = heads_for_tokens(attend(of_own_heads, inputs))
        return self.o_proj(out.reshape([*qkv.shape[:-1], out.shape[-1]]))

    def after(
        self, norm: ops.PreNorm, x: paddle.Tensor, inputs: AttentionInputs
    ) -> tuple[paddle.Tensor, paddle.Tensor] | None:
        """Output of norm and block as one operator, and x + residual; None if they need several."""
        if not self._is_packed(inputs) or self._recomputes_a_part or has_call_hooks(self):
            return None
        if context_degree() > 1:
            return None
        joined = self._joined()
        if joined is None or joined.is_divided:
            return None
        weights = (joined.column_weight, joined.row_weight)
        return ops.normed_attention_block(x, norm, *weights, *self._arguments(inputs))

    def step_weights(self) -> ops.AttentionWeights | None:
        """Weights for ``ops.decoder_step``; None if that operator cannot run the block."""
        before, after = plain_weights(self.qkv_proj), plain_weights(self.o_proj)
        if self.backend != PYPKG or has_call_hooks(self) or before is None or after is None:
            return None
        q_norm, k_norm = weight_of_norm(self.q_norm), weight_of_norm(self.k_norm)
        if after[1] is not None or (self._has_head_norms and (q_norm is None or k_norm is None)):
            return None
        return ops.AttentionWeights(*before, q_norm, k_norm, after[0])

    def _joined(self) -> JoinedLayers | None:
        layers = self._sub_layers  # attributes of a layer take several times as long
        return joined_layers(layers["qkv_proj"], layers["o_proj"])

    @property
    def _recomputes_a_part(self) -> bool:
        """Whether recompute covers only a part of norm and block."""
        return self.recompute is not None and self.recompute.granularity != FULL

    @property
    def _recomputes_attention(self) -> bool:
        return self.recompute is not None and self.recompute.granularity == ATTENTION

    def _is_packed(self, inputs: AttentionInputs) -> bool:
        """Whether one operator takes qkv as it comes from the projection."""
        return (
            self.backend == PYPKG
            and not self._has_head_norms
            and inputs.cache is None
            and inputs.is_packable
        )

    def _arguments(self, inputs: AttentionInputs) -> tuple[Any, ...]:
        """Arguments of ``ops.packed_attention`` after qkv, of ``ops.attention_block`` after x."""
        rotation = inputs.rotation
        rotary: tuple[Any, ...] = (None, None, None, False)
        if rotation is not None:
            rotary = (rotation.cos, rotation.sin, *rotation.position_ids, rotation.interleaved)
        return (
            *(inputs.batch, *self._attended, inputs.masks[self._layer_type]),
            *(*rotary, self._scale, self._softcap),
        )

    def _attend_packed(self, qkv: paddle.Tensor, inputs: AttentionInputs) -> paddle.Tensor:
        # Recompute runs the operator again, on the same qkv.
        overwrite = not self._recomputes_attention

        def attend(qkv: paddle.Tensor) -> paddle.Tensor:
            return ops.packed_attention(qkv, *(*self._arguments(inputs), overwrite))

        return recomputed(self, ATTENTION, attend, qkv)

    def _attend_split(self, qkv: paddle.Tensor, inputs: AttentionInputs) -> paddle.Tensor:
        query, key, value = ops.split_heads(qkv, inputs.batch, *self._attended)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query)[0], self.k_norm(key)[0]
        if inputs.rotation is not None:
            query, key = inputs.rotation(query, key)
        if inputs.query_scale is not None:
            query = query * inputs.query_scale.astype(query.dtype).unsqueeze([-1, -2])
        attention = ring_attention if is_ring() else BACKENDS[self.backend]
        if inputs.cache is not None:
            attention = partial(inputs.cache.attend, self._number, attention=attention)
        attend = partial(
            attention,
            mask=inputs.masks[self._layer_type],
            scale=self._scale,
            softcap=self._softcap,
        )
        out = recomputed(self, ATTENTION, attend, query, key, value)
        return out.reshape([*qkv.shape[:-1], self._attended[0] * self._head_dim])


def _plain_attention(*args: Any, **kwargs: Any) -> paddle.Tensor:
    """``ops.flash_attention`` by an implementation that stores [batch, heads, seq, seq] scores."""
    return ops.flash_attention_reference(*args, **kwargs)[0]


PYPKG, PADDLE, REFERENCE = "pypkg", "paddle", "reference"
BACKENDS: dict[str, Callable[..., Any]] = {
    PYPKG: ops.flash_attention,
    PADDLE: ops.paddle_flash_attention,
    REFERENCE: _plain_attention,
}
