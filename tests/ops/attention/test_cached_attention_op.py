"""Attention of a step of generation against its definition."""

from __future__ import annotations

import numpy as np
import paddle
import pytest
from op_testing import TOLERANCE, as_float64, assert_close, random

from pypkg import _native, ops
from pypkg.ops import AttentionMask, KeptTokens

BATCH, CAPACITY, POSITION, HEAD_DIM = 3, 40, 21, 20
PADDING = [4, 0, POSITION]  # the last row begins with the new token
SLOPES = [0.5, 0.25, 0.125, 0.0625]


@pytest.fixture(params=_native.cpu_isas())
def each_isa(request, compiled):
    _native.set_cpu_isa(request.param)
    yield
    _native.set_cpu_isa("")


def kept_tokens(heads_k: int, padding: list[int] | None, position: int = POSITION) -> KeptTokens:
    """Behind the tokens, and in the padding, there is what must not be read."""
    capacity = max(CAPACITY, position + 1)
    held = []
    for seed in (5, 6):
        values = random((BATCH, heads_k, capacity, HEAD_DIM), seed).astype("float32")
        values[:, :, position:] = np.nan
        for row, pad in enumerate(padding or []):
            values[row, :, :pad] = np.nan
        held.append(paddle.to_tensor(values))
    first = None if padding is None else paddle.to_tensor(padding)
    return KeptTokens(*held, position, first)


def new_tokens(heads_q: int, heads_k: int) -> list[paddle.Tensor]:
    return [
        paddle.to_tensor(random((BATCH, 1, heads, HEAD_DIM), seed), "float32")
        for seed, heads in enumerate((heads_q, heads_k, heads_k))
    ]


def expected(new, kept: KeptTokens, mask: AttentionMask, *scores) -> np.ndarray:
    """Row by row, over the tokens that are no padding, in float64."""
    rows, stop = [], kept.position + 1
    for row in range(BATCH):
        first = 0 if kept.first_keys is None else int(kept.first_keys[row])
        keys, values = (
            each[row : row + 1, :, first:stop].transpose([0, 2, 1, 3]).astype("float64")
            for each in (kept.keys, kept.values)
        )
        query = new[0][row : row + 1].astype("float64")
        rows.append(ops.flash_attention_reference(query, keys, values, mask, *scores)[0].numpy())
    return np.concatenate(rows)


@paddle.no_grad()
@pytest.mark.parametrize("padding", [None, PADDING])
@pytest.mark.parametrize(
    ("heads_k", "mask", "scores"),
    [
        (4, {}, (None, 0.0)),
        (2, {"window": 6}, (0.7, 0.0)),
        (1, {"slopes": SLOPES}, (None, 1.5)),
        (2, {"window": 100, "slopes": SLOPES}, (0.3, 0.0)),
    ],
)
def test_values(each_isa, heads_k, mask, scores, padding):
    slopes = mask.get("slopes")
    slopes = None if slopes is None else paddle.to_tensor(slopes, "float32")
    mask = AttentionMask(window=mask.get("window"), alibi_slopes=slopes)
    new, kept = new_tokens(4, heads_k), kept_tokens(heads_k, padding)
    before = [each.numpy() for each in (kept.keys, kept.values)]
    out = ops.cached_attention(*new, kept, mask, *scores)
    for was, now, added in zip(before, (kept.keys, kept.values), new[1:], strict=True):
        was[:, :, POSITION] = added[:, 0].numpy()  # and nothing else
        np.testing.assert_array_equal(now.numpy(), was)
    assert_close(as_float64(out), expected(new, kept, mask, *scores), TOLERANCE["float32"], "out")


@paddle.no_grad()
def test_many_tokens_and_a_row_alone(each_isa):
    """So many that threads divide the heads; a row has the bits that it has alone."""
    new, kept = new_tokens(4, 2), kept_tokens(2, [1500, 7, 0], position=1999)
    out = ops.cached_attention(*new, kept, AttentionMask())
    assert_close(as_float64(out), expected(new, kept, AttentionMask()), TOLERANCE["float32"], "out")
    for row in range(BATCH):
        own = slice(row, row + 1)
        held = KeptTokens(kept.keys[own], kept.values[own], 1999, kept.first_keys[own])
        alone = ops.cached_attention(*(each[own] for each in new), held, AttentionMask())
        np.testing.assert_array_equal(alone.numpy(), out[own].numpy())


@paddle.no_grad()
def test_a_score_that_is_not_a_number_reaches_the_output(each_isa):
    new, kept = new_tokens(4, 2), kept_tokens(2, None)
    new[0][1] = float("nan")
    out = ops.cached_attention(*new, kept, AttentionMask()).numpy()
    assert np.isnan(out[1]).all() and np.isfinite(out[[0, 2]]).all()


def test_where_there_is_no_operator(compiled):
    new, kept = new_tokens(4, 2), kept_tokens(2, None)
    assert ops.cached_attention(*new, kept, AttentionMask()) is None  # gradients are on
    with paddle.no_grad():
        wide = [each.astype("float64") for each in new]
        assert ops.cached_attention(*wide, kept, AttentionMask()) is None
        ops.set_backend("reference")
        assert ops.cached_attention(*new, kept, AttentionMask()) is None
    assert np.isnan(kept.keys.numpy()[:, :, POSITION:]).all()


@paddle.no_grad()
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"position": CAPACITY}, "position 40 and window 0 do not fit keys and values of 40"),
        ({"first_keys": paddle.zeros([2], "int64")}, r"first_keys must have shape \[3\], got \[2"),
        ({"first_keys": paddle.zeros([3], "int32")}, "first_keys must be int64"),
        ({"values": paddle.zeros([3, 2, 41, 20])}, r"values must have shape \[3, 2, 40, 20\]"),
        ({"keys": paddle.zeros([3, 3, 40, 20]), "values": paddle.zeros([3, 3, 40, 20])},
         "4 query heads must be a multiple of the 3"),
    ],
)  # fmt: skip
def test_wrong_inputs(compiled, change, message):
    kept = kept_tokens(2, None)._replace(**change)
    with pytest.raises(ValueError, match=message):
        ops.cached_attention(*new_tokens(4, 2), kept, AttentionMask())
