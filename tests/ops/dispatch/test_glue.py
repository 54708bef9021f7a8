"""The compiled operators check what they get themselves: a wrong size would read past a buffer.

The public functions check first, so these calls go around them.
"""

from __future__ import annotations

import math

import paddle
import pytest

from pypkg import ops
from pypkg.ops.dispatch.library import run_compiled

FLOATS = paddle.ones([2, 3, 4, 8])
TABLE = paddle.ones([3, 4])


def call(name: str, *arguments):
    return paddle._C_ops._run_custom_op(name, *arguments)


def attention(
    q=FLOATS, k=FLOATS, v=FLOATS, prefix=None, documents=None, alibi=None, window=0, cap=0.0
):
    settings = (prefix, documents, alibi, 1.0, cap, True, window)
    return call("pypkg_flash_attention", q, k, v, *settings)


def rotary(q=FLOATS, k=FLOATS, cos=TABLE, sin=TABLE, ids=None, offset=0):
    return call("pypkg_rotary_embedding", q, k, cos, sin, ids, False, offset)


def forward(logits=FLOATS, labels=None, start=0, size=8):
    labels = paddle.zeros([2, 3, 4], "int64") if labels is None else labels
    return call("pypkg_cross_entropy_forward", logits, labels, start, size, -100)


WRONG = {
    "rms_norm weight": (
        lambda: call("pypkg_rms_norm", FLOATS, paddle.ones([7]), 1e-6),
        r"weight must have shape \[8\], got \[7\]",
    ),
    "rms_norm weight dtype": (
        lambda: call("pypkg_rms_norm", FLOATS, paddle.ones([8], "bfloat16"), 1e-6),
        "weight must be float32, got bfloat16",
    ),
    "rms_norm dtype": (
        lambda: call("pypkg_rms_norm", paddle.ones([2, 8], "int32"), paddle.ones([8]), 1e-6),
        "x must be float32, float16 or bfloat16, got int32",
    ),
    "rms_norm residual": (
        lambda: call("pypkg_add_rms_norm", FLOATS, FLOATS[0], paddle.ones([8]), 1e-6),
        r"residual must have shape \[2, 3, 4, 8\], got \[3, 4, 8\]",
    ),
    "gated_activation up": (
        lambda: call("pypkg_gated_activation", FLOATS, FLOATS[0], 0),
        r"up must have shape \[2, 3, 4, 8\], got \[3, 4, 8\]",
    ),
    "gated_activation odd": (
        lambda: call("pypkg_packed_gated_activation", paddle.ones([2, 3]), 0, True),
        "last dimension must be even, got 3",
    ),
    "gated_activation number": (
        lambda: call("pypkg_gated_activation", FLOATS, FLOATS, 3),
        "activation must be from 0 to 2, got 3",
    ),
    "rotary_embedding rank": (
        lambda: rotary(q=FLOATS[0]),
        r"q must have 4 dimensions, got shape \[3, 4, 8\]",
    ),
    "rotary_embedding k": (
        lambda: rotary(k=paddle.ones([2, 5, 4, 8])),
        r"k must have shape \[2, 3, 4, 8\], got \[2, 5, 4, 8\]",
    ),
    "rotary_embedding sin": (
        lambda: rotary(sin=paddle.ones([2, 4])),
        r"sin must have shape \[3, 4\], got \[2, 4\]",
    ),
    "rotary_embedding offset": (lambda: rotary(offset=1), r"dimensions \[1, 9\)"),
    "rotary_embedding length": (
        lambda: rotary(cos=TABLE[:2], sin=TABLE[:2]),
        "3 tokens, but cos and sin hold only 2 positions",
    ),
    "rotary_embedding ids": (
        lambda: rotary(ids=paddle.zeros([2, 4], "int64")),
        r"position_ids must have shape \[2, 3\], got \[2, 4\]",
    ),
    "flash_attention k": (
        lambda: attention(k=paddle.ones([2, 3, 4, 16])),
        r"k must have shape \[2, 3, 4, 8\], got \[2, 3, 4, 16\]",
    ),
    "flash_attention heads": (
        lambda: attention(k=FLOATS[:, :, :3], v=FLOATS[:, :, :3]),
        "4 heads of q must be a multiple of the 3",
    ),
    "flash_attention head_dim": (
        lambda: attention(*[paddle.ones([1, 2, 1, 12])] * 3),
        "head_dim must be a multiple of 8 up to 256, got 12",
    ),
    "flash_attention prefix": (
        lambda: attention(prefix=paddle.ones([2], "int64")),
        "prefix_lengths must be int32, got int64",
    ),
    "flash_attention documents": (
        lambda: attention(documents=paddle.ones([2, 4], "int32")),
        r"document_starts must have shape \[2, 3\], got \[2, 4\]",
    ),
    "flash_attention alibi": (
        lambda: attention(alibi=paddle.ones([3])),
        r"alibi_slopes must have shape \[4\], got \[3\]",
    ),
    "flash_attention head_dim too large": (
        lambda: attention(*[paddle.ones([1, 2, 1, 264])] * 3),
        "head_dim must be a multiple of 8 up to 256, got 264",
    ),
    "flash_attention softcap": (lambda: attention(cap=-1.0), "softcap must be .*, got -1"),
    "flash_attention softcap nan": (lambda: attention(cap=math.nan), "softcap must be .*, got nan"),
    "flash_attention window": (lambda: attention(window=-1), "window must be .*, got -1"),
    "cross_entropy labels": (
        lambda: forward(labels=paddle.zeros([2, 3], "int64")),
        r"labels must have shape \[2, 3, 4\], got \[2, 3\]",
    ),
    "cross_entropy labels dtype": (
        lambda: forward(labels=paddle.zeros([2, 3, 4], "int32")),
        "labels must be int64, got int32",
    ),
    "cross_entropy shard": (
        lambda: forward(start=4),
        r"columns \[4, 12\) lie outside a vocabulary of 8",
    ),
    "cross_entropy lse": (
        lambda: call(
            "pypkg_cross_entropy_backward",
            FLOATS,
            paddle.zeros([2, 3, 4], "int64"),
            paddle.ones([2, 3]),
            paddle.ones([2, 3, 4]),
            0,
            -100,
            False,
        ),
        r"lse must have shape \[2, 3, 4\], got \[2, 3\]",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_refused(compiled, name):
    function, message = WRONG[name]
    with pytest.raises(ValueError, match=name.split()[0] + ".*" + message):
        function()


def test_float16_needs_a_gpu(compiled):
    """The CPU kernels know float32 and bfloat16; on a CPU the reference takes float16."""
    x = paddle.ones([2, 8]).astype("float16")
    with pytest.raises(ValueError, match="float16 is not supported on CPU"):
        run_compiled("pypkg_packed_gated_activation", [x], 0, True)
    assert ops.swiglu(x).dtype == paddle.float16
