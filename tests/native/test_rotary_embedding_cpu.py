from __future__ import annotations

import numpy as np
import pytest
from kernel_testing import DTYPES, arg, assert_close, load, poisoned, store

from pypkg import _native


def tables(num_positions, rotary_dim):
    angle = np.outer(np.arange(num_positions), 10000.0 ** -(np.arange(rotary_dim // 2) / 8.0))
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def rotate(x, cos, sin, positions, interleaved, offset):
    """Float64 reference: pair i of dimensions turned by the angle of its token's position."""
    y = x.copy()
    half = cos.shape[1]
    if interleaved:
        first, second = (slice(offset + o, offset + 2 * half, 2) for o in (0, 1))
    else:
        first, second = slice(offset, offset + half), slice(offset + half, offset + 2 * half)
    c, s = (t.astype(np.float64)[positions][:, :, None, :] for t in (cos, sin))
    y[..., first] = x[..., first] * c - x[..., second] * s
    y[..., second] = x[..., second] * c + x[..., first] * s
    return y


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    "head_dim, rotary_dim, offset", [(64, 64, 0), (80, 32, 0), (128, 64, 64), (24, 2, 6), (8, 6, 1)]
)
@pytest.mark.parametrize("with_position_ids", [False, True])
def test_against_float64(rng, dtype, interleaved, head_dim, rotary_dim, offset, with_position_ids):
    batch, sequence, heads, positions = 2, 5, (3, 1), 40
    q, k = (store(rng.normal(size=(batch, sequence, h, head_dim)), dtype) for h in heads)
    cos, sin = tables(positions, rotary_dim)
    ids = rng.integers(0, positions, (batch, sequence)) if with_position_ids else None
    used = np.tile(np.arange(sequence), (batch, 1)) if ids is None else ids
    outputs = [poisoned(x.shape, dtype) for x in (q, k)]
    options = {"interleaved": interleaved, "rotary_offset": offset}
    _native.rotary_embedding(
        arg(q), arg(k), cos, sin, arg(outputs[0]), arg(outputs[1]), ids, **options
    )
    for x, y in zip((q, k), outputs):
        assert_close(y, rotate(load(x), cos, sin, used, interleaved, offset), 4)

    # In place gives the same, and turning back gives the input (to the rounding of two turns).
    same = q.copy()
    _native.rotary_embedding(arg(same), None, cos, sin, arg(same), None, ids, **options)
    np.testing.assert_array_equal(same, outputs[0])
    _native.rotary_embedding(
        arg(same), None, cos, sin, arg(same), None, ids, **options, inverse=True
    )
    np.testing.assert_allclose(load(same), load(q), atol=2e-6 if dtype == "float32" else 0.05)


@pytest.mark.parametrize("bad", [-1, 7])
def test_position_outside_the_tables(bad):
    q = np.ones((1, 3, 1, 8), np.float32)
    cos, sin = tables(7, 8)
    ids = np.array([[0, bad, 6]])
    with pytest.raises(IndexError, match=rf"position {bad} of token 1 .* 7 positions"):
        _native.rotary_embedding(q, None, cos, sin, q.copy(), None, ids)


def test_sequence_longer_than_the_tables():
    q = np.ones((1, 8, 1, 8), np.float32)
    with pytest.raises(IndexError, match="position 7"):
        _native.rotary_embedding(q, None, *tables(7, 8), q.copy(), None)


def test_rotated_part_must_fit():
    q = np.ones((1, 2, 1, 8), np.float32)
    with pytest.raises(ValueError, match=r"rotary_offset 4 .* rotary_dim 8 .* head_dim 8"):
        _native.rotary_embedding(q, None, *tables(7, 8), q.copy(), None, rotary_offset=4)
