"""The index maps against an independent description of them."""

from __future__ import annotations

import numpy as np
import pytest
from corpora import counting_documents
from hypothesis import given, settings
from hypothesis import strategies as st

from pypkg import _native
from pypkg.data.index import (
    build_index_maps,
    build_sample_index,
    index_dtype,
    num_epochs,
    shuffle_dtype,
    split_boundaries,
)
from pypkg.errors import UserError


def sample_index_oracle(
    sizes: np.ndarray, document_index: np.ndarray, seq_length: int, num_samples: int
) -> np.ndarray:
    """Finds every seq_length-th token by a search in the running total of sizes."""
    ends = np.concatenate([[0], np.cumsum(sizes[document_index], dtype=np.int64)])
    tokens = np.arange(num_samples + 1) * seq_length
    positions = np.searchsorted(ends, tokens, side="right") - 1
    rows = np.stack([positions, tokens - ends[positions]], axis=1)
    rows[0] = 0  # the search would jump over empty documents at the very beginning
    return rows


@settings(max_examples=200, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 12), min_size=1, max_size=30).filter(any),
    seq_length=st.integers(1, 20),
    epochs=st.integers(1, 3),
    dtype=st.sampled_from([np.int32, np.int64]),
    seed=st.integers(0, 2**32 - 1),
)
def test_sample_index_matches_oracle(sizes, seq_length, epochs, dtype, seed):
    sizes = np.array(sizes, np.int32)
    document_index = np.tile(np.arange(len(sizes), dtype=dtype), epochs)
    np.random.RandomState(seed).shuffle(document_index)
    num_samples = (epochs * int(sizes.sum()) - 1) // seq_length
    rows = build_sample_index(sizes, document_index, seq_length, num_samples)
    assert rows.dtype == dtype
    expected = sample_index_oracle(sizes, document_index, seq_length, num_samples)
    assert rows.tolist() == expected.tolist()


@settings(max_examples=200, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 12), min_size=1, max_size=30).filter(any),
    seq_length=st.integers(1, 20),
    dtype=st.sampled_from([np.int32, np.int64]),
    tokens_dtype=st.sampled_from(["u1", "i1", "i2", "i4", "i8", "f8", "f4", "u2", "u4", "u8"]),
    data=st.data(),
)
def test_gather_matches_concatenated_documents(sizes, seq_length, dtype, tokens_dtype, data):
    documents = [d % 100 for d in counting_documents(sizes)]
    order = data.draw(st.permutations(range(len(sizes))))
    stream = np.concatenate([documents[d] for d in order])
    num_samples = (len(stream) - 1) // seq_length
    sizes = np.array(sizes, np.int32)
    document_index = np.array(order, dtype)
    tokens = np.concatenate(documents).astype(tokens_dtype)
    pointers = (np.cumsum(sizes, dtype=np.int64) - sizes) * tokens.itemsize
    rows = build_sample_index(sizes, document_index, seq_length, num_samples)
    samples = np.array(data.draw(st.permutations(range(num_samples))), np.int64)
    out = np.full((num_samples, seq_length + 1), -7)
    _native.gather_samples(tokens, pointers, sizes, document_index, rows, samples, out)
    for sample, text in zip(samples, out):
        begin = sample * seq_length
        assert text.tolist() == stream[begin : begin + seq_length + 1].tolist()


def test_gather_turns_floats_that_are_no_ids_into_minus_one():
    tokens = np.array([1.0, np.nan, np.inf, -np.inf, 1e300])
    out = np.empty((1, 5), np.int64)
    rows = np.array([[0, 0], [0, 4]], np.int32)
    _native.gather_samples(
        tokens, np.array([0]), np.array([5], np.int32), np.array([0], np.int32), rows,
        np.array([0]), out,
    )  # fmt: skip
    assert out.tolist() == [[1, -1, -1, -1, -1]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples": np.array([2])}, "no such sample"),
        ({"samples": np.array([-1])}, "no such sample"),
        ({"document_index": np.array([0, 5], np.int32)}, "no such document"),
        ({"document_index": np.array([0, -1], np.int32)}, "no such document"),
        ({"document_index": np.array([0], np.int32)}, "no such position"),
        ({"sizes": np.array([3, 1], np.int32)}, "does not fit"),
        ({"pointers": np.array([0, 8])}, "does not fit the documents"),
        ({"pointers": np.array([0, -2])}, "does not fit the documents"),
        ({"out": np.empty((1, 9), np.int64)}, "does not fit seq_length"),
        ({"out": np.empty((1, 2), np.int64)}, "does not fit"),
    ],
)
def test_gather_never_reads_outside(change, message):
    arguments = {
        "tokens": np.arange(5, dtype=np.uint16),
        "pointers": np.array([0, 6]),
        "sizes": np.array([3, 2], np.int32),
        "document_index": np.array([0, 1], np.int32),
        "sample_index": np.array([[0, 0], [0, 2], [1, 1]], np.int32),
        "samples": np.array([1]),
        "out": np.empty((1, 3), np.int64),
    }
    _native.gather_samples(**arguments)
    assert arguments["out"].tolist() == [[2, 3, 4]]
    with pytest.raises(IndexError, match=message):
        _native.gather_samples(**{**arguments, **change})


def test_sample_index_needs_enough_tokens():
    sizes, document_index = np.array([3, 2], np.int32), np.array([1, 0], np.int32)
    with pytest.raises(IndexError, match="end before the samples"):
        build_sample_index(sizes, document_index, 2, 3)
    with pytest.raises(IndexError, match="no such document"):
        build_sample_index(sizes, np.array([2], np.int32), 2, 1)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("sizes", np.array([3], np.int64), "sizes has the wrong dtype: int64"),
        ("document_index", np.array([0], np.int64), "sample_index has the wrong dtype: int32"),
        ("document_index", np.array([0, 0, 0, 0], np.int32)[::2], "document_index must be contig"),
        ("sample_index", np.empty((2, 2), np.int64), "sample_index has the wrong dtype: int64"),
        ("sample_index", np.empty((2, 3), np.int32), r"sample_index must be \[n, 2\]"),
        ("seq_length", 0, "seq_length must be at least 1"),
    ],
)
def test_sample_index_refuses_wrong_arrays(name, value, message):
    arguments = {
        "sizes": np.array([3], np.int32),
        "document_index": np.array([0], np.int32),
        "seq_length": 2,
        "sample_index": np.empty((2, 2), np.int32),
    }
    with pytest.raises(ValueError, match=message):
        _native.build_sample_index(**{**arguments, name: value})


def test_int64_from_where_int32_ends():
    assert index_dtype(2**31) is np.int32  # the last is 2^31 - 1
    assert index_dtype(2**31 + 1) is np.int64
    assert shuffle_dtype(2**32 - 3) is np.uint32
    assert shuffle_dtype(2**32 - 2) is np.int64


def test_offsets_beyond_int32_add_up():
    """Three documents of nearly 2^31 tokens: the running total needs 64 bits."""
    sizes = np.full(3, 2**31 - 1, np.int32)
    document_index = np.arange(3, dtype=np.int32)
    seq_length = 2**31 + 5
    rows = build_sample_index(sizes, document_index, seq_length, 2)
    assert rows.tolist() == sample_index_oracle(sizes, document_index, seq_length, 2).tolist()
    assert num_epochs(3 * (2**31 - 1), seq_length, 2) == 1


@settings(max_examples=200, deadline=None)
@given(tokens=st.integers(1, 200), seq_length=st.integers(1, 50), samples=st.integers(0, 300))
def test_num_epochs_is_the_smallest(tokens, seq_length, samples):
    epochs = num_epochs(tokens, seq_length, samples)
    assert (epochs * tokens - 1) // seq_length >= samples
    assert epochs == 1 or ((epochs - 1) * tokens - 1) // seq_length < samples


def test_no_tokens_do_not_loop_for_ever():
    with pytest.raises(ValueError, match="no tokens"):
        num_epochs(0, 8, 1)


@settings(max_examples=100, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 12), min_size=2, max_size=20).filter(lambda s: sum(s[1:]) > 0),
    num_samples=st.integers(0, 60),
    seed=st.integers(0, 1000),
)
def test_index_maps_hold_every_document_once_an_epoch(sizes, num_samples, seed):
    maps = build_index_maps(np.array(sizes, np.int32), 1, len(sizes), num_samples, 7, seed)
    assert len(maps.shuffle_index) >= num_samples
    assert sorted(maps.shuffle_index.tolist()) == list(range(len(maps.shuffle_index)))
    documents = list(range(1, len(sizes)))
    assert sorted(maps.document_index.tolist()) == sorted(documents * maps.epochs)


@pytest.mark.parametrize(
    ("splits", "count", "expected"),
    [
        ("949,50,1", 200, [0, 190, 200, 200]),
        ("949/50/1", 554, [0, 525, 553, 554]),
        ("90,8,2", 554, [0, 499, 543, 554]),
        ("100", 7, [0, 7, 7, 7]),
        ("1,1", 4, [0, 2, 4, 4]),
        (" 0.5 , 0.5 ,0", 10, [0, 5, 10, 10]),
        ("0,1,1", 3, [0, 0, 1, 3]),  # PaddleNLP's first boundary is -1 here
        ("1,1,1", 1, [0, 1, 1, 1]),
    ],
)
def test_split_boundaries(splits, count, expected):
    assert split_boundaries(splits, count) == expected


@given(
    shares=st.lists(st.floats(0, 1000), min_size=1, max_size=3).filter(lambda s: sum(s) > 1e-9),
    count=st.integers(1, 1000),
)
def test_split_boundaries_rise(shares, count):
    boundaries = split_boundaries(",".join(map(str, shares)), count)
    assert len(boundaries) == 4
    assert boundaries[0] == 0 and boundaries[3] == count
    assert boundaries == sorted(boundaries)


@pytest.mark.parametrize("splits", ["", "a,b", "0,0,0", "-1,2", "1,2,3,4", "nan", "inf,1", "1,,2"])
def test_wrong_split(splits):
    with pytest.raises(UserError, match="split is"):
        split_boundaries(splits, 10)
