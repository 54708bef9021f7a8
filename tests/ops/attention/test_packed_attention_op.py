"""packed_attention has the bits of its two operators on split columns, forward and backward."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

from pypkg import ops
from pypkg.ops.attention.packed_attention import packed_attention

BACKENDS = ("compiled", "reference")  # there is no Triton version
BATCH, SEQUENCE, HEADS_Q, HEADS_K, HEAD_DIM = 2, 101, 6, 2, 24
ROTARY_DIM, POSITIONS = 16, 130


def tables() -> tuple[paddle.Tensor, paddle.Tensor]:
    angles = np.random.default_rng(3).uniform(-3, 3, (POSITIONS, ROTARY_DIM // 2))
    return paddle.to_tensor(np.cos(angles), "float32"), paddle.to_tensor(np.sin(angles), "float32")


def packed(dtype: str, shape=(BATCH, SEQUENCE)) -> tuple[paddle.Tensor, paddle.Tensor]:
    """A leaf and the qkv made of it, which, like that of a projection, is no leaf."""
    width = (HEADS_Q + 2 * HEADS_K) * HEAD_DIM
    values = np.random.default_rng(0).standard_normal([*shape, width])
    leaf = paddle.to_tensor(values, "float32")
    leaf.stop_gradient = False
    return leaf, (leaf * 2.0).astype(dtype)


def rotations() -> dict[str, dict]:
    cos, sin = tables()
    ids = np.random.default_rng(1).integers(0, POSITIONS, (BATCH, SEQUENCE))
    return {
        "none": {},
        "halves": {"cos": cos, "sin": sin},
        "interleaved": {"cos": cos, "sin": sin, "interleaved": True},
        "positions": {"cos": cos, "sin": sin, "position_ids": paddle.to_tensor(ids)},
    }


def masks() -> dict[str, ops.AttentionMask]:
    starts = np.tile(np.arange(SEQUENCE) // 40 * 40, (BATCH, 1)).astype("int32")
    slopes = paddle.to_tensor(2.0 ** -np.arange(HEADS_Q), "float32")
    return {
        "causal": ops.AttentionMask(),
        "prefix": ops.AttentionMask(prefix_lengths=paddle.to_tensor([30, 0], "int32")),
        "window": ops.AttentionMask(window=17, alibi_slopes=slopes),
        "documents": ops.AttentionMask(document_starts=paddle.to_tensor(starts)),
    }


def two_operators(qkv: paddle.Tensor, mask, rotation: dict, **options) -> paddle.Tensor:
    query, key, value = ops.split_heads(qkv, BATCH, HEADS_Q, HEADS_K)
    if rotation:
        query, key = ops.rotary_embedding(query, key, **rotation)
    out = ops.flash_attention(query, key, value, mask, **options)
    return out.reshape([*qkv.shape[:-1], -1])


def results(leaf: paddle.Tensor, out: paddle.Tensor) -> list[np.ndarray]:
    weights = np.random.default_rng(2).standard_normal(out.shape)
    (out.astype("float32") * paddle.to_tensor(weights, "float32")).sum().backward()
    return [each.astype("float32").numpy() for each in (out, leaf.grad)]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("rotation", "mask"),
    [("none", "window"), ("halves", "causal"), ("interleaved", "prefix"),
     ("positions", "documents")],
)  # fmt: skip
def test_bits_of_the_two_operators(each_backend, rotation, mask, dtype, overwrite):
    options = {"scale": 0.3, "softcap": 4.0}
    given, rotary = masks()[mask], rotations()[rotation]
    leaf, qkv = packed(dtype)
    expected = results(leaf, two_operators(qkv, given, rotary, **options))
    leaf, qkv = packed(dtype)
    before = qkv.astype("float32").numpy()
    heads = (BATCH, HEADS_Q, HEADS_K)
    out = packed_attention(qkv, *heads, given, overwrite=overwrite, **rotary, **options)
    if not overwrite:
        np.testing.assert_array_equal(qkv.astype("float32").numpy(), before)
    for got, wanted in zip(results(leaf, out), expected, strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_tokens_in_one_row(each_backend):
    """Under sequence parallelism qkv has no axis of rows."""
    rotary = rotations()["halves"]
    leaf, qkv = packed("float32")
    expected = results(leaf, packed_attention(qkv, BATCH, HEADS_Q, HEADS_K, **rotary))
    leaf, qkv = packed("float32", (BATCH * SEQUENCE,))
    got = results(leaf, packed_attention(qkv, BATCH, HEADS_Q, HEADS_K, **rotary))
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_array_equal(one.ravel(), other.ravel())


def test_a_head_that_no_kernel_takes(each_backend):
    qkv = paddle.to_tensor(np.random.default_rng(0).standard_normal((1, 9, 3 * 20)), "float32")
    query, key, value = ops.split_heads(qkv, 1, 1, 1)
    expected = ops.flash_attention(query, key, value)
    got = packed_attention(qkv, 1, 1, 1, overwrite=True)
    np.testing.assert_array_equal(got.numpy().ravel(), expected.numpy().ravel())


def test_nothing_is_recorded_without_gradients(compiled):
    _, qkv = packed("float32")
    with paddle.no_grad():
        out = packed_attention(qkv, BATCH, HEADS_Q, HEADS_K)
    assert out.stop_gradient


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads_k": 4}, "must hold 2 rows of tokens with 14 heads each, got shape"),
        ({"batch": 3}, "must hold 3 rows"),
        ({"cos": tables()[0]}, "give both cos and sin, or neither"),
        ({"position_ids": paddle.zeros([2, 5], "int64")}, "position_ids"),
        ({"mask": ops.AttentionMask(prefix_lengths=paddle.zeros([3], "int32"))}, "prefix_lengths"),
    ],
)
def test_wrong_arguments(each_backend, change, message):
    _, qkv = packed("float32")
    cos, sin = (None, None) if "cos" in change else tables()
    given = {"batch": BATCH, "heads_q": HEADS_Q, "heads_k": HEADS_K, "cos": cos, "sin": sin}
    with pytest.raises(ValueError, match=message):
        packed_attention(qkv, **{**given, **change})


def test_a_position_outside_the_tables(each_backend):
    _, qkv = packed("float32")
    cos, sin = tables()
    ids = paddle.full([BATCH, SEQUENCE], POSITIONS, "int64")
    with pytest.raises(IndexError, match=f"position {POSITIONS}"):
        packed_attention(qkv, BATCH, HEADS_Q, HEADS_K, cos=cos, sin=sin, position_ids=ids)
