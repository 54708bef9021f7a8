"""Our masks as the arguments of Paddle's flash attention, whose kernels need a GPU.

A function that follows Paddle's description of ``startend_row_indices`` stands in for them.
"""

from __future__ import annotations

import inspect
import math

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest
from op_testing import random
from test_flash_attention_op import masks

from pypkg.ops import AttentionMask, flash_attention_reference, paddle_flash_attention
from pypkg.ops.attention.paddle_attention import startend_row_indices

BATCH, SEQUENCE = 2, 37
POSSIBLE = {name: mask for name, mask in masks().items() if mask.alibi_slopes is None}


def hidden_by(bounds: np.ndarray | None, causal: bool) -> np.ndarray:
    """What Paddle's documentation of flashmask_attention hides, bool [batch, 1, rows, keys]."""
    row, key = np.arange(SEQUENCE)[:, None], np.arange(SEQUENCE)[None]
    hidden = np.zeros((BATCH, 1, SEQUENCE, SEQUENCE), bool)
    if causal:
        hidden |= key > row
    if bounds is not None:
        assert bounds.shape == (BATCH, 1, SEQUENCE, 1 if causal else 2)
        hidden |= (row >= key) & (row >= bounds[..., 0][:, :, None])
        if not causal:
            hidden |= (row < key) & (row < bounds[..., 1][:, :, None])
    return hidden


def dense_attention(q, k, v, hidden):
    """In float32, of Paddle primitives; the scale is that of Paddle's kernels."""
    group = q.shape[2] // k.shape[2]
    q, k, v = (each.astype("float32").transpose([0, 2, 1, 3]) for each in (q, k, v))
    k, v = (each.repeat_interleave(group, axis=1) for each in (k, v))
    scores = paddle.matmul(q, k, transpose_y=True) / math.sqrt(q.shape[-1])
    weights = F.softmax(paddle.where(paddle.to_tensor(hidden), paddle.full([1], -1e30), scores))
    return paddle.matmul(weights, v).transpose([0, 2, 1, 3]).astype("bfloat16")


@pytest.fixture
def calls(monkeypatch):
    """Paddle's two functions replaced, called as their signatures allow; the calls."""
    calls = []
    plain, masked = F.flash_attention.flash_attention, F.flashmask_attention
    signatures = inspect.signature(plain), inspect.signature(masked)

    def run_plain(*args, **kwargs):
        given = signatures[0].bind(*args, **kwargs).arguments
        calls.append(("flash_attention", given["query"].shape[-1]))
        qkv = (given[name] for name in ("query", "key", "value"))
        return dense_attention(*qkv, hidden_by(None, given["causal"])), None

    def run_masked(*args, **kwargs):
        given = signatures[1].bind(*args, **kwargs).arguments
        assert given["startend_row_indices"].dtype == paddle.int32
        calls.append(("flashmask_attention", given["query"].shape[-1]))
        qkv = (given[name] for name in ("query", "key", "value"))
        bounds = given["startend_row_indices"].numpy()
        return dense_attention(*qkv, hidden_by(bounds, given["causal"]))

    monkeypatch.setattr(F.flash_attention, "flash_attention", run_plain)
    monkeypatch.setattr(F, "flashmask_attention", run_masked)
    return calls


def tensors(heads_k: int = 2, head_dim: int = 16):
    shapes = [(BATCH, SEQUENCE, heads, head_dim) for heads in (4, heads_k, heads_k)]
    arrays = (random(shape, seed) for seed, shape in enumerate(shapes))
    return [paddle.to_tensor(each.astype("float32")).astype("bfloat16") for each in arrays]


@pytest.mark.parametrize("name", POSSIBLE)
def test_bounds_hide_what_the_mask_hides(name):
    mask = POSSIBLE[name]
    bounds, causal = startend_row_indices(mask, BATCH, SEQUENCE)
    seen = np.broadcast_to(mask.visible(SEQUENCE, SEQUENCE).numpy(), (BATCH, 1, *[SEQUENCE] * 2))
    given = None if bounds is None else bounds.numpy()
    np.testing.assert_array_equal(hidden_by(given, causal), ~seen)


@pytest.mark.parametrize("name", POSSIBLE)
def test_result_is_that_of_the_reference(name, calls):
    mask = POSSIBLE[name]
    q, k, v = tensors()
    out = paddle_flash_attention(q, k, v, mask)
    expected = flash_attention_reference(*(x.astype("float32") for x in (q, k, v)), mask)[0]
    np.testing.assert_allclose(
        out.astype("float32").numpy(), expected.numpy(), atol=2.0**-8 * 4, rtol=2.0**-8
    )
    plain = name in ("causal", "full")
    assert calls == [("flash_attention" if plain else "flashmask_attention", 16)]


@pytest.mark.parametrize("head_dim", [16, 20])
@pytest.mark.parametrize("scale", [None, 0.125, 1.0])
def test_scale_and_padding(head_dim, scale, calls):
    """q carries the scale, rounded once more to bfloat16: scores reach 10 and move by 10 x 2^-8."""
    q, k, v = tensors(head_dim=head_dim)
    out = paddle_flash_attention(q, k, v, None, scale)
    wide = [x.astype("float32") for x in (q, k, v)]
    expected = flash_attention_reference(*wide, None, scale)[0]
    assert out.shape == q.shape and out.dtype == paddle.bfloat16
    np.testing.assert_allclose(out.astype("float32").numpy(), expected.numpy(), atol=0.05)
    assert calls[0][1] == (16 if head_dim == 16 else 24)


def test_layers_share_the_bounds_of_a_mask(calls, monkeypatch):
    from pypkg.ops.attention import paddle_attention

    made = []
    make = paddle_attention.startend_row_indices
    monkeypatch.setattr(
        paddle_attention, "startend_row_indices", lambda *args: made.append(args) or make(*args)
    )
    mask = AttentionMask(window=6)
    for _ in range(3):
        paddle_flash_attention(*tensors(), mask)
    assert len(made) == 1 and len(calls) == 3


def test_what_paddle_lacks_is_refused(calls):
    q, k, v = tensors()
    slopes = paddle.to_tensor([0.5, 0.25, 0.125, 0.0625])
    with pytest.raises(ValueError, match="no ALiBi"):
        paddle_flash_attention(q, k, v, AttentionMask(alibi_slopes=slopes))
    with pytest.raises(ValueError, match="no soft cap"):
        paddle_flash_attention(q, k, v, softcap=2.0)
    with pytest.raises(TypeError, match="float16 or bfloat16"):
        paddle_flash_attention(*(x.astype("float32") for x in (q, k, v)))
    with pytest.raises(ValueError, match="as many queries as keys"):
        paddle_flash_attention(q[:, :5], k, v)
    assert calls == []
