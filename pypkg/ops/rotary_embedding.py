"""Rotary position embedding of queries and keys."""

from __future__ import annotations

from typing import overload

import paddle

from pypkg.ops.dispatch import triton_operators
from pypkg.ops.dispatch.checks import FLOATING, check_dtype, check_shape, compute_dtype
from pypkg.ops.dispatch.library import implementation, run_compiled

_Result = tuple[paddle.Tensor, paddle.Tensor | None]


@overload
def rotary_embedding(
    q: paddle.Tensor,
    k: None,
    cos: paddle.Tensor,
    sin: paddle.Tensor,
    position_ids: paddle.Tensor | None = ...,
    interleaved: bool = ...,
    rotary_offset: int = ...,
) -> tuple[paddle.Tensor, None]: ...


@overload
def rotary_embedding(
    q: paddle.Tensor,
    k: paddle.Tensor,
    cos: paddle.Tensor,
    sin: paddle.Tensor,
    position_ids: paddle.Tensor | None = ...,
    interleaved: bool = ...,
    rotary_offset: int = ...,
) -> tuple[paddle.Tensor, paddle.Tensor]: ...


@paddle.jit.not_to_static
def rotary_embedding(
    q: paddle.Tensor,
    k: paddle.Tensor | None,
    cos: paddle.Tensor,
    sin: paddle.Tensor,
    position_ids: paddle.Tensor | None = None,
    interleaved: bool = False,
    rotary_offset: int = 0,
) -> _Result:
    """Rotates pairs of dimensions by an angle that grows with the position (Su et al., 2021).

        (a, b) -> (a cos[p, i] - b sin[p, i],  b cos[p, i] + a sin[p, i])

    for pair i of the token at position p. With ``rotary_dim`` = 2 * cos.shape[1], dimensions
    [rotary_offset, rotary_offset + rotary_dim) of each head are rotated and the others are copied.
    Pair i consists of the dimensions i and i + rotary_dim / 2 (LLaMA, GPT-NeoX), or 2i and 2i + 1
    if ``interleaved`` (GPT-J, ChatGLM2), counted from rotary_offset. Two-dimensional positions
    take two calls, one for each half of the head. The arithmetic is float32; the gradient is the
    inverse rotation.

    Args:
        q: [batch, sequence, q_heads, head_dim]; float32, float16 or bfloat16 (float64 runs on the
            reference).
        k: [batch, sequence, k_heads, head_dim] in the dtype of q, or None.
        cos, sin: [num_positions, rotary_dim / 2] float32; they receive no gradient.
        position_ids: [batch, sequence] int64, or None for 0, 1, 2, ...
        interleaved: the pairing of dimensions, see above.
        rotary_offset: the first rotated dimension.

    Returns:
        The rotated q and k, shaped and typed like the inputs; None for k = None.

    Raises:
        TypeError, ValueError: a dtype or shape other than above.
        IndexError: a position is outside [0, num_positions), on the CPU. The CUDA kernel writes NaN
            for that token instead, which needs no synchronisation with the host.
    """
    _check(q, k, cos, sin, position_ids, rotary_offset)
    function = implementation(_IMPLEMENTATIONS, q)
    return function(q, k, cos, sin, position_ids, interleaved, rotary_offset)


def _check(
    q: paddle.Tensor,
    k: paddle.Tensor | None,
    cos: paddle.Tensor,
    sin: paddle.Tensor,
    position_ids: paddle.Tensor | None,
    rotary_offset: int,
) -> None:
    op = "rotary_embedding"
    check_dtype(op, "q", q, FLOATING)
    check_shape(op, "q", q, ["batch", "sequence", "q_heads", "head_dim"])
    batch, sequence, _, head_dim = q.shape
    if k is not None:
        check_dtype(op, "k", k, (q.dtype,))
        check_shape(op, "k", k, [batch, sequence, "k_heads", head_dim])
    for name, table in (("cos", cos), ("sin", sin)):
        check_dtype(op, name, table, (paddle.float32,))
        check_shape(op, name, table, ["num_positions", "rotary_dim / 2"])
    check_shape(op, "sin", sin, cos.shape)
    rotary_dim = 2 * cos.shape[1]
    if rotary_offset < 0 or rotary_offset + rotary_dim > head_dim:
        raise ValueError(
            f"{op}: cos, sin and rotary_offset select the dimensions [{rotary_offset}, "
            f"{rotary_offset + rotary_dim}), but head_dim is {head_dim}"
        )
    if position_ids is not None:
        check_dtype(op, "position_ids", position_ids, (paddle.int64,))
        check_shape(op, "position_ids", position_ids, [batch, sequence])
    elif sequence > cos.shape[0]:
        raise ValueError(
            f"{op}: the sequence has {sequence} tokens, but cos and sin hold only "
            f"{cos.shape[0]} positions"
        )


def rotary_embedding_reference(
    q: paddle.Tensor,
    k: paddle.Tensor | None,
    cos: paddle.Tensor,
    sin: paddle.Tensor,
    position_ids: paddle.Tensor | None = None,
    interleaved: bool = False,
    rotary_offset: int = 0,
) -> _Result:
    """``rotary_embedding`` composed of Paddle primitives."""
    dtype = compute_dtype(q)
    batch, sequence = q.shape[:2]
    if position_ids is None:
        tables = [table[:sequence].unsqueeze(0) for table in (cos, sin)]
    else:
        _check_positions(position_ids, cos.shape[0])
        flat = position_ids.flatten()
        tables = [paddle.gather(table, flat).reshape([batch, sequence, -1]) for table in (cos, sin)]
    wide_cos, wide_sin = (table.astype(dtype).detach().unsqueeze(2) for table in tables)

    def rotate(x: paddle.Tensor) -> paddle.Tensor:
        wide = x.astype(dtype)
        turned = _rotate_reference(wide, wide_cos, wide_sin, interleaved, rotary_offset)
        return turned.astype(x.dtype)

    return rotate(q), None if k is None else rotate(k)


def _rotate_reference(
    x: paddle.Tensor,
    cos: paddle.Tensor,
    sin: paddle.Tensor,
    interleaved: bool,
    rotary_offset: int,
) -> paddle.Tensor:
    half = cos.shape[-1]
    end = rotary_offset + 2 * half
    before, rotated, after = x[..., :rotary_offset], x[..., rotary_offset:end], x[..., end:]
    if interleaved:
        pairs = rotated.reshape([*rotated.shape[:-1], half, 2])
        a, b = pairs[..., 0], pairs[..., 1]
    else:
        a, b = rotated[..., :half], rotated[..., half:]
    new = [a * cos - b * sin, b * cos + a * sin]
    joined = paddle.stack(new, axis=-1).flatten(-2) if interleaved else paddle.concat(new, axis=-1)
    return paddle.concat([before, joined, after], axis=-1)


def _check_positions(position_ids: paddle.Tensor, num_positions: int) -> None:
    outside = (position_ids < 0) | (position_ids >= num_positions)
    if bool(outside.any()):
        first = position_ids.masked_select(outside)[0].item()
        raise IndexError(
            f"rotary_embedding: position {first} is outside the {num_positions} positions of cos "
            "and sin"
        )


def _rotary_embedding_compiled(
    q: paddle.Tensor,
    k: paddle.Tensor | None,
    cos: paddle.Tensor,
    sin: paddle.Tensor,
    position_ids: paddle.Tensor | None,
    interleaved: bool,
    rotary_offset: int,
) -> _Result:
    # A custom operator always has all outputs. Without k it rotates keys with 0 heads.
    keys = paddle.empty([*q.shape[:2], 0, q.shape[3]], dtype=q.dtype) if k is None else k
    tensors = [q, keys, cos, sin, position_ids]
    q_out, k_out = run_compiled("pypkg_rotary_embedding", tensors, interleaved, rotary_offset)
    return q_out, None if k is None else k_out


_IMPLEMENTATIONS = {
    "compiled": _rotary_embedding_compiled,
    "triton": triton_operators.rotary_embedding,
    "reference": rotary_embedding_reference,
}
