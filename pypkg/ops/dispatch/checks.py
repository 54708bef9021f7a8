"""Argument checks shared by the public operators; they run before any backend is chosen."""

from __future__ import annotations

from collections.abc import Sequence

import paddle

FLOATING = (paddle.float32, paddle.float16, paddle.bfloat16, paddle.float64)


def dtype_name(dtype: paddle.dtype) -> str:
    """The name of a dtype, such as "float32"."""
    return str(dtype).removeprefix("paddle.")


def has_dtype(tensor: paddle.Tensor, dtype: paddle.dtype) -> bool:
    """Whether ``tensor`` is a paddle.Tensor of ``dtype``.

    ``in`` compares identity first, because each dtype is one object. If it is equal, that takes a
    fifth of the time of ``==``, which calls into Paddle.
    """
    return isinstance(tensor, paddle.Tensor) and tensor.dtype in (dtype,)


def check_dtype(op: str, name: str, tensor: paddle.Tensor, allowed: Sequence[paddle.dtype]) -> None:
    """Raises TypeError unless ``tensor`` is a paddle.Tensor of one of the ``allowed`` dtypes."""
    if not isinstance(tensor, paddle.Tensor) and not hasattr(tensor, "stop_gradient"):
        raise TypeError(f"{op}: {name} must be a paddle.Tensor, got {type(tensor).__name__}")
    if tensor.dtype not in allowed:
        expected = " or ".join(dtype_name(dtype) for dtype in allowed)
        raise TypeError(f"{op}: {name} must be {expected}, got {dtype_name(tensor.dtype)}")


def check_shape(op: str, name: str, tensor: paddle.Tensor, expected: Sequence[int | str]) -> None:
    """Raises ValueError unless the shape is ``expected``; a string names a free dimension."""
    shape = list(tensor.shape)
    if shape == expected:  # the common case, and the fastest to decide
        return
    matches = len(shape) == len(expected) and all(
        isinstance(want, str) or want == have for want, have in zip(expected, shape)
    )
    if not matches:
        wanted = ", ".join(str(want) for want in expected)
        raise ValueError(f"{op}: {name} must have shape [{wanted}], got {shape}")


def compute_dtype(tensor: paddle.Tensor) -> paddle.dtype:
    """The dtype in which a reference computes: float64 for float64, else float32."""
    return paddle.float64 if tensor.dtype == paddle.float64 else paddle.float32
