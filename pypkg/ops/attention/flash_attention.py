"""Exact attention that never holds a [sequence, sequence] matrix."""

from __future__ import annotations

import math
from typing import TypeAlias

import paddle
import paddle.nn.functional as F

from pypkg.ops.attention.attention_mask import AttentionMask
from pypkg.ops.dispatch.checks import FLOATING, check_dtype, check_shape, compute_dtype
from pypkg.ops.dispatch.library import implementation, run_compiled

MAX_HEAD_DIM = 256
HEAD_DIM_MULTIPLE = 8

_Result: TypeAlias = paddle.Tensor | tuple[paddle.Tensor, paddle.Tensor]


@paddle.jit.not_to_static
def flash_attention(
    q: paddle.Tensor,
    k: paddle.Tensor,
    v: paddle.Tensor,
    mask: AttentionMask | None = None,
    scale: float | None = None,
    return_softmax_lse: bool = False,
    softcap: float = 0.0,
) -> _Result:
    """softmax(scores + alibi, over the visible keys) v, scores = scale * q k^T (Dao, 2023).

    A query that sees no key has output 0, no gradient and softmax_lse = -inf. Products and softmax
    accumulate in float32. Memory beside the output: softmax_lse, and in backward one workspace of
    about the size of the float32 gradient; no [seq_q, seq_k] matrix.

    Args:
        q: [batch, seq_q, heads_q, head_dim]; float32, float16 or bfloat16 (float64 runs on the
            reference). head_dim is at most 256. A head_dim that is not a multiple of 8 is padded
            with zeros internally, which copies q, k and v.
        k, v: [batch, seq_k, heads_k, head_dim] in the dtype of q; heads_q is a multiple of heads_k
            (grouped and multi query). Under ``paddle.amp`` q, k and v are cast to the dtype of
            autocasting.
        mask: the visible keys of each query; None: causal.
        scale: None: 1 / sqrt(head_dim).
        return_softmax_lse: also return log(sum(exp(scores))), float32 [batch, heads_q, seq_q],
            without gradient.
        softcap: if positive, scores become softcap * tanh(scores / softcap) before ALiBi and mask
            (Gemma 2: Gemma Team, 2024); 0: none.

    Returns:
        [batch, seq_q, heads_q, head_dim] in the dtype of q, or the pair with softmax_lse.

    Raises:
        TypeError, ValueError: a dtype, shape, head_dim or softcap other than above.
    """
    mask = AttentionMask() if mask is None else mask
    if paddle.amp.is_autocast_enabled():
        q, k, v = (each.astype(paddle.amp.get_autocast_gpu_dtype()) for each in (q, k, v))
    _check(q, k, v, mask, softcap)
    head_dim = q.shape[3]
    scale = 1.0 / math.sqrt(head_dim) if scale is None else scale
    out, softmax_lse = implementation(_IMPLEMENTATIONS, q)(q, k, v, mask, scale, softcap)
    return (out, softmax_lse.detach()) if return_softmax_lse else out


def _check(
    q: paddle.Tensor, k: paddle.Tensor, v: paddle.Tensor, mask: AttentionMask, softcap: float
) -> None:
    op = "flash_attention"
    check_dtype(op, "q", q, FLOATING)
    check_dtype(op, "k", k, (q.dtype,))
    check_dtype(op, "v", v, (q.dtype,))
    check_shape(op, "q", q, ["batch", "seq_q", "heads_q", "head_dim"])
    batch, seq_q, heads_q, head_dim = q.shape
    check_shape(op, "k", k, [batch, "seq_k", "heads_k", head_dim])
    check_shape(op, "v", v, k.shape)
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"{op}: head_dim must be from 1 to {MAX_HEAD_DIM}, got {head_dim}")
    if not (softcap >= 0 and math.isfinite(softcap)):
        raise ValueError(f"{op}: softcap must be 0 (none) or a positive number, got {softcap}")
    seq_k, heads_k = k.shape[1:3]
    if seq_k < 1:
        raise ValueError(f"{op}: there must be at least one key, got k of shape {list(k.shape)}")
    if heads_k < 1 or heads_q % heads_k != 0:
        raise ValueError(
            f"{op}: the {heads_q} heads of q must be a multiple of the {heads_k} heads of k and v"
        )
    mask.check(batch, seq_q, seq_k, heads_q)


def flash_attention_reference(
    q: paddle.Tensor,
    k: paddle.Tensor,
    v: paddle.Tensor,
    mask: AttentionMask | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
) -> tuple[paddle.Tensor, paddle.Tensor]:
    """(out, softmax_lse) of ``flash_attention``, composed of Paddle primitives.

    It stores the scores, [batch, heads_q, seq_q, seq_k].
    """
    mask = AttentionMask() if mask is None else mask
    dtype = compute_dtype(q)
    seq_q, heads_q, head_dim = q.shape[1:]
    seq_k, heads_k = k.shape[1:3]
    scale = 1.0 / math.sqrt(head_dim) if scale is None else scale

    def heads_first(x: paddle.Tensor) -> paddle.Tensor:
        x = x.astype(dtype).transpose([0, 2, 1, 3])
        return x if x.shape[1] == heads_q else x.repeat_interleave(heads_q // heads_k, axis=1)

    scores = paddle.matmul(heads_first(q), heads_first(k), transpose_y=True) * scale
    if softcap > 0:
        scores = softcap * paddle.tanh(scores / softcap)
    if mask.alibi_slopes is not None:
        i = paddle.arange(seq_k - seq_q, seq_k, dtype=dtype).unsqueeze(1)
        j = paddle.arange(seq_k, dtype=dtype).unsqueeze(0)
        scores = scores + mask.alibi_slopes.astype(dtype).reshape([1, -1, 1, 1]) * (j - i)
    visible = mask.visible(seq_q, seq_k)
    # Hidden scores get a finite floor and a weight of 0. With -inf, a query that sees no key would
    # have NaN gradients.
    scores = paddle.where(visible, scores, paddle.full([1], -1e30, dtype=dtype))
    row_max = scores.max(axis=-1, keepdim=True).detach()
    weights = paddle.exp(scores - row_max) * visible.astype(dtype)
    row_sum = weights.sum(axis=-1, keepdim=True)
    probabilities = weights / paddle.where(row_sum > 0, row_sum, paddle.ones_like(row_sum))
    out = paddle.matmul(probabilities, heads_first(v)).transpose([0, 2, 1, 3])
    softmax_lse = (row_max + paddle.log(row_sum.detach())).squeeze(-1)
    return out.astype(q.dtype), softmax_lse


def _flash_attention_compiled(
    q: paddle.Tensor,
    k: paddle.Tensor,
    v: paddle.Tensor,
    mask: AttentionMask,
    scale: float,
    softcap: float,
) -> tuple[paddle.Tensor, paddle.Tensor]:
    head_dim = q.shape[3]
    padding = -head_dim % HEAD_DIM_MULTIPLE
    if padding:
        q, k, v = (F.pad(each, [0, 0, 0, 0, 0, 0, 0, padding]) for each in (q, k, v))
    out, softmax_lse = run_compiled(
        "pypkg_flash_attention",
        [q, k, v, mask.prefix_lengths, mask.document_starts, mask.alibi_slopes],
        scale,
        float(softcap),
        mask.causal,
        mask.window or 0,
    )
    return (out[..., :head_dim] if padding else out), softmax_lse


_IMPLEMENTATIONS = {
    "compiled": _flash_attention_compiled,
    "triton": flash_attention_reference,  # there is no Triton version
    "reference": flash_attention_reference,
}
