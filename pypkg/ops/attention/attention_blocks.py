"""Attention of a block of queries to a block of keys of a longer sequence, and merging blocks.

Ring attention (Liu et al., 2023) computes a sequence in blocks. ``flash_attention_with_lse`` gives
the attention to the keys of one block, ``merge_attention`` joins the results of several, and
``flash_attention_block_gradients`` gives what one block adds to the gradients.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import paddle

from pypkg.ops.attention.attention_mask import AttentionMask
from pypkg.ops.attention.flash_attention import (
    alibi,
    capped_scores,
    check_inputs,
    flash_attention_reference,
    heads_first,
    pad_heads,
)
from pypkg.ops.dispatch.checks import check_dtype, check_shape, compute_dtype
from pypkg.ops.dispatch.library import implementation, run_compiled


class BlockCall(NamedTuple):
    """The arguments of the operators on blocks other than tensors of the block."""

    mask: AttentionMask
    scale: float
    softcap: float
    query_offset: int
    key_offset: int


@paddle.no_grad()
def flash_attention_with_lse(
    query: paddle.Tensor,
    key: paddle.Tensor,
    value: paddle.Tensor,
    mask: AttentionMask | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    *,
    query_offset: int,
    key_offset: int,
) -> tuple[paddle.Tensor, paddle.Tensor]:
    """``flash_attention`` of a block of queries to a block of keys, without gradient.

    Row i of the queries has position query_offset + i in the sequence, row j of the keys position
    key_offset + j. The mask refers to these positions: the window, ALiBi, the prefix and the
    documents, whose ``document_starts`` are those of the whole sequence. A query that sees no key
    of the block has output 0 and lse -inf.

    Args:
        query: [batch, seq_q, heads_q, head_dim], as of ``flash_attention``. Autocasting by
            ``paddle.amp`` does not apply.
        key, value: [batch, seq_k, heads_k, head_dim] in the dtype of query.
        mask: None: causal. ``document_starts`` is [batch, tokens] and reaches to the end of both
            blocks at least.
        scale, softcap: as of ``flash_attention``.
        query_offset, key_offset: positions of the first query and the first key, 0 or more.

    Returns:
        out, [batch, seq_q, heads_q, head_dim] in the dtype of query, and lse = log(sum(exp(
        scores))) over the visible keys of the block, float32 [batch, heads_q, seq_q].

    Raises:
        TypeError, ValueError: a dtype, shape, head_dim, softcap or offset other than above.
    """
    op = "flash_attention_with_lse"
    call = _checked(op, query, key, value, mask, scale, softcap, query_offset, key_offset)
    return implementation(_FORWARD, query)(query, key, value, call)


@paddle.no_grad()
def flash_attention_block_gradients(
    query: paddle.Tensor,
    key: paddle.Tensor,
    value: paddle.Tensor,
    out: paddle.Tensor,
    lse: paddle.Tensor,
    grad_out: paddle.Tensor,
    mask: AttentionMask | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    *,
    query_offset: int,
    key_offset: int,
) -> tuple[paddle.Tensor, paddle.Tensor, paddle.Tensor]:
    """The gradients of one block, given the attention to the keys of all blocks.

    The gradient of the queries is the sum of dq over the blocks of keys. The gradients of a block
    of keys and values are the sums of dk and dv over the blocks of queries (Dao, 2023).

    Args:
        query, key, value, mask, scale, softcap, query_offset, key_offset: as of
            ``flash_attention_with_lse``.
        out: the output for these queries, merged over all blocks of keys, like query.
        lse: merged likewise, float32 [batch, heads_q, seq_q].
        grad_out: gradient of out, like query.

    Returns:
        dq, dk, dv like query, key and value.

    Raises:
        TypeError, ValueError: a dtype, shape, head_dim, softcap or offset other than above.
    """
    op = "flash_attention_block_gradients"
    call = _checked(op, query, key, value, mask, scale, softcap, query_offset, key_offset)
    for name, tensor in (("out", out), ("grad_out", grad_out)):
        check_dtype(op, name, tensor, (query.dtype,))
        check_shape(op, name, tensor, query.shape)
    batch, seq_q, heads_q = query.shape[:3]
    check_dtype(op, "lse", lse, (compute_dtype(query),))
    check_shape(op, "lse", lse, [batch, heads_q, seq_q])
    return implementation(_GRADIENTS, query)(query, key, value, out, lse, grad_out, call)


@paddle.no_grad()
def merge_attention(
    outs: Sequence[paddle.Tensor], lses: Sequence[paddle.Tensor]
) -> tuple[paddle.Tensor, paddle.Tensor]:
    """Merges the attention to several blocks of keys, without gradient.

    out = sum(exp(lse_n - lse) out_n), lse = log(sum(exp(lse_n))), in float32. The maximum is
    subtracted first, so nothing overflows. A block with lse -inf adds nothing. A query that sees no
    key in any block has output 0 and lse -inf. Blocks may be merged one after the other: if the
    first out is float32, intermediate results are not rounded.

    Args:
        outs: [batch, seq_q, heads_q, head_dim] of each block, one at least; dtypes may differ.
        lses: [batch, heads_q, seq_q] of each block, float32 (float64 stays so).

    Returns:
        out in the dtype of the first of ``outs``, lse in the dtype of the first of ``lses``.

    Raises:
        ValueError: no block, another number of lses than of outs, or shapes that do not fit.
    """
    op = "merge_attention"
    if not outs or len(outs) != len(lses):
        raise ValueError(
            f"{op}: there must be one lse for each out and one out at least, got {len(outs)} outs "
            f"and {len(lses)} lses"
        )
    check_shape(op, "outs[0]", outs[0], ["batch", "seq_q", "heads_q", "head_dim"])
    batch, seq_q, heads_q = outs[0].shape[:3]
    for number, (out, lse) in enumerate(zip(outs, lses)):
        check_shape(op, f"outs[{number}]", out, outs[0].shape)
        check_shape(op, f"lses[{number}]", lse, [batch, heads_q, seq_q])
    highest = lses[0]
    for lse in lses[1:]:
        highest = paddle.maximum(highest, lse)
    # 0 for a query that sees no key, because -inf - (-inf) would be NaN.
    highest = paddle.where(paddle.isinf(highest), paddle.zeros_like(highest), highest)
    total, total_weight = paddle.zeros([1]), paddle.zeros([1])
    for out, lse in zip(outs, lses):
        weight = paddle.exp(lse - highest)
        total_weight = total_weight + weight
        total = total + out.astype(lse.dtype) * _by_token(weight)
    divisor = paddle.where(total_weight > 0, total_weight, paddle.ones_like(total_weight))
    merged = total / _by_token(divisor)
    return merged.astype(outs[0].dtype), highest + paddle.log(total_weight)


def _by_token(rows: paddle.Tensor) -> paddle.Tensor:
    """[batch, heads_q, seq_q] as [batch, seq_q, heads_q, 1]."""
    return rows.transpose([0, 2, 1]).unsqueeze(-1)


def _checked(
    op: str,
    query: paddle.Tensor,
    key: paddle.Tensor,
    value: paddle.Tensor,
    mask: AttentionMask | None,
    scale: float | None,
    softcap: float,
    query_offset: int,
    key_offset: int,
) -> BlockCall:
    """The arguments with their defaults filled in.

    Raises:
        TypeError, ValueError: as in the operators.
    """
    mask = AttentionMask() if mask is None else mask
    check_inputs(op, query, key, value, softcap)
    for name, offset in (("query_offset", query_offset), ("key_offset", key_offset)):
        if offset < 0:
            raise ValueError(f"{op}: {name} must be a position, 0 or more, got {offset}")
    batch, seq_q, heads_q, head_dim = query.shape
    mask.check_block(batch, heads_q, max(query_offset + seq_q, key_offset + key.shape[1]))
    scale = 1.0 / math.sqrt(head_dim) if scale is None else scale
    return BlockCall(mask, scale, float(softcap), query_offset, key_offset)


def _with_lse_reference(
    query: paddle.Tensor, key: paddle.Tensor, value: paddle.Tensor, call: BlockCall
) -> tuple[paddle.Tensor, paddle.Tensor]:
    return flash_attention_reference(query, key, value, *call)


def _block_gradients_reference(
    query: paddle.Tensor,
    key: paddle.Tensor,
    value: paddle.Tensor,
    out: paddle.Tensor,
    lse: paddle.Tensor,
    grad_out: paddle.Tensor,
    call: BlockCall,
) -> tuple[paddle.Tensor, paddle.Tensor, paddle.Tensor]:
    """Computed from P = exp(scores - lse), dP = dout v^T and dS = P * (dP - sum(dout * out))."""
    mask, scale, softcap, query_offset, key_offset = call
    heads_q, heads_k = query.shape[2], key.shape[2]
    scores = capped_scores(query, key, scale, softcap)
    slope = 1 - (scores / softcap) ** 2 if softcap > 0 else 1.0
    if mask.alibi_slopes is not None:
        scores = scores + alibi(mask.alibi_slopes, scores, query_offset - key_offset)
    visible = mask.visible(query.shape[1], key.shape[1], query_offset, key_offset)
    p = paddle.where(visible, paddle.exp(scores - lse.unsqueeze(-1)), paddle.zeros_like(scores))
    dout = heads_first(grad_out, heads_q)
    delta = (dout * heads_first(out, heads_q)).sum(axis=-1, keepdim=True)
    dp = paddle.matmul(dout, heads_first(value, heads_q), transpose_y=True)
    ds = p * (dp - delta) * slope * scale

    def of_keys(gradient: paddle.Tensor) -> paddle.Tensor:
        """The sum over the query heads that share a key head, tokens before heads."""
        batch, _, seq_k, head_dim = gradient.shape
        by_group = gradient.reshape([batch, heads_k, heads_q // heads_k, seq_k, head_dim])
        return by_group.sum(axis=2).transpose([0, 2, 1, 3]).astype(query.dtype)

    dq = paddle.matmul(ds, heads_first(key, heads_q)).transpose([0, 2, 1, 3]).astype(query.dtype)
    dk = paddle.matmul(ds, heads_first(query, heads_q), transpose_x=True)
    return dq, of_keys(dk), of_keys(paddle.matmul(p, dout, transpose_x=True))


def _with_lse_compiled(
    query: paddle.Tensor, key: paddle.Tensor, value: paddle.Tensor, call: BlockCall
) -> tuple[paddle.Tensor, paddle.Tensor]:
    out, lse = _run("pypkg_flash_attention_block", (query, key, value), (), call)
    return _cut(out, query.shape[3]), lse


def _block_gradients_compiled(
    query: paddle.Tensor,
    key: paddle.Tensor,
    value: paddle.Tensor,
    out: paddle.Tensor,
    lse: paddle.Tensor,
    grad_out: paddle.Tensor,
    call: BlockCall,
) -> tuple[paddle.Tensor, paddle.Tensor, paddle.Tensor]:
    padded_out, padded_grad_out = pad_heads(out, grad_out)
    dq, dk, dv = (
        _cut(gradient, query.shape[3])
        for gradient in _run(
            "pypkg_flash_attention_block_gradients",
            (query, key, value),
            (padded_out, lse, padded_grad_out),
            call,
        )
    )
    return dq, dk, dv


def _cut(heads: paddle.Tensor, head_dim: int) -> paddle.Tensor:
    return heads if heads.shape[3] == head_dim else heads[..., :head_dim]


def _run(
    op: str, qkv: tuple[paddle.Tensor, ...], others: tuple[paddle.Tensor, ...], call: BlockCall
) -> list[paddle.Tensor]:
    mask = call.mask
    masking = (mask.prefix_lengths, mask.document_starts, mask.alibi_slopes)
    return run_compiled(
        op,
        [*pad_heads(*qkv), *masking, *others],
        *(call.scale, call.softcap, mask.causal, mask.window or 0),
        *(call.query_offset, call.key_offset),
    )


_FORWARD = {
    "compiled": _with_lse_compiled,
    "triton": _with_lse_reference,  # there is no Triton version
    "reference": _with_lse_reference,
}
_GRADIENTS = {
    "compiled": _block_gradients_compiled,
    "triton": _block_gradients_reference,  # there is no Triton version
    "reference": _block_gradients_reference,
}
