from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from kernel_testing import DTYPES, arg, assert_close, load, poisoned, store

from pypkg import _native

IGNORE = -100
# More columns than one chunk of the kernel (2048), and the awkward sizes.
SHAPES = [(1, 1), (1, 2), (5, 760), (3, 1128), (4, 5003)]


def forward(logits, labels, **options):
    names = ("loss", "lse", "row_max", "row_sum", "target")
    outputs = {name: poisoned((len(labels),)) for name in names}
    _native.cross_entropy_forward(arg(logits), labels, **outputs, **options)
    return outputs


def backward(logits, labels, lse, dloss, in_place=False, **options):
    dtype = "float32" if logits.dtype == np.float32 else "bfloat16"
    dlogits = logits.copy() if in_place else poisoned(logits.shape, dtype)
    source = dlogits if in_place else logits
    _native.cross_entropy_backward(arg(source), labels, lse, dloss, arg(dlogits), **options)
    return dlogits


def reference(logits, labels, dloss):
    x = load(logits)
    top = x.max(axis=1)
    lse = top + np.log(np.exp(x - top[:, None]).sum(axis=1))
    keep = labels != IGNORE
    rows = np.arange(len(labels))
    safe = np.where(keep, labels, 0)
    loss = np.where(keep, lse - x[rows, safe], 0.0)
    gradient = np.exp(x - lse[:, None])
    gradient[rows, safe] -= 1
    return loss, lse, np.where(keep, dloss, 0)[:, None] * gradient


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 300.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_against_float64(rng, shape, scale, dtype, in_place):
    rows, cols = shape
    logits = store(rng.normal(0, scale, shape), dtype)
    labels = rng.integers(0, cols, rows)
    if rows > 2:
        labels[1] = IGNORE
    dloss = rng.normal(size=rows).astype(np.float32)
    loss, lse, dlogits = reference(logits, labels, load(dloss))
    out = forward(logits, labels)
    assert_close(out["lse"], lse)
    # loss is a difference of numbers of the size of lse
    np.testing.assert_allclose(load(out["loss"]), loss, rtol=1e-5, atol=1e-6 * np.abs(lse).max())
    np.testing.assert_array_equal(load(out["row_max"]), load(logits).max(axis=1))
    actual = backward(logits, labels, out["lse"], dloss, in_place)
    # e^(x - lse) has the rounding of its exponent, |lse| * 2^-24, as a relative error.
    assert_close(actual, dlogits, 40 + np.abs(lse).max())


@pytest.mark.parametrize("dtype", DTYPES)
def test_impossible_entries(rng, dtype):
    """Logits of -inf are entries of probability 0."""
    x = rng.normal(size=(3, 50))
    x[0, 7:] = -np.inf
    x[1, :49] = -np.inf
    x[2, ::2] = -np.inf
    logits, labels = store(x, dtype), np.array([3, 49, 0])
    out = forward(logits, labels)
    dloss = np.ones(3, np.float32)
    loss, lse, dlogits = reference(logits, labels, dloss)
    assert_close(out["lse"], lse)
    assert_close(out["loss"][:2], loss[:2])
    assert out["loss"][2] == np.inf  # its label is impossible
    assert_close(backward(logits, labels, out["lse"], dloss), dlogits)


def test_row_without_any_possible_entry_is_nan():
    """The softmax of nothing but -inf is undefined; the parts still merge with other shards."""
    logits = np.full((1, 5000), -np.inf, np.float32)
    labels = np.array([1])
    out = forward(logits, labels)
    assert np.isnan(out["loss"][0])
    assert out["lse"][0] == -np.inf
    assert out["row_max"][0] == -np.inf
    assert out["row_sum"][0] == 0.0
    gradient = backward(logits, labels, out["lse"], np.ones(1, np.float32))
    assert np.isnan(gradient).all()


@pytest.mark.parametrize("where", [0, 2050, 4999])
def test_nan_logit_shows_in_the_loss(rng, where):
    logits = store(rng.normal(size=(2, 5000)), "float32")
    logits[0, where] = np.nan
    out = forward(logits, np.array([1, 1]))
    assert np.isnan(out["loss"][0])
    assert np.isfinite(out["loss"][1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("in_place", [False, True])
def test_ignored_rows_give_zero_whatever_they_hold(rng, dtype, in_place):
    x = rng.normal(size=(4, 37))
    x[0], x[1], x[2, 5] = np.nan, np.inf, -np.inf
    logits, labels = store(x, dtype), np.full(4, IGNORE)
    out = forward(logits, labels)
    np.testing.assert_array_equal(out["loss"], 0.0)
    np.testing.assert_array_equal(out["target"], 0.0)
    dloss = np.full(4, np.nan, np.float32)
    np.testing.assert_array_equal(load(backward(logits, labels, out["lse"], dloss, in_place)), 0.0)


def test_other_ignore_index(rng):
    logits, labels = store(rng.normal(size=(2, 9)), "float32"), np.array([3, 0])
    out = forward(logits, labels, ignore_index=3)
    assert out["loss"][0] == 0.0
    assert out["loss"][1] > 0.0
    gradient = backward(logits, labels, out["lse"], np.ones(2, np.float32), ignore_index=3)
    np.testing.assert_array_equal(gradient[0], 0.0)
    assert gradient[1, 0] < 0.0


@pytest.mark.parametrize("label", [-1, 10, 2**40])
def test_label_out_of_range(label):
    logits = np.zeros((3, 10), np.float32)
    with pytest.raises(IndexError, match=rf"label {label} of row 2 .* vocabulary of 10 entries"):
        forward(logits, np.array([0, IGNORE, label]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_vocabulary_in_shards(rng, dtype):
    """Merged as the header says, uneven shards give what the whole row gives."""
    rows, bounds = 6, [0, 3, 700, 760]
    logits = store(rng.normal(0, 4, (rows, bounds[-1])), dtype)
    logits[0, 3:] = store(np.full(bounds[-1] - 3, -np.inf), dtype)
    labels = np.array([1, 2, 3, 699, 700, IGNORE])
    dloss = rng.normal(size=rows).astype(np.float32)
    whole = forward(logits, labels)
    shards = [np.ascontiguousarray(logits[:, a:b]) for a, b in pairwise(bounds)]
    parts = [
        forward(shard, labels, vocab_start=start, vocab_size=bounds[-1])
        for shard, start in zip(shards, bounds)
    ]
    row_max, row_sum, target = (
        np.stack([load(p[name]) for p in parts]) for name in ("row_max", "row_sum", "target")
    )
    top = row_max.max(axis=0)
    lse = top + np.log((row_sum * np.exp(row_max - top)).sum(axis=0))
    loss = np.where(labels == IGNORE, 0.0, lse - target.sum(axis=0))
    assert_close(whole["lse"], lse)
    np.testing.assert_allclose(load(whole["loss"]), loss, rtol=1e-5, atol=1e-5)

    expected = backward(logits, labels, whole["lse"], dloss)
    gradients = [
        backward(shard, labels, whole["lse"], dloss, vocab_start=start)
        for shard, start in zip(shards, bounds)
    ]
    np.testing.assert_array_equal(np.concatenate(gradients, axis=1), expected)


def test_threads_do_not_matter(rng, every_thread_count):
    logits, labels = store(rng.normal(size=(11, 3000)), "float32"), rng.integers(0, 3000, 11)
    results = []
    for count in every_thread_count:
        _native.set_num_threads(count)
        results.append(forward(logits, labels)["loss"])
    assert all(np.array_equal(results[0], other) for other in results[1:])
