"""Gated linear units: the contract of gated_activation.h in Triton."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .launch import launch, tile, warps

_TILE = 2048
_MAX_COLS = 2048  # columns of a tile; longer rows take several tiles


@triton.jit
def _tanh(x):
    # exp(2x) could overflow; exp(-2|x|) is at most 1.
    shrunk = tl.exp(-2.0 * tl.abs(x))
    size = (1.0 - shrunk) / (1.0 + shrunk)
    return tl.where(x < 0, -size, size)


@triton.jit
def _activate(x, activation: tl.constexpr):
    """The activation of x and its derivative."""
    if activation == "silu":
        sigmoid = 1.0 / (1.0 + tl.exp(-x))
        value = x * sigmoid
        derivative = sigmoid * (1.0 + x * (1.0 - sigmoid))
    elif activation == "gelu":
        cdf = 0.5 * (1.0 + tl.erf(x * 0.7071067811865475))
        value = x * cdf
        derivative = cdf + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    else:
        t = _tanh(0.7978845608028654 * (x + 0.044715 * x * x * x))
        slope = 0.7978845608028654 * (1.0 + 0.134145 * x * x)
        value = 0.5 * x * (1.0 + t)
        derivative = 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * slope
    return value, derivative


@triton.jit
def forward_kernel(
    gate, up, out, rows, cols, gate_stride, up_stride,
    activation: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    col = (tl.program_id(1) * COLS + tl.arange(0, COLS))[None, :]
    inside = (row < rows) & (col < cols)
    g = tl.load(gate + row * gate_stride + col, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + col, mask=inside, other=0.0).to(tl.float32)
    value, _ = _activate(g, activation)
    tl.store(out + row * cols + col, (value * u).to(out.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(
    gate, up, dout, dgate, dup, out, rows, cols, gate_stride, up_stride,
    activation: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    col = (tl.program_id(1) * COLS + tl.arange(0, COLS))[None, :]
    inside = (row < rows) & (col < cols)
    gate_at, up_at = row * gate_stride + col, row * up_stride + col
    g = tl.load(gate + gate_at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + up_at, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(dout + row * cols + col, mask=inside, other=0.0).to(tl.float32)
    value, derivative = _activate(g, activation)
    tl.debug_barrier()  # dup may be the memory of up: all threads read up before one writes dup
    if out is not None:
        tl.store(out + row * cols + col, (value * u).to(out.dtype.element_ty), mask=inside)
    tl.store(dgate + gate_at, (d * u * derivative).to(dgate.dtype.element_ty), mask=inside)
    tl.store(dup + up_at, (d * value).to(dup.dtype.element_ty), mask=inside)


def gated_activation_forward(
    gate: Any, up: Any, out: Any, activation: str = "silu", *, stream: int | None = None
) -> None:
    """See ``pypkg._native.gated_activation_forward``."""
    _launch_over_matrix(forward_kernel, gate, up, [gate, up, out], activation, stream)


def gated_activation_backward(
    gate: Any,
    up: Any,
    dout: Any,
    dgate: Any,
    dup: Any,
    activation: str = "silu",
    out: Any = None,
    *,
    stream: int | None = None,
) -> None:
    """See ``pypkg._native.gated_activation_backward``."""
    tensors = [gate, up, dout, dgate, dup, out]
    _launch_over_matrix(backward_kernel, gate, up, tensors, activation, stream)


def _launch_over_matrix(
    kernel: Any, gate: Any, up: Any, tensors: list[Any], activation: str, stream: int | None
) -> None:
    rows, cols = gate.shape
    height, width = tile(min(cols, _MAX_COLS), _TILE)
    launch(
        kernel, (triton.cdiv(rows, height), triton.cdiv(cols, width)),
        *(*tensors, rows, cols, gate.stride(0), up.stride(0)),
        activation=activation, ROWS=height, COLS=width, num_warps=warps(height * width, 8),
        stream=stream,
    )  # fmt: skip
