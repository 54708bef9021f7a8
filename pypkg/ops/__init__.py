"""Fused operators on Paddle tensors, each with a reference composed of Paddle primitives."""

from pypkg.ops.adamw import adamw_
from pypkg.ops.attention.attention_mask import AttentionMask
from pypkg.ops.attention.flash_attention import flash_attention, flash_attention_reference
from pypkg.ops.attention.packed_attention import packed_attention, split_heads
from pypkg.ops.attention.paddle_attention import paddle_flash_attention
from pypkg.ops.blocks import attention_block, gated_mlp_block
from pypkg.ops.dispatch.library import backend, set_backend
from pypkg.ops.gated_activation import GATED, gated_activation_reference, geglu, swiglu
from pypkg.ops.loss.cross_entropy import cross_entropy, cross_entropy_reference
from pypkg.ops.loss.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from pypkg.ops.matmul import linear, matmul, set_matmul_precision
from pypkg.ops.random_normal import random_normal_
from pypkg.ops.rms_norm import rms_norm, rms_norm_reference
from pypkg.ops.rotary_embedding import rotary_embedding, rotary_embedding_reference

__all__ = [
    "GATED",
    "AttentionMask",
    "adamw_",
    "attention_block",
    "backend",
    "cross_entropy",
    "cross_entropy_reference",
    "flash_attention",
    "flash_attention_reference",
    "gated_activation_reference",
    "gated_mlp_block",
    "geglu",
    "linear",
    "linear_cross_entropy",
    "linear_cross_entropy_reference",
    "matmul",
    "packed_attention",
    "paddle_flash_attention",
    "random_normal_",
    "rms_norm",
    "rms_norm_reference",
    "rotary_embedding",
    "rotary_embedding_reference",
    "set_backend",
    "set_matmul_precision",
    "split_heads",
    "swiglu",
]
