"""How a pipeline cuts a model."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pypkg.errors import UserError
from pypkg.models.architecture.layer_split import ModelChunk, cut, layer_ranges


@given(st.integers(1, 100), st.integers(1, 20))
def test_chunks_are_consecutive_and_nearly_equal(num_layers, chunks):
    if num_layers < chunks:
        with pytest.raises(UserError, match=rf"num_hidden_layers \({num_layers}\)"):
            layer_ranges(num_layers, chunks)
        return
    ranges = layer_ranges(num_layers, chunks)
    assert [layer for chunk in ranges for layer in chunk] == list(range(num_layers))
    lengths = [len(chunk) for chunk in ranges]
    assert len(lengths) == chunks and max(lengths) - min(lengths) <= 1
    assert lengths[-1] == min(lengths)


@pytest.mark.parametrize(
    ("num_layers", "chunks", "lengths"),
    [
        (5, 1, [5]),
        (3, 2, [2, 1]),
        (32, 4, [8, 8, 8, 8]),
        (33, 4, [8, 9, 8, 8]),
        (34, 4, [8, 9, 9, 8]),
        (35, 4, [9, 9, 9, 8]),
        (7, 6, [1, 2, 1, 1, 1, 1]),
    ],
)
def test_who_gets_the_layers_left_over(num_layers, chunks, lengths):
    assert [len(chunk) for chunk in layer_ranges(num_layers, chunks)] == lengths


def test_cut():
    assert cut(4, 1) == [ModelChunk(range(4))]
    assert cut(3, 2) == [ModelChunk(range(2), True, False), ModelChunk(range(2, 3), False, True)]
    # Stage 1 of 3 has the second and the fifth chunk.
    assert cut(6, 3, 2)[1::3] == [
        ModelChunk(range(1, 2), False, False),
        ModelChunk(range(4, 5), False, False),
    ]
