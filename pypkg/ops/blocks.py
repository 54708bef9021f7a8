"""A block of a decoder layer, attention or feed-forward, as one operator.

The compiled operators run the kernels of their parts in the same order and give the same bits. The
host dispatches one operator instead of three, or instead of four with the norm before the block.
This saves time where kernels are short.

A block also takes less memory: it keeps neither the output of the norm nor that of the activation
for its backward pass. The backward kernels of both have their inputs at hand, and write the output
once more, over a gradient that is no longer needed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import paddle

from pypkg.ops.attention.attention_mask import AttentionMask
from pypkg.ops.attention.flash_attention import HEAD_DIM_MULTIPLE, MAX_HEAD_DIM
from pypkg.ops.attention.packed_attention import packed_attention
from pypkg.ops.dispatch.checks import FLOATING, check_dtype, check_shape, has_dtype
from pypkg.ops.dispatch.library import backend, run_compiled
from pypkg.ops.gated_activation import ACTIVATIONS, GATED
from pypkg.ops.matmul import has_few_rows, linear, products_are_plain
from pypkg.ops.rms_norm import rms_norm

_FLOAT32 = paddle.float32


class PreNorm(NamedTuple):
    """The norm before a block: ``y, h = rms_norm(x, weight, epsilon, residual)``."""

    weight: paddle.Tensor
    epsilon: float
    residual: paddle.Tensor


@paddle.jit.not_to_static
def attention_block(
    x: paddle.Tensor,
    qkv_weight: paddle.Tensor,
    o_weight: paddle.Tensor,
    batch: int,
    heads_q: int,
    heads_k: int,
    mask: AttentionMask | None = None,
    cos: paddle.Tensor | None = None,
    sin: paddle.Tensor | None = None,
    position_ids: paddle.Tensor | None = None,
    interleaved: bool = False,
    scale: float | None = None,
    softcap: float = 0.0,
) -> paddle.Tensor:
    """``linear(packed_attention(linear(x, qkv_weight), ...), o_weight)``.

    Args:
        x: [..., hidden]; its tokens are those of ``batch`` rows of equal length. float32, float16
            or bfloat16 (float64 runs on the reference).
        qkv_weight: [hidden, (heads_q + 2 * heads_k) * head_dim], in the dtype of x.
        o_weight: [heads_q * head_dim, out_features], in the dtype of x.
        batch, heads_q, heads_k, mask, cos, sin, position_ids, interleaved, scale, softcap: as of
            ``packed_attention``.

    Returns:
        [..., out_features] in the dtype of x.

    Raises:
        TypeError, ValueError, IndexError: as of ``packed_attention``, or a weight has another dtype
            or shape.
    """
    attention = (batch, heads_q, heads_k, mask, cos, sin, position_ids, interleaved, scale, softcap)
    arguments = _attention_arguments(x, None, qkv_weight, o_weight, *attention)
    if arguments is not None:
        return run_compiled("pypkg_attention_block", arguments[0], *arguments[1])[0]
    _check(
        "attention_block",
        x,
        heads_q + 2 * heads_k,
        heads_q,
        qkv_weight=qkv_weight,
        o_weight=o_weight,
    )
    qkv = linear(x, qkv_weight)
    return linear(packed_attention(qkv, *attention, overwrite=True), o_weight)


def normed_attention_block(
    x: paddle.Tensor, norm: PreNorm, qkv_weight: paddle.Tensor, o_weight: paddle.Tensor, *args: Any
) -> tuple[paddle.Tensor, paddle.Tensor]:
    """The norm and the attention block: ``attention_block(y, qkv_weight, o_weight, *args)``, h.

    y and h are the outputs of ``norm``.

    Args:
        x: [..., hidden], as of ``rms_norm`` and of ``attention_block``.
        args: all arguments of ``attention_block`` from ``batch`` to ``softcap``.

    Raises:
        TypeError, ValueError, IndexError: as of ``rms_norm`` and ``attention_block``.
    """
    arguments = _attention_arguments(x, norm, qkv_weight, o_weight, *args)
    if arguments is None:
        y, stream = rms_norm(x, norm.weight, norm.epsilon, norm.residual)
        return attention_block(y, qkv_weight, o_weight, *args), stream
    out = run_compiled("pypkg_normed_attention_block", arguments[0], *arguments[1])
    return out[0], out[1]


def _attention_arguments(
    x: paddle.Tensor,
    norm: PreNorm | None,
    qkv_weight: paddle.Tensor,
    o_weight: paddle.Tensor,
    batch: int,
    heads_q: int,
    heads_k: int,
    mask: AttentionMask | None,
    cos: paddle.Tensor | None,
    sin: paddle.Tensor | None,
    position_ids: paddle.Tensor | None,
    interleaved: bool,
    scale: float | None,
    softcap: float,
) -> tuple[Sequence[paddle.Tensor | None], tuple[object, ...]] | None:
    """Tensors and attributes of the compiled operator; None if its parts must run."""
    heads = heads_q + 2 * heads_k
    if (cos is None) != (sin is None) or not _is_one(x, norm, qkv_weight, o_weight, heads, heads_q):
        return None
    head_dim = qkv_weight.shape[1] // heads
    if head_dim % HEAD_DIM_MULTIPLE != 0 or not 0 < head_dim <= MAX_HEAD_DIM:
        return None
    if mask is None:
        mask = AttentionMask()
    before = (x,) if norm is None else (x, norm.residual, norm.weight)
    masks = (mask.prefix_lengths, mask.document_starts, mask.alibi_slopes)
    tensors = (*before, qkv_weight, o_weight, cos, sin, position_ids, *masks)
    scale = 1.0 / math.sqrt(head_dim) if scale is None else scale
    heads_and_scores = (batch, heads_q, heads_k, interleaved, scale, float(softcap))
    attributes = (*heads_and_scores, mask.causal, mask.window or 0)
    return tensors, attributes if norm is None else (*attributes, norm.epsilon)


@paddle.jit.not_to_static
def gated_mlp_block(
    x: paddle.Tensor,
    gate_up_weight: paddle.Tensor,
    down_weight: paddle.Tensor,
    activation: str = "silu",
) -> paddle.Tensor:
    """``linear(activation(gate) * up, down_weight)``; gate and up are x times gate_up_weight.

    Args:
        x: [..., hidden]; float32, float16 or bfloat16 (float64 runs on the reference).
        gate_up_weight: [hidden, 2 * intermediate], columns gate | up, in the dtype of x.
        down_weight: [intermediate, out_features], in the dtype of x.
        activation: "silu" as of ``swiglu``; "gelu" or "gelu_tanh" as of ``geglu``.

    Returns:
        [..., out_features] in the dtype of x.

    Raises:
        TypeError, ValueError: a dtype, shape or activation other than above.
    """
    number = ACTIVATIONS.get(activation)
    if number is not None and _is_one(x, None, gate_up_weight, down_weight, 2, 1):
        return run_compiled("pypkg_mlp_block", (x, gate_up_weight, down_weight), number)[0]
    if number is None:
        raise ValueError(
            f"gated_mlp_block: activation must be one of {', '.join(ACTIVATIONS)}, "
            f"got {activation!r}"
        )
    _check("gated_mlp_block", x, 2, 1, gate_up_weight=gate_up_weight, down_weight=down_weight)
    return linear(GATED[activation](linear(x, gate_up_weight)), down_weight)


def normed_gated_mlp_block(
    x: paddle.Tensor,
    norm: PreNorm,
    gate_up_weight: paddle.Tensor,
    down_weight: paddle.Tensor,
    activation: str = "silu",
) -> tuple[paddle.Tensor, paddle.Tensor]:
    """The norm and the feed-forward block: ``gated_mlp_block(y, ...)``, h.

    y and h are the outputs of ``norm``.

    Args:
        x: [..., hidden], as of ``rms_norm`` and of ``gated_mlp_block``.
        gate_up_weight, down_weight, activation: as of ``gated_mlp_block``.

    Raises:
        TypeError, ValueError: as of ``rms_norm`` and ``gated_mlp_block``.
    """
    number = ACTIVATIONS.get(activation)
    if number is None or not _is_one(x, norm, gate_up_weight, down_weight, 2, 1):
        y, stream = rms_norm(x, norm.weight, norm.epsilon, norm.residual)
        return gated_mlp_block(y, gate_up_weight, down_weight, activation), stream
    tensors = (x, norm.residual, norm.weight, gate_up_weight, down_weight)
    out = run_compiled("pypkg_normed_mlp_block", tensors, number, norm.epsilon)
    return out[0], out[1]


def _is_one(
    x: paddle.Tensor,
    norm: PreNorm | None,
    column: paddle.Tensor,
    row: paddle.Tensor,
    heads: int,
    heads_out: int,
) -> bool:
    """Whether the compiled operator can replace the operators of its parts.

    The conditions are written out, because a call for each tensor would cost host time. Inputs that
    are declined go through ``_check`` and the operators of the parts, which raise on a mistake.

    The operator uses Paddle's matrix products, which exist only in float32 on a CPU. It always
    computes the gradient of every weight, so a frozen weight is declined while gradients are on.

    Args:
        norm: of x before the block, or None.
        column: must be [hidden, heads * n].
        row: must be [heads_out * n, ...].
    """
    dtype = getattr(x, "dtype", None)
    if dtype is not _FLOAT32:  # a dtype is one object
        is_half = dtype is paddle.bfloat16 or dtype is paddle.float16
        if not is_half or not x.place.is_gpu_place():
            return False
    shape, columns, rows = x.shape, column.shape, row.shape
    hidden = shape[-1:]
    if norm is not None:
        weight, residual = norm.weight, norm.residual
        if not (
            residual.dtype is dtype
            and weight.dtype is dtype
            and residual.shape == shape
            and weight.shape == hidden
            and not weight.stop_gradient
        ):
            return False
    return (
        column.dtype is dtype
        and row.dtype is dtype
        and len(columns) == len(rows) == 2
        and columns[:1] == hidden
        and columns[1] * heads_out == rows[0] * heads
        and columns[1] % heads == 0
        and 0 not in shape
        and products_are_plain()
        and not (has_few_rows(x, column) or has_few_rows(x, row))
        and backend() == "compiled"
        and paddle.in_dynamic_mode()
        and not paddle.amp.is_autocast_enabled()
        and not ((column.stop_gradient or row.stop_gradient) and paddle.is_grad_enabled())
    )


def _check(op: str, x: paddle.Tensor, heads: int, heads_out: int, **weights: paddle.Tensor) -> None:
    """Raises TypeError or ValueError unless dtypes and shapes fit.

    Args:
        weights: two, [hidden, heads * n] and [heads_out * n, out_features].
    """
    check_dtype(op, "x", x, FLOATING)
    for name, weight in weights.items():
        if not has_dtype(weight, x.dtype) and not paddle.amp.is_autocast_enabled():
            check_dtype(op, name, weight, (x.dtype,))
        if len(weight.shape) != 2:
            check_shape(op, name, weight, ["in_features", "out_features"])
    (column_name, column), (row_name, row) = weights.items()
    width = column.shape[1] // heads
    check_shape(op, column_name, column, [x.shape[-1], width * heads])
    check_shape(op, row_name, row, [heads_out * width, "out_features"])
