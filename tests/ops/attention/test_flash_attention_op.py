from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import paddle
import pytest
from op_testing import check_against_reference, parameter, random, run

from pypkg.ops import AttentionMask, flash_attention, flash_attention_reference

BACKENDS = ("compiled", "reference")  # Triton has no attention of its own
BATCH, SEQUENCE, HEADS = 2, 37, 4

# Scores are sums of head_dim products and reach about 5 here; exp turns their absolute error, a few
# roundings at that size, into a relative one.
FLOAT32_TOLERANCE = 1e-5


def starts(lengths: Sequence[list[int]]) -> paddle.Tensor:
    rows = [np.repeat(np.cumsum([0, *row[:-1]]), row) for row in lengths]
    return paddle.to_tensor(np.stack(rows).astype("int32"))


def masks(
    prefix_length: int = 5,
    lengths: Sequence[list[int]] = ([10, 1, 26], [37]),
    windows: Sequence[int] = (6, 6, 4, 7),
) -> dict[str, AttentionMask]:
    """Masks of two sequences of 37 tokens, or of as many as ``lengths`` add up to.

    Args:
        prefix_length: of the first sequence.
        lengths: of the documents of each sequence.
        windows: under a causal mask, under none, with documents and ALiBi, and with a prefix.
    """
    causal_window, full_window, window_of_documents, window_of_prefix = windows
    prefix = paddle.to_tensor([prefix_length, 0], dtype="int32")
    documents = starts(lengths)
    slopes = paddle.to_tensor([0.5, 0.25, 0.125, 0.0625])
    return {
        "causal": AttentionMask(),
        "full": AttentionMask(causal=False),
        "window": AttentionMask(window=causal_window),
        "window of one": AttentionMask(window=1),
        "full, window": AttentionMask(causal=False, window=full_window),
        "prefix": AttentionMask(prefix_lengths=prefix),
        "documents": AttentionMask(document_starts=documents),
        "full, documents": AttentionMask(causal=False, document_starts=documents),
        "alibi": AttentionMask(alibi_slopes=slopes),
        "documents, window, alibi": AttentionMask(
            window=window_of_documents, document_starts=documents, alibi_slopes=slopes
        ),
        "prefix, documents": AttentionMask(prefix_lengths=prefix, document_starts=documents),
        "prefix, window": AttentionMask(prefix_lengths=prefix, window=window_of_prefix),
    }


def qkv(seq_q=SEQUENCE, seq_k=SEQUENCE, heads_k=HEADS, head_dim=16, batch=BATCH):
    shapes = [(batch, seq_q, HEADS, head_dim)] + [(batch, seq_k, heads_k, head_dim)] * 2
    return [random(shape, i) for i, shape in enumerate(shapes)]


def both(mask: AttentionMask | None, scale: float | None = None, softcap: float = 0.0):
    return (
        lambda q, k, v: flash_attention(q, k, v, mask, scale, softcap=softcap),
        lambda q, k, v: flash_attention_reference(q, k, v, mask, scale, softcap)[0],
    )


def loop_attention(q, k, v, mask: AttentionMask, scale: float, softcap: float = 0.0):
    """The definition, one query at a time, in NumPy."""
    batch, seq_q, heads, _ = q.shape
    seq_k, group = k.shape[1], heads // k.shape[2]
    out, lse = np.zeros_like(q), np.full((batch, heads, seq_q), -np.inf)
    for b, h, r in np.ndindex(batch, heads, seq_q):
        i, scores, values = r + seq_k - seq_q, [], []
        for j in range(seq_k):
            prefix = mask.prefix_lengths is not None and j < int(mask.prefix_lengths[b])
            seen = not mask.causal or j <= i or prefix
            seen &= mask.window is None or i - j < mask.window
            if mask.document_starts is not None:
                seen &= int(mask.document_starts[b, i]) == int(mask.document_starts[b, j])
            if seen:
                bias = 0 if mask.alibi_slopes is None else float(mask.alibi_slopes[h]) * (j - i)
                score = scale * q[b, r, h] @ k[b, j, h // group]
                score = softcap * math.tanh(score / softcap) if softcap else score
                scores.append(score + bias)
                values.append(v[b, j, h // group])
        if scores:
            weights = np.exp(scores)
            out[b, r, h] = weights @ np.stack(values) / weights.sum()
            lse[b, h, r] = np.log(weights.sum())
    return out, lse


@pytest.mark.parametrize("softcap", [0.0, 1.5])
@pytest.mark.parametrize("name", masks())
def test_reference_is_the_definition(name, softcap):
    arrays = qkv(heads_k=2, head_dim=5)
    expected_out, expected_lse = loop_attention(*arrays, masks()[name], 0.3, softcap)
    tensors = [paddle.to_tensor(each) for each in arrays]
    out, lse = flash_attention_reference(*tensors, masks()[name], 0.3, softcap)
    np.testing.assert_allclose(out.numpy(), expected_out, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(lse.numpy(), expected_lse, rtol=1e-9)


@pytest.mark.parametrize("heads_k", [4, 2, 1])
@pytest.mark.parametrize("name", masks())
def test_masks(each_backend, name, heads_k):
    check_against_reference(*both(masks()[name]), qkv(heads_k=heads_k), tolerance=FLOAT32_TOLERANCE)


@pytest.mark.parametrize("head_dim", [1, 8, 20, 40, 64, 80, 96, 100, 128, 136, 192, 250, 256])
def test_head_dims(each_backend, head_dim):
    """Those that are no multiple of 8 are padded inside."""
    check_against_reference(*both(None), qkv(head_dim=head_dim), tolerance=FLOAT32_TOLERANCE)


@pytest.mark.parametrize(("seq_q", "seq_k"), [(1, 1), (1, 33), (5, 130), (130, 130), (9, 4)])
@pytest.mark.parametrize("causal", [True, False])
def test_lengths(each_backend, seq_q, seq_k, causal):
    """Of 9 queries on 4 keys the first 5 see nothing when causal: they give and send 0."""
    arrays = qkv(seq_q, seq_k, heads_k=2)
    check_against_reference(
        *both(AttentionMask(causal=causal)), arrays, tolerance=FLOAT32_TOLERANCE
    )


def test_row_that_sees_nothing(each_backend):
    inputs = [parameter(each) for each in qkv(9, 4)]
    out, lse = flash_attention(*inputs, return_softmax_lse=True)
    assert (out.numpy()[:, :5] == 0).all()
    assert (lse.numpy()[:, :, :5] == -np.inf).all()
    assert np.isfinite(lse.numpy()[:, :, 5:]).all()
    _, (dq, dk, dv) = run(flash_attention, inputs)
    assert (dq[:, :5] == 0).all()
    assert np.isfinite(dk).all() and np.isfinite(dv).all()


def test_bfloat16(each_backend):
    """Inside, probabilities may be rounded to bfloat16 once more than the result."""
    mask = masks()["documents, window, alibi"]
    check_against_reference(*both(mask), qkv(heads_k=2, head_dim=64), "bfloat16", 2.0**-6)


def test_scale_and_softmax_lse(each_backend):
    arrays = qkv(head_dim=12)
    tensors = [paddle.to_tensor(each.astype("float32")) for each in arrays]
    out, lse = flash_attention(*tensors, scale=0.7, return_softmax_lse=True)
    expected_out, expected_lse = loop_attention(*arrays, AttentionMask(), 0.7)
    assert lse.dtype == paddle.float32 and lse.stop_gradient
    np.testing.assert_allclose(out.numpy(), expected_out, atol=1e-5)
    np.testing.assert_allclose(lse.numpy(), expected_lse, atol=1e-5)


def test_default_scale_counts_the_unpadded_head_dim(each_backend):
    tensors = [paddle.to_tensor(each.astype("float32")) for each in qkv(head_dim=5)]
    explicit = flash_attention(*tensors, scale=1 / math.sqrt(5))
    np.testing.assert_array_equal(flash_attention(*tensors).numpy(), explicit.numpy())


@pytest.mark.parametrize("head_dim", [20, 256])
@pytest.mark.parametrize("softcap", [0.5, 50.0])
@pytest.mark.parametrize("name", masks())
def test_softcap(each_backend, name, softcap, head_dim):
    """Scores reach about 5: a cap of 0.5 flattens them, one of 50 hardly bends them."""
    arrays = qkv(heads_k=2, head_dim=head_dim)
    functions = both(masks()[name], softcap=softcap)
    check_against_reference(*functions, arrays, tolerance=FLOAT32_TOLERANCE)


def test_softcap_in_bfloat16(each_backend):
    mask = masks()["documents, window, alibi"]
    arrays = qkv(heads_k=2, head_dim=64)
    check_against_reference(*both(mask, softcap=2.0), arrays, "bfloat16", 2.0**-6)


def test_softcap_bounds_scores(each_backend):
    """Scores of thousands become 3 or -3: the flattest and steepest softmax there can be."""
    arrays = qkv(head_dim=8)
    tensors = [paddle.to_tensor(each.astype("float32")) for each in arrays]
    _, lse = flash_attention(
        *tensors, AttentionMask(causal=False), 1e4, return_softmax_lse=True, softcap=3.0
    )
    _, expected = loop_attention(*arrays, AttentionMask(causal=False), 1e4, 3.0)
    np.testing.assert_allclose(lse.numpy(), expected, rtol=1e-4)
    assert (np.abs(lse.numpy() - math.log(SEQUENCE)) < 3).all()


def test_large_scores(each_backend):
    """Scores of thousands: exp of them overflows unless the maximum is taken off."""
    check_against_reference(*both(None, scale=300.0), qkv(head_dim=8), tolerance=3e-3)


def test_empty_batch(each_backend):
    q = parameter(np.zeros((0, 5, 4, 8)))
    out = flash_attention(q, q, q)
    assert list(out.shape) == [0, 5, 4, 8]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"k": paddle.ones([2, 6, 3, 8])}, ValueError, "v must have shape .2, 6, 3, 8., got"),
        (
            {"k": paddle.ones([2, 5, 3, 8]), "v": paddle.ones([2, 5, 3, 8])},
            ValueError,
            "4 heads of q must be a multiple of the 3 heads",
        ),
        ({"v": paddle.ones([2, 5, 4, 8], "bfloat16")}, TypeError, "v must be float32, got bfloat"),
        ({"q": paddle.ones([2, 5, 4])}, ValueError, r"q must have shape .*, got \[2, 5, 4\]"),
    ],
)
def test_wrong_inputs(each_backend, change, error, message):
    good = {name: paddle.ones([2, 5, 4, 8]) for name in "qkv"}
    with pytest.raises(error, match="flash_attention: .*" + message):
        flash_attention(**{**good, **change})


def test_head_dim_too_large(each_backend):
    q = paddle.ones([1, 2, 1, 264])
    with pytest.raises(ValueError, match="head_dim must be from 1 to 256, got 264"):
        flash_attention(q, q, q)


@pytest.mark.parametrize("softcap", [-1.0, math.inf, math.nan])
def test_wrong_softcap(each_backend, softcap):
    q = paddle.ones([1, 2, 1, 8])
    with pytest.raises(ValueError, match=f"softcap must be 0 .* got {softcap}"):
        flash_attention(q, q, q, softcap=softcap)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"window": 0}, ValueError, "window must be at least 1 or None, got 0"),
        (
            {"causal": False, "prefix_lengths": paddle.ones([2], "int32")},
            ValueError,
            "prefix_lengths need causal=True",
        ),
        ({"prefix_lengths": paddle.ones([2])}, TypeError, "prefix_lengths must be int32, got flo"),
        ({"alibi_slopes": paddle.ones([4], "float64")}, TypeError, "must be float32, got float64"),
        (
            {"document_starts": paddle.ones([5], "int32")},
            ValueError,
            r"document_starts must have shape \[batch, seq_k\], got \[5\]",
        ),
    ],
)
def test_wrong_masks(arguments, error, message):
    with pytest.raises(error, match="AttentionMask: .*" + message):
        AttentionMask(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prefix_lengths": paddle.ones([3], "int32")}, r"must have shape \[2\], got \[3\]"),
        ({"alibi_slopes": paddle.ones([2])}, r"must have shape \[4\], got \[2\]"),
        ({"document_starts": paddle.ones([2, 6], "int32")}, r"must have shape \[2, 5\], got"),
    ],
)
def test_masks_that_do_not_fit(each_backend, arguments, message):
    q = paddle.ones([2, 5, 4, 8])
    with pytest.raises(ValueError, match=message):
        flash_attention(q, q, q, AttentionMask(**arguments))


def test_documents_need_equal_lengths(each_backend):
    q, k = paddle.ones([1, 3, 4, 8]), paddle.ones([1, 5, 4, 8])
    mask = AttentionMask(document_starts=paddle.zeros([1, 5], "int32"))
    with pytest.raises(ValueError, match="3 queries and 5 keys"):
        flash_attention(q, k, k, mask)
