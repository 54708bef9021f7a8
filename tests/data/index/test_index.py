"""The index maps against an independent description of them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pypkg import _native
from pypkg.data.index.maps import (
    build_index_maps,
    build_sample_index,
    index_dtype,
    num_epochs,
    plan_index_maps,
    shuffle,
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
    sizes = np.array(sizes, np.int32)
    plan = plan_index_maps(sizes, 1, len(sizes), num_samples, 7, seed)
    maps = build_index_maps(sizes, plan)
    for array, (shape, dtype) in zip(maps.arrays(), plan.layout().values(), strict=True):
        assert (array.shape, array.dtype) == (shape, dtype)
    assert len(maps.shuffle_index) >= num_samples
    assert sorted(maps.shuffle_index.tolist()) == list(range(len(maps.shuffle_index)))
    documents = list(range(1, len(sizes)))
    assert sorted(maps.document_index.tolist()) == sorted(documents * plan.epochs)


def test_the_last_epoch_is_shuffled_by_itself_below_80_percent():
    """Ten samples an epoch: the last one gives 7 or 8 of them, or all of its 10."""
    sizes = np.full(101, 1, np.int32)
    plans = {n: plan_index_maps(sizes, 0, 101, n, 10, 0) for n in (10, 17, 18, 20)}
    assert {n: (plan.epochs, plan.border) for n, plan in plans.items()} == {
        10: (1, 10),
        17: (2, 10),
        18: (2, 20),
        20: (2, 20),
    }
    assert [n for n, plan in plans.items() if plan.separate_last] == [17]


def _same_shuffle(array: np.ndarray, ours: np.random.RandomState, theirs: np.random.RandomState):
    expected = array.copy()
    theirs.shuffle(expected)
    shuffle(array, ours)
    assert np.array_equal(array, expected)
    assert repr(ours.get_state()) == repr(theirs.get_state())
    assert ours.randint(1 << 30) == theirs.randint(1 << 30)
    assert ours.standard_normal() == theirs.standard_normal()


@settings(max_examples=100, deadline=None)
@given(
    count=st.integers(0, 9000),
    dtype=st.sampled_from([np.int32, np.uint32, np.int64, np.float64]),
    seed=st.integers(0, 2**32 - 1),
    drawn=st.integers(0, 1300),
)
def test_shuffle_is_numpys(count, dtype, seed, drawn):
    """From any position of the generator, and what is drawn afterwards is the same as well."""
    ours, theirs = np.random.RandomState(seed), np.random.RandomState(seed)
    for random in (ours, theirs):
        random.bytes(4 * drawn)
    _same_shuffle(np.arange(count, dtype=dtype), ours, theirs)


@pytest.mark.parametrize("count", [2**20 - 1, 2**20, 2**20 + 1, 3_000_000])
def test_shuffle_of_many_is_numpys(count):
    ours, theirs = np.random.RandomState(count), np.random.RandomState(count)
    ours.standard_normal(), theirs.standard_normal()  # of two made, one is kept for later
    _same_shuffle(np.arange(count, dtype=np.int32), ours, theirs)


@pytest.mark.parametrize("largest", [2**32 - 2, 2**32 - 1, 2**32, 2**32 + 700, 2**40, 2**62])
def test_shuffle_draws_64_bits_beyond_32(largest):
    """Against NumPy's integers, which are drawn like the partners of its shuffle."""
    random = np.random.RandomState(5)
    state = random.get_state(legacy=False)["state"]
    key = state["key"].copy()
    partners, position = _native.shuffle_partners(largest, 1500, key, state["pos"])
    expected = [int(random.randint(0, largest + 1 - k, dtype=np.uint64)) for k in range(1500)]
    assert partners.tolist() == expected
    after = random.get_state(legacy=False)["state"]
    assert position == after["pos"] and np.array_equal(key, after["key"])


@pytest.mark.parametrize(
    ("array", "key", "position", "message"),
    [
        (np.arange(4, dtype=np.int16), np.zeros(624, np.uint32), 0, "items of 4 or 8 bytes"),
        (np.arange(8)[::2], np.zeros(624, np.uint32), 0, "must be contiguous"),
        (np.arange(4).reshape(2, 2), np.zeros(624, np.uint32), 0, "must be contiguous"),
        (np.arange(4), np.zeros(623, np.uint32), 0, "key must be"),
        (np.arange(4), np.zeros(624, np.uint32), 625, "position must be"),
        (np.arange(4), np.zeros(624, np.uint32), -1, "position must be"),
    ],
)
def test_shuffle_refuses_wrong_arrays(array, key, position, message):
    with pytest.raises(ValueError, match=message):
        _native.shuffle(array, key, position)


def test_shuffle_leaves_read_only_arrays_alone():
    array = np.arange(4)
    array.flags.writeable = False
    with pytest.raises(ValueError, match="not writeable"):
        shuffle(array, np.random.RandomState(0))


@pytest.mark.parametrize(("epochs", "dtype"), [(2, np.int32), (3, np.int64)])
def test_index_maps_grow_to_64_bits(monkeypatch, epochs, dtype):
    """With a limit of 100 for what 32 bits hold, the maps hold the same in 64."""
    sizes = np.arange(50, dtype=np.int32)
    seq_length, num_samples = 7, epochs * 1225 // 7 - 1
    plan = plan_index_maps(sizes, 0, 50, num_samples, seq_length, 3)
    assert plan.epochs == epochs
    expected = build_index_maps(sizes, plan)
    monkeypatch.setattr(
        "pypkg.data.index.maps.index_dtype", lambda count: np.int32 if count <= 100 else np.int64
    )
    maps = build_index_maps(sizes, plan)
    assert maps.document_index.dtype == maps.sample_index.dtype == dtype
    for ours, same in zip(maps.arrays(), expected.arrays()):
        assert np.array_equal(ours, same)


def test_plan_at_the_border_of_32_bits():
    """2^30 documents: two epochs are numbered with 32 bits, three are not."""
    sizes = np.broadcast_to(np.int32(2), 2**30)  # takes no memory
    tokens = 2**31
    narrow = plan_index_maps(sizes, 0, 2**30, 2 * tokens // 8 - 1, 8, 0)
    wide = plan_index_maps(sizes, 0, 2**30, 2 * tokens // 8, 8, 0)
    assert (narrow.epochs, narrow.positions) == (2, 2**31)
    assert narrow.layout()["doc_idx"] == ((2**31,), np.dtype(np.int32))
    assert (wide.epochs, wide.layout()["doc_idx"]) == (3, ((3 * 2**30,), np.dtype(np.int64)))
    assert wide.layout()["sample_idx"][1] == np.int64
    many = plan_index_maps(sizes, 0, 2**30, 2**32 - 2, 1, 0)
    assert many.layout()["shuffle_idx"][1] == np.int64


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
