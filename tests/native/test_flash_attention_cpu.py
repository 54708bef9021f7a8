from __future__ import annotations

import numpy as np
import pytest
import references as ref
from kernel_testing import DTYPES, arg, assert_close, load, poisoned, store

from pypkg import _native


def document_starts(batch, seq, lengths):
    """Position of the first token of each token's document; row b starts lengths[b:] in turn."""
    rows = []
    for b in range(batch):
        order = list(lengths[b % len(lengths) :]) + list(lengths)
        starts = np.repeat(np.cumsum([0, *order[:-1]]), order)
        rows.append(np.resize(starts, seq) if len(starts) >= seq else None)
    return np.array(rows, np.int32)


def run(q, k, v, dout, scale, **mask):
    """Every output of forward and backward, from poisoned memory."""
    dtype = "float32" if q.dtype == np.float32 else "bfloat16"
    batch, seq_q, heads_q, _ = q.shape
    out, lse = poisoned(q.shape, dtype), poisoned((batch, heads_q, seq_q))
    _native.flash_attention_forward(arg(q), arg(k), arg(v), arg(out), lse, scale=scale, **mask)
    dq, dk, dv = (poisoned(x.shape, dtype) for x in (q, k, v))
    workspace = poisoned((_native.flash_attention_backward_workspace(arg(q), arg(k)),))
    arrays = (dout, q, k, v, out, lse, dq, dk, dv, workspace)
    _native.flash_attention_backward(*map(arg, arrays), scale=scale, **mask)
    return out, lse, dq, dk, dv


def inputs(rng, dtype, batch, seq_q, seq_k, heads_q, heads_k, head_dim):
    q, dout = (store(rng.normal(size=(batch, seq_q, heads_q, head_dim)), dtype) for _ in range(2))
    k, v = (store(rng.normal(size=(batch, seq_k, heads_k, head_dim)), dtype) for _ in range(2))
    return q, k, v, dout


def expected_results(arrays, scale, alibi_slopes=None, softcap=0.0, **mask):
    """What ``run`` returns, in float64."""
    q, k, v, dout = map(load, arrays)
    seen = ref.visible(len(q), q.shape[1], k.shape[1], **mask)
    lead = mask["query_offset"] - mask["key_offset"] if "query_offset" in mask else None
    out, lse, p = ref.attention(q, k, v, scale, seen, alibi_slopes, softcap, lead)
    return out, lse, *ref.attention_gradients(dout, q, k, v, out, p, scale, softcap)


def check(arrays, results, scale, **mask):
    reference = expected_results(arrays, scale, **mask)
    # exp makes the rounding of a score, a part in 2^24 of it, a relative error of the probability.
    largest_score = np.abs(reference[1][np.isfinite(reference[1])]).max(initial=0)
    if "alibi_slopes" in mask:
        farthest = max(arrays[0].shape[1], arrays[1].shape[1])
        if "query_offset" in mask:
            farthest += abs(mask["query_offset"] - mask["key_offset"])
        largest_score += mask["alibi_slopes"].max() * farthest
    # Gradients are sums of dot products of head_dim standard normal numbers, and may cancel.
    magnitude = 2 * np.sqrt(arrays[0].shape[-1])
    for index, (actual, expected) in enumerate(zip(results, reference)):
        units = 100 + largest_score
        if actual.dtype == np.uint16 and index in (2, 3):
            # dq and dk contain sum(dout * out) with out as the forward pass rounded it (2^-9).
            units = 2.0**24 * 2.0**-9
        assert_close(actual, expected, units, magnitude)


# batch, seq_q, seq_k, heads_q, heads_k, head_dim. Blocks are 128 queries, and 128 or 64 keys.
SHAPES = [
    (1, 1, 1, 1, 1, 8),
    (2, 7, 7, 3, 3, 24),
    (1, 64, 64, 2, 1, 64),
    (2, 65, 65, 4, 2, 80),
    (1, 130, 130, 5, 1, 128),
    (1, 40, 200, 2, 2, 40),
    (1, 200, 40, 2, 1, 16),  # the first 160 queries see nothing under a causal mask
    (1, 1, 133, 3, 1, 72),
    (1, 131, 131, 2, 1, 136),
    (1, 129, 129, 1, 1, 256),
    (9, 67, 67, 2, 2, 32),  # as many heads as make one chunk of the backward pass
]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(rng, shape, dtype, causal):
    arrays = inputs(rng, dtype, *shape)
    scale = shape[-1] ** -0.5
    check(arrays, run(*arrays, scale, causal=causal), scale, causal=causal)


@pytest.mark.parametrize("seq_q, seq_k", [(4200, 4200), (4200, 90), (90, 4200)])
def test_more_rows_than_packed_blocks_are_kept(rng, seq_q, seq_k):
    """Beyond 4096 rows of a head a packed block takes the place of an earlier one."""
    arrays = inputs(rng, "float32", 1, seq_q, seq_k, 1, 1, 8)
    check(arrays, run(*arrays, 0.3, causal=True), 0.3, causal=True)


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("alibi", [False, True])
@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("window", [0, 1, 50])
@pytest.mark.parametrize("causal", [True, False])
def test_mask_combinations(rng, causal, window, prefix, alibi, documents):
    batch, seq = 2, 150
    arrays = inputs(rng, "float32", batch, seq, seq, 4, 2, 16)
    mask = {"causal": causal, "window": window}
    if prefix:
        mask["prefix_lengths"] = np.array([0, 97], np.int32)
    if documents:
        mask["document_starts"] = document_starts(batch, seq, [70, 1, 30, 64, 80])
    if alibi:
        mask["alibi_slopes"] = np.array([0.5, 0.25, 0.125, 2.0], np.float32)
    check(arrays, run(*arrays, 0.25, **mask), 0.25, **mask)


@pytest.mark.parametrize("seq_q, seq_k", [(100, 260), (260, 100)])
@pytest.mark.parametrize("window", [0, 33])
def test_masks_with_other_number_of_keys(rng, seq_q, seq_k, window):
    arrays = inputs(rng, "float32", 1, seq_q, seq_k, 2, 1, 32)
    mask = {
        "window": window,
        "prefix_lengths": np.array([20], np.int32),
        "alibi_slopes": np.array([0.1, 1.0], np.float32),
    }
    check(arrays, run(*arrays, 0.2, **mask), 0.2, **mask)


@pytest.fixture(params=_native.cpu_isas())
def each_isa(request):
    _native.set_cpu_isa(request.param)
    yield
    _native.set_cpu_isa("")


@pytest.mark.parametrize("words", ["", "window", "full", "prefix", "documents, alibi"])
@pytest.mark.parametrize("offsets", [(0, 0), (190, 77), (77, 190), (400, 3), (150, 133)])
def test_blocks_of_a_longer_sequence(rng, each_isa, words, offsets):
    """150 queries and 201 keys, from positions that are no multiples of the kernels' blocks on."""
    arrays = inputs(rng, "float32", 2, 150, 201, 4, 2, 24)
    mask = {"causal": words != "full", "query_offset": offsets[0], "key_offset": offsets[1]}
    if words == "window":
        mask["window"] = 130
    if words == "prefix":
        mask["prefix_lengths"] = np.array([0, 250], np.int32)
    if words.startswith("documents"):
        mask["document_starts"] = document_starts(2, 600, [170, 1, 130, 64, 235])
        mask["alibi_slopes"] = np.array([0.5, 0.25, 0.125, 2.0], np.float32)
    check(arrays, run(*arrays, 0.2, **mask), 0.2, **mask)


def test_offsets_that_align_queries_to_the_last_keys_change_no_bit(rng):
    arrays = inputs(rng, "float32", 1, 70, 170, 2, 1, 40)
    shifted = run(*arrays, 0.2, window=60, query_offset=1100, key_offset=1000)
    for actual, wanted in zip(shifted, run(*arrays, 0.2, window=60), strict=True):
        np.testing.assert_array_equal(actual, wanted)


@pytest.mark.parametrize("softcap", [0.25, 2.0, 1000.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1, 1, 1, 8), (2, 67, 67, 4, 2, 24), (1, 40, 200, 2, 2, 80), (1, 131, 131, 1, 1, 256)],
)
def test_softcap(rng, shape, dtype, softcap):
    """Scores have a deviation of 1: from a cap that most reach to one that changes little."""
    arrays = inputs(rng, dtype, *shape)
    options = {"softcap": softcap, "window": 50}
    if dtype == "float32":
        options["alibi_slopes"] = np.linspace(0.1, 0.5, shape[3], dtype=np.float32)
    scale = shape[-1] ** -0.5
    check(arrays, run(*arrays, scale, **options), scale, **options)


def test_queries_that_see_nothing(rng):
    arrays = inputs(rng, "float32", 1, 90, 30, 2, 2, 16)
    out, lse, dq, dk, dv = run(*arrays, 0.25, causal=True)
    np.testing.assert_array_equal(out[:, :60], 0.0)
    np.testing.assert_array_equal(lse[:, :, :60], -np.inf)
    np.testing.assert_array_equal(dq[:, :60], 0.0)
    # They send no gradient: dk and dv are those of the other queries alone.
    q, k, v, dout = arrays
    seeing = [np.ascontiguousarray(x[:, 60:]) for x in (q, dout)]
    _, _, _, dk_alone, dv_alone = run(seeing[0], k, v, seeing[1], 0.25, causal=True)
    np.testing.assert_allclose(dk, dk_alone, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(dv, dv_alone, rtol=1e-5, atol=1e-6)


def test_keys_that_nobody_sees_get_zero_gradient(rng):
    arrays = inputs(rng, "float32", 1, 10, 200, 2, 1, 16)
    _, _, _, dk, dv = run(*arrays, 0.25, causal=True, window=5)
    np.testing.assert_array_equal(dk[:, :186], 0.0)
    np.testing.assert_array_equal(dv[:, :186], 0.0)
    assert np.abs(dk[:, 186:]).min(axis=-1).max() > 0.0


def test_large_scores(rng):
    """Scores of several hundred: nothing overflows, the softmax is nearly one-hot."""
    arrays = inputs(rng, "float32", 1, 70, 70, 1, 1, 32)
    results = run(*arrays, 30.0)
    assert all(np.isfinite(x).all() for x in results)
    reference = expected_results(arrays, 30.0)
    # Scores near 500 carry roundings of 500 * 2^-24, which exp turns into a relative error.
    for actual, expected in zip(results, reference):
        np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())


@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (8, 1)])
def test_results_do_not_depend_on_threads(rng, heads, every_thread_count):
    arrays = inputs(rng, "float32", 1, 150, 150, *heads, 24)
    results = []
    for count in every_thread_count:
        _native.set_num_threads(count)
        results.append(run(*arrays, 0.2))
    for other in results[1:]:
        for a, b in zip(results[0], other):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    "shape, message",
    [
        ((1, 4, 4, 3, 2, 8), "heads_q 3 must be a multiple of heads_k 2"),
        ((1, 4, 4, 2, 2, 12), "head_dim 12 must be a multiple of 8"),
        ((1, 4, 4, 2, 2, 264), "head_dim 264 must be a multiple of 8, at most 256"),
    ],
)
def test_bad_shapes(rng, shape, message):
    with pytest.raises(ValueError, match=message):
        run(*inputs(rng, "float32", *shape), 1.0)


def test_bad_masks(rng):
    arrays = inputs(rng, "float32", 2, 4, 6, 2, 2, 8)
    with pytest.raises(ValueError, match="as many queries as keys, got 4 and 6"):
        run(*arrays, 1.0, document_starts=np.zeros((2, 6), np.int32))
    with pytest.raises(ValueError, match=r"prefix_lengths has shape \[1\], expected \[batch = 2\]"):
        run(*arrays, 1.0, prefix_lengths=np.zeros(1, np.int32))
    with pytest.raises(ValueError, match="6 tokens, fewer than the blocks reach to"):
        documents = np.zeros((2, 6), np.int32)
        run(*arrays, 1.0, document_starts=documents, query_offset=2, key_offset=1)
    with pytest.raises(ValueError, match="query_offset and key_offset must be 0 or more"):
        run(*arrays, 1.0, query_offset=-1)
    with pytest.raises(ValueError, match=r"window must be 0 .* got -1"):
        run(*arrays, 1.0, window=-1)
