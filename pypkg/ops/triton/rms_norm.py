"""Root-mean-square normalisation: the contract of rms_norm.h in Triton."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .launch import launch, multiprocessors, tile, warps

# Rows are held in registers, up to 64 elements per thread.
MAX_COLS = 65536

_TILE = 4096  # elements of a tile of several short rows
_REDUCED_COLS, _REDUCED_ROWS = 32, 64


@triton.jit
def forward_kernel(
    x, weight, y, rstd, residual, residual_out, rows, cols, epsilon,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, COLS)
    at = row[:, None] * cols + col[None, :]
    inside = (row < rows)[:, None] & (col < cols)[None, :]
    h = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if residual is not None:
        h += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
        rounded = h.to(residual_out.dtype.element_ty)
        tl.store(residual_out + at, rounded, mask=inside)
        h = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(h * h, 1) / cols + epsilon)
    tl.store(rstd + row, scale, mask=row < rows)
    w = tl.load(weight + col, mask=col < cols, other=0.0).to(tl.float32)
    out = h * scale[:, None] * w[None, :]
    tl.store(y + at, out.to(y.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(
    dy, h, weight, rstd, dx, partial, dh, dresidual, y, rows, cols,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Each program loops over tiles of rows and writes one row of partial sums of dweight."""
    slot = tl.program_id(0)
    col = tl.arange(0, COLS)
    dweight = tl.zeros([ROWS, COLS], tl.float32)
    for first in range(slot * ROWS, rows, tl.num_programs(0) * ROWS):
        row = first + tl.arange(0, ROWS)
        at = row.to(tl.int64)[:, None] * cols + col[None, :]
        inside = (row < rows)[:, None] & (col < cols)[None, :]
        g = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(h + at, mask=inside, other=0.0).to(tl.float32)
        scale = tl.load(rstd + row, mask=row < rows, other=0.0)[:, None]
        dweight += g * x * scale
        # The weight is read from cache for every tile, because registers limit long rows.
        w = tl.load(weight + col, mask=col < cols, other=0.0).to(tl.float32)
        g *= w[None, :]
        projection = tl.sum(g * x, 1)[:, None] / cols * scale * scale
        if COLS > 8192:  # too long for registers beside dweight; the cache holds it
            tl.debug_barrier()  # without it the compiler keeps the row in registers
            g = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32) * w[None, :]
            x = tl.load(h + at, mask=inside, other=0.0).to(tl.float32)
        out = scale * (g - x * projection)
        if dh is not None:
            out += tl.load(dh + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx + at, out.to(dx.dtype.element_ty), mask=inside)
        if dresidual is not None:
            tl.store(dresidual + at, out.to(dx.dtype.element_ty), mask=inside)
        if y is not None:
            again = x * scale * w[None, :]
            tl.store(y + at, again.to(y.dtype.element_ty), mask=inside)
    sums = tl.sum(dweight, 0)
    tl.store(partial + slot.to(tl.int64) * cols + col, sums, mask=col < cols)


@triton.jit
def reduce_kernel(partial, dweight, slots, cols, ROWS: tl.constexpr, COLS: tl.constexpr):
    """dweight = sum of the partial rows, in a fixed order."""
    col = tl.program_id(0) * COLS + tl.arange(0, COLS)
    total = tl.zeros([ROWS, COLS], tl.float32)
    for first in range(0, slots, ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row < slots)[:, None] & (col < cols)[None, :]
        at = row.to(tl.int64)[:, None] * cols + col[None, :]
        total += tl.load(partial + at, mask=inside, other=0.0)
    tl.store(dweight + col, tl.sum(total, 0).to(dweight.dtype.element_ty), mask=col < cols)


def rms_norm_forward(
    x: Any,
    weight: Any,
    y: Any,
    rstd: Any,
    residual: Any = None,
    residual_out: Any = None,
    *,
    epsilon: float = 1e-6,
    stream: int | None = None,
) -> None:
    """See ``pypkg._native.rms_norm_forward``.

    Raises:
        ValueError: rows have more than MAX_COLS elements.
    """
    rows, cols = x.shape
    height, width = _tile(cols)
    launch(
        forward_kernel, (triton.cdiv(rows, height),),
        *(x, weight, y, rstd, residual, residual_out, rows, cols, epsilon),
        ROWS=height, COLS=width, num_warps=warps(height * width, 16), stream=stream,
    )  # fmt: skip


def rms_norm_backward_workspace(h: Any) -> int:
    """Number of float32 elements of the workspace that ``rms_norm_backward`` needs."""
    return _slots(*h.shape) * h.shape[1]


def rms_norm_backward(
    dy: Any,
    h: Any,
    weight: Any,
    rstd: Any,
    dx: Any,
    dweight: Any,
    workspace: Any,
    dh: Any = None,
    dresidual: Any = None,
    y: Any = None,
    *,
    stream: int | None = None,
) -> None:
    """See ``pypkg._native.rms_norm_backward``."""
    rows, cols = h.shape
    height, width = _tile(cols)
    slots = _slots(rows, cols)
    launch(
        backward_kernel, (slots,),
        *(dy, h, weight, rstd, dx, workspace, dh, dresidual, y, rows, cols),
        ROWS=height, COLS=width, num_warps=min(16, warps(height * width, 16)), stream=stream,
    )  # fmt: skip
    launch(
        reduce_kernel, (triton.cdiv(cols, _REDUCED_COLS),),
        *(workspace, dweight, slots, cols),
        ROWS=_REDUCED_ROWS, COLS=_REDUCED_COLS, num_warps=4, stream=stream,
    )  # fmt: skip


def _tile(cols: int) -> tuple[int, int]:
    if cols > MAX_COLS:
        raise ValueError(
            f"rms_norm: the Triton kernels take rows of up to {MAX_COLS} elements, got {cols}"
        )
    return tile(cols, _TILE)


def _slots(rows: int, cols: int) -> int:
    """Number of programs of the backward kernel. It depends only on the shape and the device, so
    that every call sums in the same order."""
    height, width = _tile(cols)
    per_multiprocessor = 1 if width > 4096 else 2  # as many as run at the same time
    return min(triton.cdiv(rows, height), per_multiprocessor * multiprocessors())
