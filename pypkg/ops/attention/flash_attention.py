"""Exact attention that never stores a [sequence, sequence] matrix."""

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

    A query that sees no key has output 0, gradient 0 and softmax_lse = -inf. Products and softmax
    accumulate in float32. Besides the output it needs memory for softmax_lse, and in the backward
    pass a workspace of about the size of the float32 gradient; no [seq_q, seq_k] matrix.

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
    check_inputs("flash_attention", q, k, v, softcap)
    mask.check(q.shape[0], q.shape[1], k.shape[1], q.shape[2])
    head_dim = q.shape[3]
    scale = 1.0 / math.sqrt(head_dim) if scale is None else scale
    out, softmax_lse = implementation(_IMPLEMENTATIONS, q)(q, k, v, mask, scale, softcap)
    return (out, softmax_lse.detach()) if return_softmax_lse else out


def check_inputs(
    op: str, q: paddle.Tensor, k: paddle.Tensor, v: paddle.Tensor, softcap: float
) -> None:
    """Raises TypeError or ValueError unless the arguments are as in ``flash_attention``."""
    check_dtype(op, "q", q, FLOATING)
    check_dtype(op, "k", k, (q.dtype,))
    check_dtype(op, "v", v, (q.dtype,))
    check_shape(op, "q", q, ["batch", "seq_q", "heads_q", "head_dim"])
    batch, _, heads_q, head_dim = q.shape
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


def flash_attention_reference(
    q: paddle.Tensor,
    k: paddle.Tensor,
    v: paddle.Tensor,
    mask: AttentionMask | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    query_offset: int | None = None,
    key_offset: int = 0,
) -> tuple[paddle.Tensor, paddle.Tensor]:
    """(out, softmax_lse) of ``flash_attention``, composed of Paddle primitives.

    It stores the scores, [batch, heads_q, seq_q, seq_k]. The offsets are positions of the first
    query and the first key. None: queries are aligned to the last keys.
    """
    mask = AttentionMask() if mask is None else mask
    seq_q, seq_k, heads_q = q.shape[1], k.shape[1], q.shape[2]
    query_offset = key_offset + seq_k - seq_q if query_offset is None else query_offset
    scores = capped_scores(q, k, 1.0 / math.sqrt(q.shape[3]) if scale is None else scale, softcap)
    if mask.alibi_slopes is not None:
        scores = scores + alibi(mask.alibi_slopes, scores, query_offset - key_offset)
    visible = mask.visible(seq_q, seq_k, query_offset, key_offset)
    # Hidden scores get a finite floor and a weight of 0. With -inf, a query that sees no key would
    # have NaN gradients.
    scores = paddle.where(visible, scores, paddle.full([1], -1e30, dtype=scores.dtype))
    row_max = scores.max(axis=-1, keepdim=True).detach()
    weights = paddle.exp(scores - row_max) * visible.astype(scores.dtype)
    row_sum = weights.sum(axis=-1, keepdim=True)
    probabilities = weights / paddle.where(row_sum > 0, row_sum, paddle.ones_like(row_sum))
    out = paddle.matmul(probabilities, heads_first(v, heads_q)).transpose([0, 2, 1, 3])
    softmax_lse = (row_max + paddle.log(row_sum.detach())).squeeze(-1)
    return out.astype(q.dtype), softmax_lse


def heads_first(x: paddle.Tensor, heads_q: int) -> paddle.Tensor:
    """[batch, heads_q, sequence, head_dim] in the dtype of references; key heads are repeated."""
    x = x.astype(compute_dtype(x)).transpose([0, 2, 1, 3])
    return x if x.shape[1] == heads_q else x.repeat_interleave(heads_q // x.shape[1], axis=1)


def capped_scores(
    q: paddle.Tensor, k: paddle.Tensor, scale: float, softcap: float
) -> paddle.Tensor:
    """[batch, heads_q, seq_q, seq_k]: scores before ALiBi and mask."""
    heads_q = q.shape[2]
    products = paddle.matmul(heads_first(q, heads_q), heads_first(k, heads_q), transpose_y=True)
    scores = products * scale
    return softcap * paddle.tanh(scores / softcap) if softcap > 0 else scores


def alibi(slopes: paddle.Tensor, scores: paddle.Tensor, first: int) -> paddle.Tensor:
    """ALiBi's bias, [1, heads_q, seq_q, seq_k], for scores whose first query is ``first`` positions
    after the first key."""
    seq_q, seq_k = scores.shape[2:]
    i = paddle.arange(first, first + seq_q, dtype=scores.dtype).unsqueeze(1)
    j = paddle.arange(seq_k, dtype=scores.dtype).unsqueeze(0)
    return slopes.astype(scores.dtype).reshape([1, -1, 1, 1]) * (j - i)


def _flash_attention_compiled(
    q: paddle.Tensor,
    k: paddle.Tensor,
    v: paddle.Tensor,
    mask: AttentionMask,
    scale: float,
    softcap: float,
) -> tuple[paddle.Tensor, paddle.Tensor]:
    head_dim = q.shape[3]
    out, softmax_lse = run_compiled(
        "pypkg_flash_attention",
        [*pad_heads(q, k, v), mask.prefix_lengths, mask.document_starts, mask.alibi_slopes],
        scale,
        float(softcap),
        mask.causal,
        mask.window or 0,
    )
    return (out[..., :head_dim] if head_dim % HEAD_DIM_MULTIPLE else out), softmax_lse


def pad_heads(*tensors: paddle.Tensor) -> list[paddle.Tensor]:
    """Pads head_dim with zeros to a multiple of 8; returns the same tensors if it is one."""
    padding = -tensors[0].shape[3] % HEAD_DIM_MULTIPLE
    if not padding:
        return list(tensors)
    return [F.pad(each, [0, 0, 0, 0, 0, 0, 0, padding]) for each in tensors]


_IMPLEMENTATIONS = {
    "compiled": _flash_attention_compiled,
    "triton": flash_attention_reference,  # there is no Triton version
    "reference": flash_attention_reference,
}
