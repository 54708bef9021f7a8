"""Rotary position embedding: the contract of rotary_embedding.h in Triton."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .launch import launch, warps

_TILE = 2048  # pairs of dimensions of a tile of several heads


@triton.jit
def _rotate(
    source, target, cosine, sine, token, first_head, heads, interleaved: tl.constexpr,
    offset: tl.constexpr, half: tl.constexpr, head_dim: tl.constexpr,
    HEADS: tl.constexpr, PAIRS: tl.constexpr, COPIED: tl.constexpr,
):  # fmt: skip
    """Rotates one token's heads [first_head, first_head + HEADS)."""
    head = first_head + tl.arange(0, HEADS)
    start = ((token * heads + head) * head_dim)[:, None]
    present = (head < heads)[:, None]
    if half > 0:
        if interleaved:
            dim = tl.arange(0, 2 * PAIRS)[None, :]
            at = start + offset + dim
            inside = present & (dim < 2 * half)
            both = tl.load(source + at, mask=inside, other=0.0).to(tl.float32)
            a, b = tl.split(tl.reshape(both, [HEADS, PAIRS, 2]))
            turned = tl.join(a * cosine - b * sine, b * cosine + a * sine)
            turned = tl.reshape(turned, [HEADS, 2 * PAIRS])
            tl.store(target + at, turned.to(target.dtype.element_ty), mask=inside)
        else:
            pair = tl.arange(0, PAIRS)[None, :]
            at = start + offset + pair
            inside = present & (pair < half)
            a = tl.load(source + at, mask=inside, other=0.0).to(tl.float32)
            b = tl.load(source + at + half, mask=inside, other=0.0).to(tl.float32)
            new_a, new_b = a * cosine - b * sine, b * cosine + a * sine
            tl.store(target + at, new_a.to(target.dtype.element_ty), mask=inside)
            tl.store(target + at + half, new_b.to(target.dtype.element_ty), mask=inside)
    if 2 * half < head_dim:
        dim = tl.arange(0, COPIED)[None, :]
        kept = (dim < offset) | ((dim >= offset + 2 * half) & (dim < head_dim))
        value = tl.load(source + start + dim, mask=present & kept)
        tl.store(target + start + dim, value, mask=present & kept)


@triton.jit
def rotary_kernel(
    q, k, cos, sin, q_out, k_out, position_ids, sequence, q_heads, k_heads, num_positions,
    interleaved: tl.constexpr, inverse: tl.constexpr, offset: tl.constexpr, half: tl.constexpr,
    head_dim: tl.constexpr, HEADS: tl.constexpr, PAIRS: tl.constexpr, COPIED: tl.constexpr,
):  # fmt: skip
    """One program per token and group of heads; the heads of q come first. A program reads its
    elements before it writes them, so that outputs may be the inputs."""
    token = tl.program_id(0).to(tl.int64)
    position = tl.load(position_ids + token) if position_ids is not None else token % sequence
    pair = tl.arange(0, PAIRS)[None, :]
    known = (position >= 0) & (position < num_positions) & (pair < half)
    cosine = tl.load(cos + position * half + pair, mask=known, other=float("nan"))
    sine = tl.load(sin + position * half + pair, mask=known, other=float("nan"))
    if inverse:
        sine = -sine
    group = tl.program_id(1)
    q_groups = tl.cdiv(q_heads, HEADS)
    if group < q_groups:
        _rotate(q, q_out, cosine, sine, token, group * HEADS, q_heads, interleaved, offset, half,
                head_dim, HEADS, PAIRS, COPIED)  # fmt: skip
    elif k is not None:
        _rotate(k, k_out, cosine, sine, token, (group - q_groups) * HEADS, k_heads, interleaved,
                offset, half, head_dim, HEADS, PAIRS, COPIED)  # fmt: skip


def rotary_embedding(
    q: Any,
    k: Any,
    cos: Any,
    sin: Any,
    q_out: Any,
    k_out: Any = None,
    position_ids: Any = None,
    *,
    rotary_offset: int = 0,
    interleaved: bool = False,
    inverse: bool = False,
    stream: int | None = None,
) -> None:
    """See ``pypkg._native.rotary_embedding``."""
    batch, sequence, q_heads, head_dim = q.shape
    k_heads = 0 if k is None else k.shape[2]
    num_positions, half = cos.shape
    pairs = triton.next_power_of_2(max(half, 1))
    heads = min(triton.next_power_of_2(max(q_heads, k_heads, 1)), max(1, _TILE // pairs))
    groups = triton.cdiv(q_heads, heads) + triton.cdiv(k_heads, heads)
    launch(
        rotary_kernel, (batch * sequence, groups),
        *(q, k, cos, sin, q_out, k_out, position_ids, sequence, q_heads, k_heads, num_positions),
        interleaved=interleaved, inverse=inverse, offset=rotary_offset, half=half,
        head_dim=head_dim, HEADS=heads, PAIRS=pairs, COPIED=triton.next_power_of_2(head_dim),
        num_warps=warps(heads * pairs, 8), stream=stream,
    )  # fmt: skip
