"""A step of generation through all layers of a decoder, as one operator on a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import paddle

from pypkg.ops.attention.cached_attention import KeptTokens
from pypkg.ops.dispatch.library import custom_op
from pypkg.ops.gated_activation import ACTIVATIONS
from pypkg.ops.matmul import has_few_rows


class AttentionWeights(NamedTuple):
    """The weights of the attention block of a layer.

    Attributes:
        qkv_weight: [hidden, (heads_q + 2 * heads_k) * head_dim].
        qkv_bias: [(heads_q + 2 * heads_k) * head_dim], or None.
        q_norm, k_norm: [head_dim], of ``rms_norm`` of each head before the rotation; or None.
        o_weight: [heads_q * head_dim, hidden].
    """

    qkv_weight: paddle.Tensor
    qkv_bias: paddle.Tensor | None
    q_norm: paddle.Tensor | None
    k_norm: paddle.Tensor | None
    o_weight: paddle.Tensor


class LayerWeights(NamedTuple):
    """The weights of a layer ``h += attention(rms_norm(h)); h += gated_mlp(rms_norm(h))``.

    Attributes:
        attention_norm, mlp_norm: [hidden].
        qkv_weight, qkv_bias, q_norm, k_norm, o_weight: those of ``AttentionWeights``.
        gate_up_weight: [hidden, 2 * intermediate], columns gate | up.
        down_weight: [intermediate, hidden].
    """

    attention_norm: paddle.Tensor
    qkv_weight: paddle.Tensor
    qkv_bias: paddle.Tensor | None
    q_norm: paddle.Tensor | None
    k_norm: paddle.Tensor | None
    o_weight: paddle.Tensor
    mlp_norm: paddle.Tensor
    gate_up_weight: paddle.Tensor
    down_weight: paddle.Tensor


class DecoderWeights:
    """The weights of a decoder as ``decoder_step`` takes them: detached, in the model's memory.

    Args:
        layers: at least one; all have the same tensors.
        final_norm: [hidden].
        head: [vocab, hidden].
    """

    def __init__(
        self, layers: Sequence[LayerWeights], final_norm: paddle.Tensor, head: paddle.Tensor
    ) -> None:
        kinds = zip(*layers, strict=True)
        present = [[each.detach() for each in kind if each is not None] for kind in kinds]
        self.ends = final_norm.detach(), head.detach()
        self.of_layers = [kind or None for kind in present]
        self.first = layers[0].qkv_weight.detach()
        tensors = (*self.ends, *(each for kind in present for each in kind))
        self.are_float32 = all(each.dtype is paddle.float32 for each in tensors)


def decoder_step(
    x: paddle.Tensor,
    weights: DecoderWeights,
    kept: Sequence[KeptTokens],
    windows: Sequence[int | None],
    rotation: tuple[paddle.Tensor, paddle.Tensor, paddle.Tensor, bool] | None,
    alibi_slopes: paddle.Tensor | None,
    scale: float,
    softcap: float,
    epsilon: float,
    activation: str,
) -> paddle.Tensor | None:
    """The logits of one new token of each row, from its embedding.

    Its parts are ``rms_norm``, ``linear``, ``rotary_embedding``, ``cached_attention`` and
    ``gated_mlp_block``, up to rounding.

    Args:
        x: float32 [batch, 1, hidden].
        kept: of each layer; all at one position.
        windows: of each layer, as of ``AttentionMask``.
        rotation: cos, sin, position_ids [batch, 1] and interleaved, as of ``rotary_embedding``.
        alibi_slopes, scale, softcap: as of ``cached_attention``, for all layers.
        epsilon: of every norm.
        activation: "silu", "gelu" or "gelu_tanh".

    Returns:
        float32 [batch, vocab]; None, and nothing is written, where there is no such operator: for
        more than a few rows, on a GPU, in another dtype, for a gradient, with another backend.

    Raises:
        ValueError: a shape other than above.
        IndexError: a position is outside the tables.
    """
    if not weights.are_float32 or not has_few_rows(x, weights.first):
        return None
    if any(each.keys.dtype is not paddle.float32 for each in kept):
        return None
    keys, values = [each.keys for each in kept], [each.values for each in kept]
    *tables, interleaved = (None, None, None, False) if rotation is None else rotation
    return custom_op(
        "pypkg_decoder_step",
        x,
        *weights.of_layers,
        *(keys, values, *weights.ends, *tables, kept[0].first_keys, alibi_slopes),
        *([window or 0 for window in windows], kept[0].position, interleaved),
        *(scale, softcap, epsilon, ACTIVATIONS[activation]),
    )[0]
