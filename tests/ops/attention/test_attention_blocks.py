"""A sequence computed in blocks, forward and backward, is the sequence computed at once."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import paddle
import pytest
from op_testing import as_float64, assert_close, random
from test_flash_attention_op import FLOAT32_TOLERANCE
from test_flash_attention_op import masks as flash_attention_masks

from pypkg import ops
from pypkg.ops import AttentionMask

BACKENDS = ("compiled", "reference")  # Triton has no attention of its own
BATCH, TOKENS, HEADS = 2, 150, 4
# Where blocks end: no multiples of tiles, and other numbers of queries than of keys.
QUERY_ENDS, KEY_ENDS = (37, 100, 150), (51, 102, 150)


def masks() -> dict[str, AttentionMask]:
    return flash_attention_masks(70, ([10, 1, 60, 79], [150]), (20, 60, 45, 55))


def arrays(heads_k: int = 2, head_dim: int = 16) -> list[np.ndarray]:
    """query, key, value and the gradient of the output, of the whole sequence."""
    heads = (HEADS, heads_k, heads_k, HEADS)
    return [random((BATCH, TOKENS, each, head_dim), seed) for seed, each in enumerate(heads)]


def at_once(given: list[paddle.Tensor], *arguments) -> list[np.ndarray]:
    """out, lse, dq, dk and dv of the whole sequence, in float64."""
    *qkv, dout = (each.astype("float64") for each in given)
    for each in qkv:
        each.stop_gradient = False
    out, lse = ops.flash_attention_reference(*qkv, *arguments)
    out.backward(dout)
    return [as_float64(each) for each in (out, lse, *(one.grad for one in qkv))]


def in_blocks(given: list[paddle.Tensor], *arguments, query_ends=QUERY_ENDS, key_ends=KEY_ENDS):
    """The same in blocks. Gradients of blocks are summed in float64."""
    query, key, value, dout = given
    query_blocks, key_blocks = (
        [slice(*each) for each in pairwise((0, *ends))] for ends in (query_ends, key_ends)
    )
    outs, lses, dq = [], [], []
    dk, dv = (np.zeros(each.shape) for each in (key, value))
    for rows in query_blocks:
        q, seen = query[:, rows], []
        for columns in key_blocks:
            offsets = {"query_offset": rows.start, "key_offset": columns.start}
            block = (q, key[:, columns], value[:, columns])
            seen.append(ops.flash_attention_with_lse(*block, *arguments, **offsets))
        out, lse = ops.merge_attention(*zip(*seen))
        outs.append(as_float64(out))
        lses.append(as_float64(lse))
        dq.append(np.zeros(q.shape))
        for columns in key_blocks:
            offsets = {"query_offset": rows.start, "key_offset": columns.start}
            block = (q, key[:, columns], value[:, columns])
            gradients = ops.flash_attention_block_gradients(
                *block, out, lse, dout[:, rows], *arguments, **offsets
            )
            targets = (dq[-1], dk[:, columns], dv[:, columns])
            for target, gradient in zip(targets, gradients, strict=True):
                target += as_float64(gradient)
    joined = [np.concatenate(each, axis=axis) for each, axis in ((outs, 1), (lses, 2), (dq, 1))]
    return [*joined, dk, dv]


def check(mask: AttentionMask | None, *arguments, dtype="float32", tolerance=None, **sizes) -> None:
    given = [paddle.to_tensor(each.astype("float32")).astype(dtype) for each in arrays(**sizes)]
    names = ("out", "lse", "dq", "dk", "dv")
    found, expected = (run(given, mask, *arguments) for run in (in_blocks, at_once))
    for name, got, wanted in zip(names, found, expected, strict=True):
        assert_close(got, wanted, tolerance or FLOAT32_TOLERANCE, name)


@pytest.mark.parametrize("softcap", [0.0, 1.5])
@pytest.mark.parametrize("name", masks())
def test_masks(each_backend, name, softcap):
    check(masks()[name], 0.3, softcap)


@pytest.mark.parametrize("heads_k", [4, 1])
@pytest.mark.parametrize("head_dim", [8, 20, 64, 136, 256])
def test_head_dims(each_backend, head_dim, heads_k):
    check(None, head_dim=head_dim, heads_k=heads_k)


def test_bfloat16(each_backend):
    """Blocks round their outputs and gradients once more than the whole."""
    mask = masks()["documents, window, alibi"]
    check(mask, dtype="bfloat16", tolerance=2.0**-5, head_dim=64)


@pytest.mark.parametrize("name", ["causal", "window", "documents"])
def test_float64_blocks_are_the_whole(name):
    check(masks()[name], dtype="float64", tolerance=1e-12)


def test_a_block_that_is_hidden(each_backend):
    """Queries 10 to 46 see no key from 50 on: out 0, lse -inf, no gradient."""
    query, key, value, dout = (paddle.to_tensor(each, "float32") for each in arrays())
    rows, columns = slice(10, 47), slice(50, 101)
    block = (query[:, rows], key[:, columns], value[:, columns])
    offsets = {"query_offset": 10, "key_offset": 50}
    out, lse = ops.flash_attention_with_lse(*block, **offsets)
    assert (out.numpy() == 0).all() and (lse.numpy() == -np.inf).all()
    assert out.shape == block[0].shape and list(lse.shape) == [BATCH, HEADS, 37]
    merged = ops.flash_attention_with_lse(
        query[:, rows], key[:, :50], value[:, :50], query_offset=10, key_offset=0
    )
    gradients = ops.flash_attention_block_gradients(*block, *merged, dout[:, rows], **offsets)
    for gradient, like in zip(gradients, block, strict=True):
        assert gradient.shape == like.shape and (gradient.numpy() == 0).all()


@pytest.mark.parametrize("name", ["causal", "window", "full, documents"])
def test_at_zero_offsets_the_bits_are_those_of_flash_attention(each_backend, name):
    qkv = [paddle.to_tensor(each, "float32") for each in arrays()[:3]]
    for each in qkv:
        each.stop_gradient = False
    out, lse = ops.flash_attention(*qkv, masks()[name], return_softmax_lse=True)
    offsets = {"query_offset": 0, "key_offset": 0}
    block_out, block_lse = ops.flash_attention_with_lse(*qkv, masks()[name], **offsets)
    np.testing.assert_array_equal(block_out.numpy(), out.numpy())
    np.testing.assert_array_equal(block_lse.numpy(), lse.numpy())
    assert block_out.stop_gradient and block_lse.stop_gradient


def test_merging():
    """Three blocks of one query and two heads: weights e^1 and e^3, and a block that is hidden;
    the second head sees nothing."""
    lses = [[1.0, -math.inf], [-math.inf, -math.inf], [3.0, -math.inf]]
    values = [2.0, 100.0, 5.0]
    out, lse = ops.merge_attention(
        [paddle.full([1, 1, 2, 3], value) for value in values],
        [paddle.to_tensor(each).reshape([1, 2, 1]) for each in lses],
    )
    total = math.exp(1) + math.exp(3)
    expected = (2 * math.exp(1) + 5 * math.exp(3)) / total
    np.testing.assert_allclose(out.numpy()[0, 0], [[expected] * 3, [0.0] * 3], rtol=1e-6)
    np.testing.assert_allclose(lse.numpy()[0, :, 0], [math.log(total), -math.inf], rtol=1e-6)


def test_merging_large_lse():
    outs = [paddle.full([1, 1, 1, 1], value) for value in (1.0, 3.0)]
    out, lse = ops.merge_attention(outs, [paddle.full([1, 1, 1], 1e4)] * 2)
    assert out.item() == 2.0
    np.testing.assert_allclose(lse.item(), 1e4 + math.log(2), rtol=1e-7)


def test_merging_rounds_a_float32_sum_at_no_step():
    outs = [paddle.full([1, 1, 1, 1], 1.0), paddle.full([1, 1, 1, 1], 1.0078125, "bfloat16")]
    out, _ = ops.merge_attention(outs, [paddle.zeros([1, 1, 1])] * 2)
    assert out.dtype == paddle.float32 and out.item() == 1.00390625
    assert (
        ops.merge_attention(outs[::-1], [paddle.zeros([1, 1, 1])] * 2)[0].dtype == paddle.bfloat16
    )


def test_merging_what_does_not_fit():
    out, lse = paddle.ones([1, 2, 3, 4]), paddle.ones([1, 3, 2])
    with pytest.raises(ValueError, match="1 outs and 0 lses"):
        ops.merge_attention([out], [])
    with pytest.raises(ValueError, match="0 outs and 0 lses"):
        ops.merge_attention([], [])
    with pytest.raises(ValueError, match=r"lses\[1\] must have shape \[1, 3, 2\], got \[1, 2, 3\]"):
        ops.merge_attention([out, out], [lse, paddle.ones([1, 2, 3])])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query_offset": -1}, ValueError, "query_offset must be a position, 0 or more, got -1"),
        ({"key_offset": -3}, ValueError, "key_offset must be a position, 0 or more, got -3"),
        ({"softcap": -1.0}, ValueError, "softcap must be 0"),
        ({"value": paddle.ones([1, 6, 4, 8])}, ValueError, "v must have shape"),
        ({"out": paddle.ones([1, 4, 4, 8])}, ValueError, r"out must have shape \[1, 5, 4, 8\]"),
        ({"lse": paddle.ones([1, 5, 4])}, ValueError, r"lse must have shape \[1, 4, 5\]"),
        ({"lse": paddle.ones([1, 4, 5], "float64")}, TypeError, "lse must be float32"),
        ({"grad_out": paddle.ones([1, 5, 4, 8], "bfloat16")}, TypeError, "grad_out must be float"),
        (
            {"mask": AttentionMask(document_starts=paddle.zeros([1, 10], "int32"))},
            ValueError,
            "document_starts must cover the 12 tokens up to the end of the blocks, got 10",
        ),
    ],
)
def test_wrong_inputs(each_backend, change, error, message):
    good = {name: paddle.ones([1, 5, 4, 8]) for name in ("query", "key", "value", "out")}
    good |= {"grad_out": good["out"], "lse": paddle.ones([1, 4, 5])}
    offsets = {"query_offset": 7, "key_offset": 2}
    with pytest.raises(error, match=message):
        ops.flash_attention_block_gradients(**{**good, **offsets, **change})
    if not {"out", "lse", "grad_out"} & change.keys():
        forward = {**good, **offsets, **change}
        for name in ("out", "lse", "grad_out"):
            del forward[name]
        with pytest.raises(error, match=r"flash_attention_with_lse|AttentionMask"):
            ops.flash_attention_with_lse(**forward)
