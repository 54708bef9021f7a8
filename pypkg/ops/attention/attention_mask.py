"""Attention masks as descriptions instead of [sequence, sequence] matrices."""

from __future__ import annotations

from dataclasses import dataclass

import paddle

from pypkg.ops.dispatch.checks import check_dtype, check_shape


@dataclass(frozen=True, eq=False)
class AttentionMask:
    """Which keys each query attends to.

    Let i be the position of a query and j that of a key. Queries are aligned to the last keys:
    query row r has position r + (seq_k - seq_q). The key is visible if all of these hold:

    - causal: j <= i, or j < prefix_lengths[b] when those are given;
    - window: i - j < window (the query itself and the window - 1 keys before it);
    - document_starts: document_starts[b, i] == document_starts[b, j].

    ``alibi_slopes`` hide no key; they add alibi_slopes[h] * (j - i) to the scaled score (Press et
    al., 2022).

    Args:
        causal: whether keys after the query are hidden.
        window: at least 1, or None for no window.
        prefix_lengths: [batch] int32: number of first keys of each row that every query of the row
            sees (prefix language models). Needs ``causal``.
        document_starts: [batch, seq_k] int32: position of the first token of each token's
            document, non-decreasing (packed documents). Needs seq_q == seq_k.
        alibi_slopes: [heads_q] float32.

    Raises:
        TypeError, ValueError: a dtype, shape or value other than above.
    """

    causal: bool = True
    window: int | None = None
    prefix_lengths: paddle.Tensor | None = None
    document_starts: paddle.Tensor | None = None
    alibi_slopes: paddle.Tensor | None = None

    def __post_init__(self) -> None:
        op = "AttentionMask"
        if self.window is not None and self.window < 1:
            raise ValueError(f"{op}: window must be at least 1 or None, got {self.window}")
        if self.prefix_lengths is not None:
            if not self.causal:
                raise ValueError(f"{op}: prefix_lengths need causal=True; without it all is seen")
            check_dtype(op, "prefix_lengths", self.prefix_lengths, (paddle.int32,))
            check_shape(op, "prefix_lengths", self.prefix_lengths, ["batch"])
        if self.document_starts is not None:
            check_dtype(op, "document_starts", self.document_starts, (paddle.int32,))
            check_shape(op, "document_starts", self.document_starts, ["batch", "seq_k"])
        if self.alibi_slopes is not None:
            check_dtype(op, "alibi_slopes", self.alibi_slopes, (paddle.float32,))
            check_shape(op, "alibi_slopes", self.alibi_slopes, ["heads_q"])

    def check(self, batch: int, seq_q: int, seq_k: int, heads_q: int) -> None:
        """Raises ValueError unless the tensors fit attention of these sizes."""
        op = "AttentionMask"
        if self.prefix_lengths is not None:
            check_shape(op, "prefix_lengths", self.prefix_lengths, [batch])
        if self.document_starts is not None:
            check_shape(op, "document_starts", self.document_starts, [batch, seq_k])
            if seq_q != seq_k:
                raise ValueError(
                    f"{op}: document_starts need as many queries as keys, got {seq_q} queries and "
                    f"{seq_k} keys"
                )
        if self.alibi_slopes is not None:
            check_shape(op, "alibi_slopes", self.alibi_slopes, [heads_q])

    def visible(self, seq_q: int, seq_k: int) -> paddle.Tensor:
        """The mask as a matrix, for the reference: bool [batch or 1, 1, seq_q, seq_k]."""
        i = paddle.arange(seq_k - seq_q, seq_k).reshape([1, 1, seq_q, 1])
        j = paddle.arange(seq_k).reshape([1, 1, 1, seq_k])
        seen = paddle.ones([1, 1, seq_q, seq_k], dtype="bool")
        if self.causal:
            seen = j <= i
            if self.prefix_lengths is not None:
                seen = seen | (j < self.prefix_lengths.astype("int64").reshape([-1, 1, 1, 1]))
        if self.window is not None:
            seen = seen & (i - j < self.window)
        if self.document_starts is not None:
            starts = self.document_starts
            seen = seen & (starts.unsqueeze([1, 3]) == starts.unsqueeze([1, 2]))
        return seen
