"""Two implementations of attention against each other: the second opinion on each is the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import paddle

from pypkg.ops import AttentionMask

Attention = Callable[..., paddle.Tensor]
# Of the largest element. Both round probabilities and results to 16 bits, at different places.
TOLERANCE = 2.0**-6
BATCH, HEADS, HEADS_K, DOCUMENTS = 2, 8, 4, 5


def masks(sequence: int) -> Iterator[tuple[str, AttentionMask]]:
    """Those that Paddle's flash attention can express, as the models of the package use them."""
    prefix = paddle.to_tensor([sequence // 3, 0], dtype="int32")
    length = sequence // DOCUMENTS
    starts = np.minimum(np.arange(sequence) // length, DOCUMENTS - 1) * length
    documents = paddle.to_tensor(np.stack([starts, np.zeros_like(starts)]).astype("int32"))
    yield "causal", AttentionMask()
    yield "full", AttentionMask(causal=False)
    yield "window", AttentionMask(window=sequence // 4)
    yield "prefix", AttentionMask(prefix_lengths=prefix)
    yield "documents", AttentionMask(document_starts=documents)
    yield "documents, window", AttentionMask(document_starts=documents, window=sequence // 8)
    yield "prefix, documents", AttentionMask(prefix_lengths=prefix, document_starts=documents)


def compare_attention(
    first: Attention,
    second: Attention,
    sequence: int,
    head_dims: tuple[int, ...],
    dtype: str = "bfloat16",
) -> list[dict[str, Any]]:
    """Results and gradients of ``first`` and ``second`` on the device of Paddle.

    Returns:
        A row for each head_dim and mask: the largest difference of out, dq, dk and dv, relative to
        the largest element of each, and whether all are within ``TOLERANCE``. An exception is a
        row that failed, so the others are still compared.
    """
    rows: list[dict[str, Any]] = []
    for head_dim in head_dims:
        for name, mask in masks(sequence):
            row: dict[str, Any] = {"case": f"{sequence}x{head_dim} {name}, {dtype}"}
            try:
                found, expected = (
                    _run(each, mask, sequence, head_dim, dtype) for each in (first, second)
                )
            except Exception as error:
                rows.append(row | {"passed": False, "error": f"{type(error).__name__}: {error}"})
                continue
            differences = {key: _difference(found[key], expected[key]) for key in expected}
            passed = all(each <= TOLERANCE for each in differences.values())
            rows.append(row | {"passed": passed, **differences})
    return rows


def _run(
    attention: Attention, mask: AttentionMask, sequence: int, head_dim: int, dtype: str
) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(head_dim)

    def tensor(heads: int) -> paddle.Tensor:
        values = generator.standard_normal([BATCH, sequence, heads, head_dim], dtype=np.float32)
        return paddle.to_tensor(values).astype(dtype)

    inputs, dout = [tensor(heads) for heads in (HEADS, HEADS_K, HEADS_K)], tensor(HEADS)
    for each in inputs:
        each.stop_gradient = False
    out = attention(*inputs, mask)
    gradients = paddle.grad(out, inputs, dout)
    values = dict(zip(("out", "dq", "dk", "dv"), (out, *gradients), strict=True))
    return {name: value.astype("float32").numpy() for name, value in values.items()}


def _difference(found: np.ndarray, expected: np.ndarray) -> float:
    """Infinite where a value is not finite."""
    difference = np.abs(found - expected).max() / np.abs(expected).max()
    return float(difference) if np.isfinite(difference) else float("inf")
