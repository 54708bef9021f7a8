"""Gated linear units: activation(gate) * up, for SwiGLU and GeGLU."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import paddle
import paddle.nn.functional as F

from pypkg.ops.dispatch import triton_operators
from pypkg.ops.dispatch.checks import FLOATING, check_dtype, check_shape, compute_dtype
from pypkg.ops.dispatch.library import implementation, run_compiled

# Values of pypkg::Activation in csrc/kernels/gated_activation/gated_activation.h.
ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2}


@paddle.jit.not_to_static
def swiglu(gate: paddle.Tensor, up: paddle.Tensor | None = None) -> paddle.Tensor:
    """silu(gate) * up, with silu(x) = x * sigmoid(x) (Shazeer, 2020).

    Args:
        gate: [..., intermediate]; if ``up`` is None, gate and up packed in this order,
            [..., 2 * intermediate]. float32, float16 or bfloat16 (float64 runs on the reference).
        up: shaped and typed like gate, or None. Under ``paddle.amp`` different dtypes are cast to
            the dtype of autocasting.

    Returns:
        [..., intermediate] in the dtype of gate; computed in float32.

    Raises:
        TypeError, ValueError: a dtype or shape other than above.
    """
    return _gated_activation("swiglu", gate, up, "silu", gate_first=True)


@paddle.jit.not_to_static
def geglu(
    gate: paddle.Tensor,
    up: paddle.Tensor | None = None,
    approximate: str = "none",
    gate_first: bool = True,
) -> paddle.Tensor:
    """gelu(gate) * up (Shazeer, 2020).

    Args:
        gate, up: as for ``swiglu``.
        approximate: "none" for gelu(x) = x * (1 + erf(x / sqrt(2))) / 2, or "tanh" for
            x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))) / 2 (Hendrycks and Gimpel, 2016).
        gate_first: whether the gate is the first half of a packed input; without effect if ``up``
            is given.

    Returns:
        [..., intermediate] in the dtype of gate; computed in float32.

    Raises:
        TypeError, ValueError: a dtype, shape or ``approximate`` other than above.
    """
    if approximate not in ("none", "tanh"):
        raise ValueError(f"geglu: approximate must be 'none' or 'tanh', got {approximate!r}")
    activation = "gelu" if approximate == "none" else "gelu_tanh"
    return _gated_activation("geglu", gate, up, activation, gate_first)


# The functions of packed gate and up, by the name of the activation.
GATED: dict[str, Callable[[paddle.Tensor], paddle.Tensor]] = {
    "silu": swiglu,
    "gelu": geglu,
    "gelu_tanh": partial(geglu, approximate="tanh"),
}


def _gated_activation(
    op: str, gate: paddle.Tensor, up: paddle.Tensor | None, activation: str, gate_first: bool
) -> paddle.Tensor:
    check_dtype(op, "gate", gate, FLOATING)
    if up is None:
        if len(gate.shape) == 0 or gate.shape[-1] % 2 != 0:
            raise ValueError(
                f"{op}: packed gate and up must have an even last dimension, got shape "
                f"{list(gate.shape)}"
            )
    else:
        check_dtype(op, "up", up, FLOATING)
        if up.dtype != gate.dtype and paddle.amp.is_autocast_enabled():
            target = paddle.amp.get_autocast_gpu_dtype()
            gate, up = gate.astype(target), up.astype(target)
        check_dtype(op, "up", up, (gate.dtype,))
        check_shape(op, "up", up, gate.shape)
    return implementation(_IMPLEMENTATIONS, gate)(gate, up, activation, gate_first)


def gated_activation_reference(
    gate: paddle.Tensor,
    up: paddle.Tensor | None = None,
    activation: str = "silu",
    gate_first: bool = True,
) -> paddle.Tensor:
    """``swiglu`` ("silu") and ``geglu`` ("gelu", "gelu_tanh") composed of Paddle primitives."""
    if up is None:
        first, second = paddle.chunk(gate, 2, axis=-1)
        gate, up = (first, second) if gate_first else (second, first)
    dtype = compute_dtype(gate)
    wide = gate.astype(dtype)
    if activation == "silu":
        active = wide * F.sigmoid(wide)  # F.silu has a NaN gradient far below zero
    else:
        active = F.gelu(wide, approximate=activation == "gelu_tanh")
    return (active * up.astype(dtype)).astype(gate.dtype)


def _gated_activation_compiled(
    gate: paddle.Tensor, up: paddle.Tensor | None, activation: str, gate_first: bool
) -> paddle.Tensor:
    number = ACTIVATIONS[activation]
    if up is None:
        return run_compiled("pypkg_packed_gated_activation", [gate], number, gate_first)[0]
    return run_compiled("pypkg_gated_activation", [gate, up], number)[0]


_IMPLEMENTATIONS = {
    "compiled": _gated_activation_compiled,
    "triton": triton_operators.gated_activation,
    "reference": gated_activation_reference,
}
