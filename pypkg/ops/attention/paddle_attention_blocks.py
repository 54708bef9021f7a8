"""The operators on blocks of a sequence by Paddle's FlashAttention, whose kernels need a GPU.

Paddle's kernels know no positions. They serve the blocks that are visible wholly or, where queries
and keys are the same tokens, under the causal mask: those of ring attention without other masks.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import paddle
import paddle.nn.functional as F
from paddle import _C_ops

from pypkg.ops.attention.attention_blocks import BlockCall, checked_block
from pypkg.ops.attention.attention_mask import AttentionMask
from pypkg.ops.attention.flash_attention import HEAD_DIM_MULTIPLE, pad_heads

# Paddle rounds the rows of lse up to it, so that others would need a layout of their own.
_QUERY_MULTIPLE = 128


class _Block(NamedTuple):
    """What Paddle's kernels are asked for; ``causal`` None: nothing is visible."""

    causal: bool | None
    factor: float  # of the queries: the scale, divided by that of the kernels


@paddle.no_grad()
def paddle_flash_attention_with_lse(
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
    """``ops.flash_attention_with_lse`` by Paddle's kernels.

    Args:
        query: as there, but float16 or bfloat16, on a GPU, and a multiple of 128 queries.
        mask: causal or not, and a window that hides nothing of the block or all of it. None:
            causal.
        softcap: 0.
        query_offset, key_offset: so that the block is visible wholly, or hidden wholly, or causal
            with the same tokens as queries and as keys.

    Returns:
        out and lse, as there.

    Raises:
        TypeError, ValueError: what Paddle's kernels lack, by name.
    """
    op = "paddle_flash_attention_with_lse"
    call = checked_block(op, query, key, value, mask, scale, softcap, query_offset, key_offset)
    block = _reduced(op, query, key, call)
    if block.causal is None:
        batch, seq_q, heads_q = query.shape[:3]
        return paddle.zeros_like(query), paddle.full([batch, heads_q, seq_q], -math.inf)
    q, k, v = pad_heads(_scaled(query, block), key, value)
    out, lse = F.flashmask_attention(q, k, v, causal=block.causal, return_softmax_lse=True)
    return out[..., : query.shape[3]], lse


@paddle.no_grad()
def paddle_flash_attention_block_gradients(
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
    """``ops.flash_attention_block_gradients`` by Paddle's kernels.

    Args:
        query, key, value, mask, softcap, query_offset, key_offset: as of
            ``paddle_flash_attention_with_lse``.
        out, lse, grad_out, scale: as of ``ops.flash_attention_block_gradients``.

    Returns:
        dq, dk, dv like query, key and value.

    Raises:
        TypeError, ValueError: what Paddle's kernels lack, by name.
    """
    op = "paddle_flash_attention_block_gradients"
    call = checked_block(op, query, key, value, mask, scale, softcap, query_offset, key_offset)
    block = _reduced(op, query, key, call)
    if block.causal is None:
        dq, dk, dv = (paddle.zeros_like(each) for each in (query, key, value))
        return dq, dk, dv
    q, k, v, o, dout = pad_heads(_scaled(query, block), key, value, out, grad_out)
    # Of the random numbers of dropout, which there is none of; the kernel reads it on the host.
    seed_offset = paddle.to_tensor([0, 0], dtype="int64", place=paddle.CPUPlace())
    gradients = _C_ops.flash_attn_grad(q, k, v, o, lse, seed_offset, None, dout, 0.0, block.causal)
    dq, dk, dv = (each[..., : query.shape[3]] for each in gradients)
    return _scaled(dq, block), dk, dv


def _scaled(x: paddle.Tensor, block: _Block) -> paddle.Tensor:
    return x if math.isclose(block.factor, 1.0, rel_tol=1e-7) else x * block.factor


def _reduced(op: str, query: paddle.Tensor, key: paddle.Tensor, call: BlockCall) -> _Block:
    mask, seq_q, seq_k = call.mask, query.shape[1], key.shape[1]
    if query.dtype not in (paddle.float16, paddle.bfloat16):
        raise TypeError(f"{op}: query must be float16 or bfloat16, got {query.dtype}")
    lacking = {
        "soft cap": call.softcap > 0,
        "ALiBi": mask.alibi_slopes is not None,
        "documents by position": mask.document_starts is not None,
        "prefix by position": mask.prefix_lengths is not None,
    }
    missing = [f"no {name}" for name, asked in lacking.items() if asked]
    if missing:
        raise ValueError(f"{op}: Paddle's kernels have {', '.join(missing)}")
    if seq_q % _QUERY_MULTIPLE:
        raise ValueError(
            f"{op}: the number of queries must be a multiple of {_QUERY_MULTIPLE}, got {seq_q}"
        )
    padded = query.shape[3] + -query.shape[3] % HEAD_DIM_MULTIPLE
    return _Block(_causal(op, mask, seq_q, seq_k, call), call.scale * math.sqrt(padded))


def _causal(op: str, mask: AttentionMask, seq_q: int, seq_k: int, call: BlockCall) -> bool | None:
    """Whether Paddle's causal mask shows what is visible; None if nothing is."""
    lead = call.query_offset - call.key_offset
    nearest, farthest = lead - (seq_k - 1), lead + seq_q - 1  # queries minus keys
    hidden = (mask.causal and farthest < 0) or (mask.window is not None and nearest >= mask.window)
    if hidden:
        return None
    if mask.window is None or farthest < mask.window:
        if not mask.causal or nearest >= 0:
            return False
        if lead == 0 and seq_q == seq_k:
            return True
    raise ValueError(
        f"{op}: Paddle's kernels know no positions: they take blocks that are visible wholly, or "
        f"causal with the same tokens as queries and keys, but {seq_q} queries from "
        f"{call.query_offset} on and {seq_k} keys from {call.key_offset} on are visible in part "
        f"under causal={mask.causal} and window={mask.window}; use attention_backend 'pypkg'"
    )
