"""Attention masks, described by parameters instead of [sequence, sequence] matrices."""

from __future__ import annotations

from dataclasses import dataclass

import paddle

from pypkg.ops.dispatch.checks import check_dtype, check_shape


@dataclass(frozen=True, eq=False)
class AttentionMask:
    """Which keys each query attends to.

    Let i be the position of a query and j that of a key. Queries are aligned to the last keys:
    query row r has position r + (seq_k - seq_q), key row r has position r. Operators on blocks of a
    sequence take both positions as arguments. A key is visible if all of these hold:

    - causal: j <= i, or j < prefix_lengths[b] if those are given;
    - window: i - j < window (the query's own key and the window - 1 keys before it);
    - document_starts: document_starts[b, i] == document_starts[b, j].

    ``alibi_slopes`` do not hide keys; they add alibi_slopes[h] * (j - i) to the scaled score (Press
    et al., 2022).

    Args:
        causal: whether keys after the query are hidden.
        window: at least 1, or None for no window.
        prefix_lengths: [batch] int32: number of leading keys of each row that every query of the
            row sees (prefix language models). Needs ``causal``.
        document_starts: [batch, seq_k] int32: position of the first token of each token's
            document, non-decreasing (packed documents). Needs seq_q == seq_k. Operators on blocks
            take [batch, tokens], with the documents of the whole sequence.
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
                raise ValueError(
                    f"{op}: prefix_lengths need causal=True; without it no key is hidden"
                )
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
        self._check_rows(batch, heads_q, seq_k)
        if self.document_starts is not None and seq_q != seq_k:
            raise ValueError(
                f"AttentionMask: document_starts need as many queries as keys, got {seq_q} queries "
                f"and {seq_k} keys"
            )

    def check_block(self, batch: int, heads_q: int, end: int) -> None:
        """Raises ValueError unless the tensors fit blocks that end at position ``end`` at most."""
        self._check_rows(batch, heads_q, "tokens")
        if self.document_starts is not None and self.document_starts.shape[1] < end:
            raise ValueError(
                f"AttentionMask: document_starts must cover the {end} tokens up to the end of the "
                f"blocks, got {self.document_starts.shape[1]}"
            )

    def _check_rows(self, batch: int, heads_q: int, tokens: int | str) -> None:
        op = "AttentionMask"
        if self.prefix_lengths is not None:
            check_shape(op, "prefix_lengths", self.prefix_lengths, [batch])
        if self.document_starts is not None:
            check_shape(op, "document_starts", self.document_starts, [batch, tokens])
        if self.alibi_slopes is not None:
            check_shape(op, "alibi_slopes", self.alibi_slopes, [heads_q])

    def visible(
        self, seq_q: int, seq_k: int, query_offset: int | None = None, key_offset: int = 0
    ) -> paddle.Tensor:
        """The mask as a matrix, for the reference: bool [batch or 1, 1, seq_q, seq_k].

        The offsets are positions of the first query and the first key. None: queries are aligned
        to the last keys.
        """
        first = key_offset + seq_k - seq_q if query_offset is None else query_offset
        i = paddle.arange(first, first + seq_q).reshape([1, 1, seq_q, 1])
        j = paddle.arange(key_offset, key_offset + seq_k).reshape([1, 1, 1, seq_k])
        seen = paddle.ones([1, 1, seq_q, seq_k], dtype="bool")
        if self.causal:
            seen = j <= i
            if self.prefix_lengths is not None:
                seen = seen | (j < self.prefix_lengths.astype("int64").reshape([-1, 1, 1, 1]))
        if self.window is not None:
            seen = seen & (i - j < self.window)
        if self.document_starts is not None:
            of_queries = self.document_starts[:, first : first + seq_q]
            of_keys = self.document_starts[:, key_offset : key_offset + seq_k]
            seen = seen & (of_queries.unsqueeze([1, 3]) == of_keys.unsqueeze([1, 2]))
        return seen
