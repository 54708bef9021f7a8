"""Blocks by Paddle's flash attention, whose kernels need a GPU: stand-ins follow its signatures."""

from __future__ import annotations

import inspect
import math

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest
from op_testing import as_float64, assert_close, random

from pypkg import ops
from pypkg.ops import AttentionMask

HEADS, CHUNK, CHUNKS = 4, 128, 3
TOKENS = CHUNK * CHUNKS


@pytest.fixture
def calls(monkeypatch):
    """Paddle's forward and backward replaced; what was asked of ``causal``, call by call."""
    calls = []
    signature = inspect.signature(F.flashmask_attention)

    def options(q, causal):
        return {"mask": AttentionMask(causal=causal), "scale": 1 / math.sqrt(q.shape[3])}

    def forward(*args, **kwargs):
        given = signature.bind(*args, **kwargs).arguments
        q, k, v = (given[name] for name in ("query", "key", "value"))
        assert given["return_softmax_lse"]
        assert not given["causal"] or q.shape[1] == k.shape[1]
        calls.append(given["causal"])
        return ops.flash_attention_reference(q, k, v, **options(q, given["causal"]))

    def backward(q, k, v, out, lse, seed_offset, attn_mask, dout, dropout, causal):
        assert seed_offset.place.is_cpu_place() and attn_mask is None and dropout == 0
        offsets = {"query_offset": 0, "key_offset": 0}
        return ops.flash_attention_block_gradients(
            q, k, v, out, lse, dout, **options(q, causal), **offsets
        )

    monkeypatch.setattr(F, "flashmask_attention", forward)
    monkeypatch.setattr(paddle._C_ops, "flash_attn_grad", backward)
    return calls


def tensors(head_dim: int) -> list[paddle.Tensor]:
    """query, key, value and the gradient of the output, bfloat16."""
    shapes = [(1, TOKENS, heads, head_dim) for heads in (HEADS, 2, 2, HEADS)]
    arrays = (random(shape, seed).astype("float32") for seed, shape in enumerate(shapes))
    return [paddle.to_tensor(each).astype("bfloat16") for each in arrays]


@pytest.mark.parametrize(("head_dim", "scale"), [(16, None), (20, 0.125)])
@pytest.mark.parametrize(
    ("mask", "asked"),
    [
        (None, [True, False, True, False, False, True]),
        (AttentionMask(causal=False), [False] * 9),
        (AttentionMask(window=TOKENS), [True, False, True, False, False, True]),
    ],
)
def test_a_sequence_in_blocks(calls, mask, asked, head_dim, scale):
    """Each pair of chunks is visible, causal or hidden; a hidden one costs no kernel."""
    query, key, value, dout = tensors(head_dim)
    exact = [each.astype("float64") for each in (query, key, value)]
    for each in exact:
        each.stop_gradient = False
    out, lse = ops.flash_attention_reference(*exact, mask, scale)
    out.backward(dout.astype("float64"))
    sums = [np.zeros(each.shape) for each in exact]
    for rows in (slice(i * CHUNK, (i + 1) * CHUNK) for i in range(CHUNKS)):
        blocks = [slice(j * CHUNK, (j + 1) * CHUNK) for j in range(CHUNKS)]
        given = [(query[:, rows], key[:, block], value[:, block]) for block in blocks]
        offsets = [{"query_offset": rows.start, "key_offset": block.start} for block in blocks]
        found = [
            ops.paddle_flash_attention_with_lse(*each, mask, scale, **where)
            for each, where in zip(given, offsets)
        ]
        merged_out, merged_lse = ops.merge_attention(*zip(*found))
        assert_close(as_float64(merged_out), as_float64(out[:, rows]), 2.0**-5, "out")
        assert_close(as_float64(merged_lse), as_float64(lse[:, :, rows]), 2.0**-5, "lse")
        for each, where, block in zip(given, offsets, blocks):
            gradients = ops.paddle_flash_attention_block_gradients(
                *each, merged_out, merged_lse, dout[:, rows], mask, scale, **where
            )
            for total, gradient, place in zip(sums, gradients, (rows, block, block), strict=True):
                total[:, place] += as_float64(gradient)
    assert calls == asked
    for name, total, each in zip(("dq", "dk", "dv"), sums, exact, strict=True):
        assert_close(total, as_float64(each.grad), 2.0**-5, name)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query_offset": 64}, ValueError, "128 queries from 64 on and 128 keys from 0 on"),
        ({"query_offset": 128, "mask": AttentionMask(window=200)}, ValueError, "window=200"),
        ({"softcap": 2.0}, ValueError, "Paddle's kernels have no soft cap"),
        ({"mask": AttentionMask(alibi_slopes=paddle.ones([4]))}, ValueError, "no ALiBi"),
        (
            {"mask": AttentionMask(document_starts=paddle.zeros([1, 128], "int32"))},
            ValueError,
            "no documents by position",
        ),
        (
            {"mask": AttentionMask(prefix_lengths=paddle.ones([1], "int32"))},
            ValueError,
            "no prefix by position",
        ),
        (
            {name: paddle.ones([1, 128, 4, 8]) for name in ("query", "key", "value")},
            TypeError,
            "float16 or bfloat16",
        ),
        ({"query": paddle.ones([1, 100, 4, 8], "bfloat16")}, ValueError, "multiple of 128"),
    ],
)
def test_what_paddle_lacks_is_refused(calls, change, error, message):
    good = {name: paddle.ones([1, 128, 4, 8], "bfloat16") for name in ("query", "key", "value")}
    good |= {"query_offset": 0, "key_offset": 0}
    with pytest.raises(error, match=message):
        ops.paddle_flash_attention_with_lse(**{**good, **change})
    assert calls == []
