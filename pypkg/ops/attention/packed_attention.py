"""Rotary embedding and attention on packed queries, keys and values."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import paddle

from pypkg.ops.attention.attention_mask import AttentionMask
from pypkg.ops.attention.flash_attention import HEAD_DIM_MULTIPLE, MAX_HEAD_DIM, flash_attention
from pypkg.ops.dispatch.checks import FLOATING, check_dtype
from pypkg.ops.dispatch.library import implementation, run_compiled
from pypkg.ops.rotary_embedding import rotary_embedding


class _Call(NamedTuple):
    """The arguments of ``packed_attention`` other than qkv, with their defaults filled in."""

    batch: int
    heads_q: int
    heads_k: int
    mask: AttentionMask
    cos: paddle.Tensor | None
    sin: paddle.Tensor | None
    position_ids: paddle.Tensor | None
    interleaved: bool
    scale: float
    softcap: float
    overwrite: bool


@paddle.jit.not_to_static
def packed_attention(
    qkv: paddle.Tensor,
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
    overwrite: bool = False,
) -> paddle.Tensor:
    """``flash_attention`` of the query, key and value columns of qkv, after ``rotary_embedding``.

    The compiled operator reads qkv in place and writes one packed gradient: nothing is split,
    concatenated or copied. Other backends, static graphs and ``paddle.amp`` split qkv and run the
    two operators.

    Args:
        qkv: [..., (heads_q + 2 * heads_k) * head_dim], columns query | key | value; its tokens are
            those of ``batch`` rows of equal length, one row after the other. float32, float16 or
            bfloat16 (float64 runs on the reference).
        batch: number of rows.
        heads_q, heads_k: heads of queries, and of keys or values; heads_q is a multiple of heads_k.
        cos, sin, position_ids, interleaved: as in ``rotary_embedding``; without cos and sin nothing
            is rotated.
        mask, scale, softcap: as in ``flash_attention``.
        overwrite: whether the rotated queries and keys may overwrite qkv. No other operation may
            then need the original qkv, in the forward or the backward pass. False: the operator
            works on a copy.

    Returns:
        [..., heads_q * head_dim] in the dtype of qkv.

    Raises:
        TypeError, ValueError, IndexError: as in the two operators, or qkv cannot be divided into
            the rows and heads.
    """
    op = "packed_attention"
    check_dtype(op, "qkv", qkv, FLOATING)
    width, heads = qkv.shape[-1], heads_q + 2 * heads_k
    if width % heads != 0 or math.prod(qkv.shape[:-1]) % batch != 0:
        raise ValueError(
            f"{op}: qkv must hold {batch} rows of tokens with {heads} heads each, got shape "
            f"{list(qkv.shape)}"
        )
    if (cos is None) != (sin is None):
        raise ValueError(f"{op}: give both cos and sin, or neither")
    head_dim = width // heads
    call = _Call(
        *(batch, heads_q, heads_k, AttentionMask() if mask is None else mask),
        *(cos, sin, position_ids, interleaved),
        *(1.0 / math.sqrt(head_dim) if scale is None else scale, softcap, overwrite),
    )
    is_fit = head_dim % HEAD_DIM_MULTIPLE == 0 and head_dim <= MAX_HEAD_DIM
    if not is_fit or paddle.amp.is_autocast_enabled() or not paddle.in_dynamic_mode():
        return _composed(qkv, call)
    return implementation(_IMPLEMENTATIONS, qkv)(qkv, call)


def _composed(qkv: paddle.Tensor, call: _Call) -> paddle.Tensor:
    """The two operators, on copies of the columns."""
    query, key, value = split_heads(qkv, call.batch, call.heads_q, call.heads_k)
    if call.cos is not None and call.sin is not None:
        query, key = rotary_embedding(
            *(query, key, call.cos, call.sin, call.position_ids), interleaved=call.interleaved
        )
    out: Any = flash_attention(query, key, value, call.mask, call.scale, softcap=call.softcap)
    return out.reshape([*qkv.shape[:-1], call.heads_q * query.shape[-1]])


def split_heads(
    qkv: paddle.Tensor, batch: int, heads_q: int, heads_k: int
) -> tuple[paddle.Tensor, paddle.Tensor, paddle.Tensor]:
    """Query, key and value of a packed qkv, each [batch, sequence, heads, head_dim]."""
    heads = heads_q + 2 * heads_k
    rows = qkv.reshape([batch, -1, heads, qkv.shape[-1] // heads])
    query, key, value = paddle.split(rows, [heads_q, heads_k, heads_k], axis=2)
    return query, key, value


def _packed_attention_compiled(qkv: paddle.Tensor, call: _Call) -> paddle.Tensor:
    mask = call.mask
    tensors = [qkv, call.cos, call.sin, call.position_ids]
    tensors += [mask.prefix_lengths, mask.document_starts, mask.alibi_slopes]
    return run_compiled(
        "pypkg_packed_attention",
        tensors,
        *(call.batch, call.heads_q, call.heads_k, call.interleaved),
        *(call.scale, float(call.softcap), mask.causal, mask.window or 0, call.overwrite),
    )[0]


_IMPLEMENTATIONS = {
    "compiled": _packed_attention_compiled,
    "triton": _composed,  # there is no Triton version
    "reference": _composed,
}
