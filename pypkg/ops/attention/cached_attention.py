"""Attention of a step of generation: of one new token of each row to the kept tokens of its row."""

from __future__ import annotations

from typing import NamedTuple

import paddle

from pypkg.ops.attention.attention_mask import AttentionMask
from pypkg.ops.dispatch.library import backend, run_compiled


class KeptTokens(NamedTuple):
    """The keys and values of the tokens before a new one, with room for its own.

    Attributes:
        keys, values: float32 [batch, heads_k, capacity, head_dim]; keys are rotated.
        position: of the new token in each row, below the capacity.
        first_keys: int64 [batch], at most ``position``: the first token of each row that is no
            padding; None: 0.
    """

    keys: paddle.Tensor
    values: paddle.Tensor
    position: int
    first_keys: paddle.Tensor | None


def cached_attention(
    query: paddle.Tensor,
    key: paddle.Tensor,
    value: paddle.Tensor,
    kept: KeptTokens,
    mask: AttentionMask,
    scale: float | None = None,
    softcap: float = 0.0,
) -> paddle.Tensor | None:
    """``flash_attention`` of the new tokens to the kept ones and themselves, without a gradient.

    Args:
        query: float32 [batch, 1, heads_q, head_dim], rotated; heads_q is a multiple of heads_k.
        key, value: float32 [batch, 1, heads_k, head_dim] of the new tokens, which ``kept.keys`` and
            ``kept.values`` get.
        mask: window and slopes count. The kept tokens are all before the new one.
        scale, softcap: as of ``flash_attention``.

    Returns:
        [batch, 1, heads_q, head_dim]; None, and nothing is written, where there is no compiled
        operator: on a GPU, in another dtype, for a gradient, or with another backend.

    Raises:
        ValueError: a shape other than above.
    """
    if not _has_operator(query) or kept.keys.dtype is not paddle.float32:
        return None
    tensors = (query, key, value, kept.keys, kept.values, kept.first_keys, mask.alibi_slopes)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = (mask.window or 0, scale, softcap)
    return run_compiled("pypkg_cached_attention", tensors, kept.position, *scores)[0]


def _has_operator(x: paddle.Tensor) -> bool:
    return (
        not paddle.is_grad_enabled()
        and x.dtype is paddle.float32
        and x.place.is_cpu_place()
        and paddle.in_dynamic_mode()
        and backend() == "compiled"
    )
