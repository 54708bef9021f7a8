"""Fused operators on Paddle tensors, each with a reference composed of Paddle primitives.

There is one module for each operator; those of attention and of the loss are in subpackages. The
public functions are the names below. Each operator gets its backend from ``dispatch``. The
reference defines its result, so a kernel and its reference change together. Nothing here depends on
models or ranks.
"""

from pypkg.ops.adamw import adamw_
from pypkg.ops.attention.attention_blocks import (
    flash_attention_block_gradients,
    flash_attention_with_lse,
    merge_attention,
)
from pypkg.ops.attention.attention_mask import AttentionMask
from pypkg.ops.attention.cached_attention import KeptTokens, cached_attention
from pypkg.ops.attention.flash_attention import flash_attention, flash_attention_reference
from pypkg.ops.attention.packed_attention import packed_attention, split_heads
from pypkg.ops.attention.paddle_attention import paddle_flash_attention
from pypkg.ops.blocks import (
    PreNorm,
    attention_block,
    gated_mlp_block,
    normed_attention_block,
    normed_gated_mlp_block,
)
from pypkg.ops.decoder_step import AttentionWeights, DecoderWeights, LayerWeights, decoder_step
from pypkg.ops.dispatch.library import backend, set_backend
from pypkg.ops.gated_activation import GATED, gated_activation_reference, geglu, swiglu
from pypkg.ops.loss.cross_entropy import cross_entropy, cross_entropy_reference
from pypkg.ops.loss.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from pypkg.ops.matmul import linear, matmul, set_matmul_precision
from pypkg.ops.narrow_state import (
    dequantize_blockwise,
    quantize_blockwise_,
    stochastic_bfloat16,
)
from pypkg.ops.random_normal import random_normal_
from pypkg.ops.rms_norm import rms_norm, rms_norm_reference
from pypkg.ops.rotary_embedding import rotary_embedding, rotary_embedding_reference
from pypkg.ops.squared_l2_norm import squared_l2_norm

__all__ = [
    "GATED",
    "AttentionMask",
    "AttentionWeights",
    "DecoderWeights",
    "KeptTokens",
    "LayerWeights",
    "PreNorm",
    "adamw_",
    "attention_block",
    "backend",
    "cached_attention",
    "cross_entropy",
    "cross_entropy_reference",
    "decoder_step",
    "dequantize_blockwise",
    "flash_attention",
    "flash_attention_block_gradients",
    "flash_attention_reference",
    "flash_attention_with_lse",
    "gated_activation_reference",
    "gated_mlp_block",
    "geglu",
    "linear",
    "linear_cross_entropy",
    "linear_cross_entropy_reference",
    "matmul",
    "merge_attention",
    "normed_attention_block",
    "normed_gated_mlp_block",
    "packed_attention",
    "paddle_flash_attention",
    "quantize_blockwise_",
    "random_normal_",
    "rms_norm",
    "rms_norm_reference",
    "rotary_embedding",
    "rotary_embedding_reference",
    "set_backend",
    "set_matmul_precision",
    "split_heads",
    "squared_l2_norm",
    "stochastic_bfloat16",
    "swiglu",
]
