"""Softmax cross entropy: the contract of cross_entropy.h in Triton."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .launch import launch, warps

LOG2_E = tl.constexpr(1.4426950408889634)

_FORWARD_GROUPS = 1024  # groups of neighbouring elements that a program takes at a time
_BACKWARD_COLS = 4096
_VECTOR_BYTES = 16


@triton.jit
def _finite(x):
    """x, or 0 for -inf: a subtrahend in exponents, where -inf - (-inf) would be NaN."""
    return tl.where(x == -float("inf"), 0.0, x)


@triton.jit
def forward_kernel(
    logits, labels, loss, lse, row_max, row_sum, target, cols, vocab_start, vocab_size,
    ignore_index, GROUPS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """One program per row, one pass. A thread loads SIZE neighbouring elements as a vector and
    keeps one running maximum and sum for them, so that the loop needs no exchange between threads.
    """
    row = tl.program_id(0).to(tl.int64)
    x_row = logits + row * cols
    within = tl.arange(0, GROUPS)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    group_max = tl.full([GROUPS], -float("inf"), tl.float32)
    group_sum = tl.zeros([GROUPS], tl.float32)
    for start in range(0, cols, GROUPS * SIZE):
        col = start + within
        x = tl.load(x_row + col, mask=col < cols, other=-float("inf")).to(tl.float32)
        new_max = tl.maximum(group_max, tl.max(x, 1))
        base = _finite(new_max)
        group_sum *= tl.exp2((group_max - base) * LOG2_E)
        group_sum += tl.sum(tl.exp2((x - base[:, None]) * LOG2_E), 1)
        group_max = new_max
    largest = tl.max(group_max, 0)
    total = tl.sum(group_sum * tl.exp2((group_max - _finite(largest)) * LOG2_E), 0)
    label = tl.load(labels + row)
    ignored = label == ignore_index
    column = label - vocab_start
    here = (column >= 0) & (column < cols) & (label != ignore_index)
    label_logit = tl.load(x_row + column, mask=here, other=0.0).to(tl.float32)
    outside = (label < 0) | (label >= vocab_size)
    total = tl.where(outside & (label != ignore_index), float("nan"), total)
    log_sum = largest + tl.log(total)
    if loss is not None:
        tl.store(loss + row, tl.where(ignored, 0.0, log_sum - label_logit))
    if lse is not None:
        tl.store(lse + row, log_sum)
    if row_max is not None:
        tl.store(row_max + row, largest)
    if row_sum is not None:
        tl.store(row_sum + row, total)
    if target is not None:
        tl.store(target + row, label_logit)


@triton.jit
def backward_kernel(
    logits, labels, lse, dloss, dlogits, cols, vocab_start, ignore_index, COLS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    label = tl.load(labels + row)
    counts = label != ignore_index
    log_sum = tl.load(lse + row)
    scale = tl.load(dloss + row)
    # The logits of an ignored row are not read, because they may be NaN.
    x = tl.load(logits + row * cols + col, mask=(col < cols) & counts, other=0.0).to(tl.float32)
    hit = tl.where(col == label - vocab_start, 1.0, 0.0)
    gradient = (tl.exp2((x - log_sum) * LOG2_E) - hit) * scale
    gradient = tl.where(counts, gradient, 0.0)
    tl.store(dlogits + row * cols + col, gradient.to(dlogits.dtype.element_ty), mask=col < cols)


def cross_entropy_forward(
    logits: Any,
    labels: Any,
    loss: Any = None,
    lse: Any = None,
    row_max: Any = None,
    row_sum: Any = None,
    target: Any = None,
    *,
    vocab_start: int = 0,
    vocab_size: int = 0,
    ignore_index: int = -100,
    stream: int | None = None,
) -> None:
    """See ``pypkg._native.cross_entropy_forward``."""
    rows, cols = logits.shape
    size = _VECTOR_BYTES // (4 if str(logits.dtype).endswith("float32") else 2)
    groups = min(_FORWARD_GROUPS, triton.next_power_of_2(triton.cdiv(cols, size)))
    launch(
        forward_kernel, (rows,),
        *(logits, labels, loss, lse, row_max, row_sum, target, cols, vocab_start),
        *(vocab_size or vocab_start + cols, ignore_index),
        GROUPS=groups, SIZE=size, num_warps=warps(groups, 2), stream=stream,
    )  # fmt: skip


def cross_entropy_backward(
    logits: Any,
    labels: Any,
    lse: Any,
    dloss: Any,
    dlogits: Any,
    *,
    vocab_start: int = 0,
    ignore_index: int = -100,
    stream: int | None = None,
) -> None:
    """See ``pypkg._native.cross_entropy_backward``; dlogits may be logits."""
    rows, cols = logits.shape
    width = min(_BACKWARD_COLS, triton.next_power_of_2(cols))
    launch(
        backward_kernel, (rows, triton.cdiv(cols, width)),
        *(logits, labels, lse, dloss, dlogits, cols, vocab_start, ignore_index),
        COLS=width, num_warps=warps(width, 16), stream=stream,
    )  # fmt: skip
