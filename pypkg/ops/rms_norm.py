"""Root-mean-square normalisation with an optional fused residual add."""

from __future__ import annotations

from typing import TypeAlias, overload

import paddle

from pypkg.ops.dispatch import triton_operators
from pypkg.ops.dispatch.checks import FLOATING, check_dtype, check_shape, compute_dtype, has_dtype
from pypkg.ops.dispatch.library import implementation, run_compiled

_Result: TypeAlias = paddle.Tensor | tuple[paddle.Tensor, paddle.Tensor]


@overload
def rms_norm(
    x: paddle.Tensor, weight: paddle.Tensor, epsilon: float = ..., residual: None = ...
) -> paddle.Tensor: ...


@overload
def rms_norm(
    x: paddle.Tensor, weight: paddle.Tensor, epsilon: float, residual: paddle.Tensor
) -> tuple[paddle.Tensor, paddle.Tensor]: ...


@paddle.jit.not_to_static
def rms_norm(
    x: paddle.Tensor,
    weight: paddle.Tensor,
    epsilon: float = 1e-6,
    residual: paddle.Tensor | None = None,
) -> _Result:
    """Normalises the last dimension by its root mean square (Zhang and Sennrich, 2019).

        h = x + residual          (h = x without a residual)
        y = h / sqrt(mean(h^2) + epsilon) * weight

    The arithmetic is float32 for every dtype. h is rounded to the dtype of x before it is
    normalised, so that y is a function of the returned h.

    Args:
        x: [..., hidden]; float32, float16 or bfloat16 (float64 runs on the reference).
        weight: [hidden], in the dtype of x or float32.
        epsilon: added to the mean square.
        residual: [..., hidden] like x, in the dtype of x; or None. Under ``paddle.amp`` it may
            have another dtype; both are then cast to float32.

    Returns:
        y, shaped and typed like x; with a residual the pair (y, h), both shaped and typed like x.

    Raises:
        TypeError, ValueError: a dtype or shape other than above.
    """
    check_dtype("rms_norm", "x", x, FLOATING)
    if residual is not None:
        if not has_dtype(residual, x.dtype):
            check_dtype("rms_norm", "residual", residual, FLOATING)
            if paddle.amp.is_autocast_enabled():
                x, residual = x.astype("float32"), residual.astype("float32")
            check_dtype("rms_norm", "residual", residual, (x.dtype,))
        check_shape("rms_norm", "residual", residual, x.shape)
    if len(x.shape) == 0:
        raise ValueError("rms_norm: x must have at least one dimension, got shape []")
    if not has_dtype(weight, x.dtype):
        allowed = (x.dtype,) if x.dtype == paddle.float64 else (x.dtype, paddle.float32)
        check_dtype("rms_norm", "weight", weight, allowed)
    check_shape("rms_norm", "weight", weight, [x.shape[-1]])
    return implementation(_IMPLEMENTATIONS, x)(x, weight, epsilon, residual)


def rms_norm_reference(
    x: paddle.Tensor,
    weight: paddle.Tensor,
    epsilon: float = 1e-6,
    residual: paddle.Tensor | None = None,
) -> _Result:
    """``rms_norm`` composed of Paddle primitives."""
    dtype = compute_dtype(x)
    h = x if residual is None else (x.astype(dtype) + residual.astype(dtype)).astype(x.dtype)
    wide = h.astype(dtype)
    rstd = paddle.rsqrt(wide.square().mean(axis=-1, keepdim=True) + epsilon)
    y = (wide * rstd * weight.astype(dtype)).astype(x.dtype)
    return y if residual is None else (y, h)


def _rms_norm_compiled(
    x: paddle.Tensor, weight: paddle.Tensor, epsilon: float, residual: paddle.Tensor | None
) -> _Result:
    if residual is None:
        return run_compiled("pypkg_rms_norm", [x, weight], epsilon)[0]
    y, h, _ = run_compiled("pypkg_add_rms_norm", [x, residual, weight], epsilon)
    return y, h


_IMPLEMENTATIONS = {
    "compiled": _rms_norm_compiled,
    "triton": triton_operators.rms_norm,
    "reference": rms_norm_reference,
}
