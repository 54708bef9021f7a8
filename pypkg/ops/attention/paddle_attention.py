"""Attention by the FlashAttention kernels that come with Paddle's wheels for GPUs.

Masks are converted to the row bounds of FlashMask (Wang et al., 2024): for every key, the first row
below the diagonal and the first row above it from which queries do not see the key.
"""

from __future__ import annotations

import math
from typing import TypeAlias
from weakref import WeakKeyDictionary

import paddle
import paddle.nn.functional as F

from pypkg.ops.attention.attention_mask import AttentionMask

_HEAD_DIM_MULTIPLE = 8
# The layers of a model share the masks of a step, so their bounds are computed once.
_Bounds: TypeAlias = tuple[paddle.Tensor | None, bool]
_bounds: WeakKeyDictionary[AttentionMask, dict[tuple[int, int], _Bounds]] = WeakKeyDictionary()


def paddle_flash_attention(
    q: paddle.Tensor,
    k: paddle.Tensor,
    v: paddle.Tensor,
    mask: AttentionMask | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
) -> paddle.Tensor:
    """``ops.flash_attention`` by Paddle's kernels; it stores no [sequence, sequence] matrix.

    Paddle's FlashAttention 2 only has the scale 1 / sqrt(head_dim). For another scale, q is
    multiplied first, in one more pass over q. A head_dim that is not a multiple of 8 is padded with
    zeros.

    Args:
        q: [batch, sequence, heads_q, head_dim], float16 or bfloat16, on a GPU.
        k, v: [batch, sequence, heads_k, head_dim] in the dtype of q; heads_q is a multiple of
            heads_k. Under ``paddle.amp`` q, k and v are cast to the dtype of autocasting.
        mask, scale: as in ``ops.flash_attention``.
        softcap: must be 0, because Paddle's kernels have no soft cap.

    Returns:
        [batch, sequence, heads_q, head_dim] in the dtype of q.

    Raises:
        ValueError: a soft cap, ALiBi slopes, or another number of keys than of queries.
        TypeError: another dtype than above.
    """
    mask = AttentionMask() if mask is None else mask
    if paddle.amp.is_autocast_enabled():
        q, k, v = (each.astype(paddle.amp.get_autocast_gpu_dtype()) for each in (q, k, v))
    _check(q, k, mask, softcap)
    head_dim = q.shape[3]
    padding = -head_dim % _HEAD_DIM_MULTIPLE
    default = 1.0 / math.sqrt(head_dim + padding)
    scale = 1.0 / math.sqrt(head_dim) if scale is None else scale
    if not math.isclose(scale, default, rel_tol=1e-7):
        q = q * (scale / default)
    if padding:
        q, k, v = (F.pad(each, [0, 0, 0, 0, 0, 0, 0, padding]) for each in (q, k, v))
    known = _bounds.setdefault(mask, {})
    batch, sequence = k.shape[:2]
    if (batch, sequence) not in known:
        known[batch, sequence] = startend_row_indices(mask, batch, sequence)
    bounds, causal = known[batch, sequence]
    if bounds is None:
        out = F.flash_attention.flash_attention(q, k, v, causal=causal)[0]
    else:
        out = F.flashmask_attention(q, k, v, bounds, causal=causal)
    return out[..., :head_dim] if padding else out


def startend_row_indices(mask: AttentionMask, batch: int, sequence: int) -> _Bounds:
    """``mask`` as the arguments ``startend_row_indices`` and ``causal`` of flashmask_attention.

    Returns:
        The bounds, int32 [batch, 1, sequence, n], or None if ``causal`` is the whole mask. With
        causal, n is 1: the first row after the key's document or window. Without it, n is 2: that
        row, and the first row that sees the key, which depends on prefixes and documents.
    """
    first = paddle.arange(sequence, dtype="int32").unsqueeze(0)  # the rows that causality allows
    stop = None
    if mask.window is not None:
        stop = paddle.clip(first + mask.window, max=sequence)
    starts = mask.document_starts
    if starts is not None:
        ends = _document_ends(starts)
        stop = ends if stop is None else paddle.minimum(stop, ends)
    causal = mask.causal and mask.prefix_lengths is None
    if stop is None:
        if mask.prefix_lengths is None:
            return None, mask.causal
        stop = paddle.full([1, sequence], sequence, dtype="int32")
    bounds = [stop]
    if not causal:
        seen_from = paddle.zeros_like(first) if starts is None else starts
        if mask.prefix_lengths is not None:
            in_prefix = first < mask.prefix_lengths.unsqueeze(1)
            seen_from = paddle.where(in_prefix, seen_from, first)
        bounds.append(seen_from)
    shape = [batch, sequence]
    return paddle.stack([each.expand(shape) for each in bounds], axis=-1).unsqueeze(1), causal


def _document_ends(starts: paddle.Tensor) -> paddle.Tensor:
    """int32 [batch, sequence]: the position after the document of each token.

    It is the number of tokens whose document begins at or before that of the token.
    """
    return paddle.searchsorted(starts, starts, out_int32=True, right=True)


def _check(q: paddle.Tensor, k: paddle.Tensor, mask: AttentionMask, softcap: float) -> None:
    op = "paddle_flash_attention"
    if q.dtype not in (paddle.float16, paddle.bfloat16):
        raise TypeError(f"{op}: q must be float16 or bfloat16, got {q.dtype}")
    if softcap:
        raise ValueError(f"{op}: Paddle's kernels have no soft cap, got {softcap}")
    if mask.alibi_slopes is not None:
        raise ValueError(f"{op}: Paddle's kernels have no ALiBi, got slopes")
    if q.shape[1] != k.shape[1]:
        raise ValueError(
            f"{op}: there must be as many queries as keys, got {q.shape[1]} and {k.shape[1]}"
        )
    mask.check(q.shape[0], q.shape[1], k.shape[1], q.shape[2])
