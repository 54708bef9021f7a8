"""Which blocks of a mask run: every mask on every block of short sequences."""

from __future__ import annotations

from itertools import combinations_with_replacement, product

import numpy as np
import pytest
import references as ref

from pypkg import _native

LONGEST = 4


def ranges(begin, end):
    return [(a, b) for a in range(begin, end) for b in range(a + 1, end + 1)]


def all_documents(seq):
    """No documents, and every non-decreasing labelling by first positions."""
    yield None
    for starts in combinations_with_replacement(range(seq), seq):
        if all(s == p or (p and s == starts[p - 1]) for p, s in enumerate(starts)):
            yield np.array(starts, np.int32)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("seq_q, seq_k", list(product(range(1, LONGEST + 1), repeat=2)))
def test_every_block(seq_q, seq_k, causal):
    first = seq_k - seq_q
    for window, prefix, documents in product(
        range(seq_k + 1),
        [None, *range(seq_k + 1)],
        all_documents(seq_k) if seq_q == seq_k else [None],
    ):
        visible = ref.visible(
            1,
            seq_q,
            seq_k,
            causal,
            window,
            None if prefix is None else np.array([prefix]),
            None if documents is None else documents[None],
        )[0]
        for (i0, i1), (j0, j1) in product(ranges(first, seq_k), ranges(0, seq_k)):
            block = visible[i0 - first : i1 - first, j0:j1]
            expected = "full" if block.all() else "partial" if block.any() else "skip"
            state = _native.key_block_state(
                i0, i1, j0, j1, documents,
                seq_k=seq_k, causal=causal, window=window, prefix_length=prefix,
            )  # fmt: skip
            assert state == expected, (i0, i1, j0, j1, window, prefix, documents)


@pytest.mark.parametrize("block", [(2, 2, 0, 1), (0, 1, 0, 9), (0, 9, 0, 1), (0, 1, -1, 1)])
def test_block_outside_the_sequence(block):
    with pytest.raises(ValueError, match="inside the sequence"):
        _native.key_block_state(*block, seq_k=8)
