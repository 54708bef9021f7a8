"""A block of a decoder layer, attention or feed-forward, as one operator.

The compiled operators run the kernels of their parts, in the same order, and have their bits. The
host dispatches one operator where there are three, or four with the norm before the block, which
counts where kernels are short.
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
    arguments = _attention_arguments(x, qkv_weight, o_weight, *attention)
    if arguments is None:
        qkv = linear(x, qkv_weight)
        return linear(packed_attention(qkv, *attention, overwrite=True), o_weight)
    tensors, attributes = arguments
    return run_compiled("pypkg_attention_block", [x, *tensors], *attributes)[0]


def normed_attention_block(
    x: paddle.Tensor, norm: PreNorm, qkv_weight: paddle.Tensor, o_weight: paddle.Tensor, *args: Any
) -> tuple[paddle.Tensor, paddle.Tensor]:
    """``attention_block(y, qkv_weight, o_weight, *args)``, and h: y and h are those of ``norm``.

    Args:
        x: [..., hidden], as of ``rms_norm`` and of ``attention_block``.
        args: from ``batch`` to ``softcap``, each of them.

    Raises:
        TypeError, ValueError, IndexError: as of ``rms_norm`` and ``attention_block``.
    """
    arguments = None
    if _is_kernel_norm(x, norm):
        arguments = _attention_arguments(x, qkv_weight, o_weight, *args)
    if arguments is None:
        y, stream = rms_norm(x, norm.weight, norm.epsilon, norm.residual)
        return attention_block(y, qkv_weight, o_weight, *args), stream
    tensors, attributes = arguments
    inputs = [x, norm.residual, norm.weight, *tensors]
    out = run_compiled("pypkg_normed_attention_block", inputs, *attributes, norm.epsilon)
    return out[0], out[1]


def _attention_arguments(
    x: paddle.Tensor,
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
) -> tuple[list[paddle.Tensor | None], tuple[object, ...]] | None:
    """Tensors after x, and attributes, of the compiled operator; None if its parts must run."""
    op = "attention_block"
    _check(op, x, qkv_weight=qkv_weight, o_weight=o_weight)
    heads = heads_q + 2 * heads_k
    head_dim = qkv_weight.shape[1] // heads
    check_shape(op, "qkv_weight", qkv_weight, [x.shape[-1], head_dim * heads])
    check_shape(op, "o_weight", o_weight, [heads_q * head_dim, "out_features"])
    is_fit = head_dim % HEAD_DIM_MULTIPLE == 0 and 0 < head_dim <= MAX_HEAD_DIM
    if not is_fit or (cos is None) != (sin is None) or not _is_one(x, (qkv_weight, o_weight)):
        return None
    mask = AttentionMask() if mask is None else mask
    tensors = [qkv_weight, o_weight, cos, sin, position_ids]
    tensors += [mask.prefix_lengths, mask.document_starts, mask.alibi_slopes]
    scale = 1.0 / math.sqrt(head_dim) if scale is None else scale
    attributes = (batch, heads_q, heads_k, interleaved, scale, float(softcap))
    return tensors, (*attributes, mask.causal, mask.window or 0)


@paddle.jit.not_to_static
def gated_mlp_block(
    x: paddle.Tensor,
    gate_up_weight: paddle.Tensor,
    down_weight: paddle.Tensor,
    activation: str = "silu",
) -> paddle.Tensor:
    """``linear(activation(gate) * up, down_weight)``, gate and up by ``linear`` of gate_up_weight.

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
    if not _is_one_mlp(x, gate_up_weight, down_weight, activation):
        return linear(GATED[activation](linear(x, gate_up_weight)), down_weight)
    inputs = [x, gate_up_weight, down_weight]
    return run_compiled("pypkg_mlp_block", inputs, ACTIVATIONS[activation])[0]


def normed_gated_mlp_block(
    x: paddle.Tensor,
    norm: PreNorm,
    gate_up_weight: paddle.Tensor,
    down_weight: paddle.Tensor,
    activation: str = "silu",
) -> tuple[paddle.Tensor, paddle.Tensor]:
    """``gated_mlp_block(y, ...)``, and h: y and h are those of ``norm``.

    Args:
        x: [..., hidden], as of ``rms_norm`` and of ``gated_mlp_block``.
        gate_up_weight, down_weight, activation: as of ``gated_mlp_block``.

    Raises:
        TypeError, ValueError: as of ``rms_norm`` and ``gated_mlp_block``.
    """
    weights = (gate_up_weight, down_weight)
    if not (_is_kernel_norm(x, norm) and _is_one_mlp(x, *weights, activation)):
        y, stream = rms_norm(x, norm.weight, norm.epsilon, norm.residual)
        return gated_mlp_block(y, *weights, activation), stream
    inputs = [x, norm.residual, norm.weight, *weights]
    out = run_compiled("pypkg_normed_mlp_block", inputs, ACTIVATIONS[activation], norm.epsilon)
    return out[0], out[1]


def _is_one_mlp(
    x: paddle.Tensor, gate_up_weight: paddle.Tensor, down_weight: paddle.Tensor, activation: str
) -> bool:
    op = "gated_mlp_block"
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"{op}: activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}"
        )
    _check(op, x, gate_up_weight=gate_up_weight, down_weight=down_weight)
    intermediate = gate_up_weight.shape[1] // 2
    check_shape(op, "gate_up_weight", gate_up_weight, [x.shape[-1], 2 * intermediate])
    check_shape(op, "down_weight", down_weight, [intermediate, "out_features"])
    return _is_one(x, (gate_up_weight, down_weight))


def _is_kernel_norm(x: paddle.Tensor, norm: PreNorm) -> bool:
    """Whether the compiled operator takes the norm's tensors; ``rms_norm`` raises on wrong ones.

    The operator computes the gradient of the norm's weight, whether wanted or not.
    """
    return (
        has_dtype(norm.residual, x.dtype)
        and has_dtype(norm.weight, x.dtype)
        and norm.residual.shape == x.shape
        and norm.weight.shape == x.shape[-1:]
        and not norm.weight.stop_gradient
    )


def _check(op: str, x: paddle.Tensor, **weights: paddle.Tensor) -> None:
    check_dtype(op, "x", x, FLOATING)
    for name, weight in weights.items():
        if not has_dtype(weight, x.dtype) and not paddle.amp.is_autocast_enabled():
            check_dtype(op, name, weight, (x.dtype,))
        if len(weight.shape) != 2:
            check_shape(op, name, weight, ["in_features", "out_features"])


def _is_one(x: paddle.Tensor, weights: Sequence[paddle.Tensor]) -> bool:
    """Whether the compiled operator takes the place of its parts.

    It multiplies by Paddle's kernels, of which a CPU has those of float32 only. It computes the
    gradient of every weight, whether wanted or not.
    """
    dtype = x.dtype
    is_multiplied = dtype in (paddle.float32,) or (
        dtype in (paddle.bfloat16, paddle.float16) and x.place.is_gpu_place()
    )
    return (
        is_multiplied
        and 0 not in x.shape
        and products_are_plain()
        and True not in [has_few_rows(x, each) for each in weights]
        and backend() == "compiled"
        and paddle.in_dynamic_mode()
        and not paddle.amp.is_autocast_enabled()
        and not (paddle.is_grad_enabled() and True in [each.stop_gradient for each in weights])
    )
