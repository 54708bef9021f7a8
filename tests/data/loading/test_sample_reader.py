"""Samples copied in C++ against the documents laid end to end."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from corpora import counting_documents
from hypothesis import given, settings
from hypothesis import strategies as st

from pypkg._native import SampleReader
from pypkg.data.index.maps import build_sample_index

TOKEN_DTYPES = ["u1", "i1", "i2", "i4", "i8", "f8", "f4", "u2", "u4", "u8"]


@settings(max_examples=300, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 12), min_size=1, max_size=60).filter(any),
    seq_length=st.integers(1, 20),
    index_dtype=st.sampled_from([np.int32, np.int64]),
    shuffle_dtype=st.sampled_from([np.uint32, np.int64]),
    tokens_dtype=st.sampled_from(TOKEN_DTYPES),
    data=st.data(),
)
def test_samples_are_cut_from_the_documents_in_order(
    sizes, seq_length, index_dtype, shuffle_dtype, tokens_dtype, data
):
    documents = [d % 100 for d in counting_documents(sizes)]
    order = data.draw(st.permutations(range(len(sizes))))
    stream = np.concatenate([documents[d] for d in order])
    lengths = [sizes[d] for d in order]
    first_of_document = np.repeat(np.cumsum([0, *lengths[:-1]]), lengths)
    num_samples = (len(stream) - 1) // seq_length
    sizes = np.array(sizes, np.int32)
    tokens = np.concatenate(documents).astype(tokens_dtype)
    pointers = (np.cumsum(sizes, dtype=np.int64) - sizes) * tokens.itemsize
    document_index = np.array(order, index_dtype)
    sample_index = build_sample_index(sizes, document_index, seq_length, num_samples)
    shuffle = data.draw(st.permutations(range(num_samples)))
    reader = SampleReader(
        "corpus", tokens, pointers, sizes, document_index, sample_index,
        np.array(shuffle, shuffle_dtype),
    )  # fmt: skip
    assert len(reader) == num_samples
    wanted = np.array(
        data.draw(st.lists(st.integers(0, num_samples - 1), max_size=40)) if num_samples else [],
        np.int64,
    )
    rows = np.array(data.draw(st.permutations(range(len(wanted) + 2))), np.int64)[: len(wanted)]
    out = np.full((len(wanted) + 2, seq_length + 1), -7)
    starts = np.full(out.shape, -7, np.int32)
    reader.read(wanted, out, rows, starts)
    for sample, row in zip(wanted, rows):
        begin = shuffle[sample] * seq_length
        end = begin + seq_length + 1
        assert out[row].tolist() == stream[begin:end].tolist()
        expected = np.maximum(first_of_document[begin:end] - begin, 0)
        assert starts[row].tolist() == expected.tolist()
    untouched = np.setdiff1d(np.arange(len(out)), rows)
    assert (out[untouched] == -7).all() and (starts[untouched] == -7).all()


def test_a_document_that_follows_itself_starts_again():
    reader = SampleReader(
        "corpus", np.arange(3, dtype=np.uint16), np.array([0]), np.array([3], np.int32),
        np.array([0, 0], np.int32), np.array([[0, 1], [1, 2]], np.int32), np.array([0], np.uint32),
    )  # fmt: skip
    out, starts = np.empty((1, 5), np.int64), np.empty((1, 5), np.int32)
    reader.read(np.array([0]), out, None, starts)
    assert out.tolist() == [[1, 2, 0, 1, 2]]
    assert starts.tolist() == [[0, 0, 2, 2, 2]]


def test_floats_that_are_no_ids_become_minus_one():
    reader = SampleReader(
        "corpus", np.array([1.0, np.nan, np.inf, -np.inf, 1e300]), np.array([0]),
        np.array([5], np.int32), np.array([0], np.int32), np.array([[0, 0], [0, 4]], np.int32),
        np.array([0], np.uint32),
    )  # fmt: skip
    out = np.empty((1, 5), np.int64)
    reader.read(np.array([0]), out)
    assert out.tolist() == [[1, -1, -1, -1, -1]]


def small_corpus() -> dict:
    return {
        "file": "data/small.bin",
        "tokens": np.arange(5, dtype=np.uint16),
        "pointers": np.array([0, 6]),
        "sizes": np.array([3, 2], np.int32),
        "document_index": np.array([0, 1], np.int32),
        "sample_index": np.array([[0, 0], [0, 2], [1, 1]], np.int32),
        "shuffle_index": np.array([1, 0], np.uint32),
    }


@pytest.mark.parametrize(
    ("corpus", "call", "message"),
    [
        ({}, {"samples": np.array([2])}, "sample 2: no such sample"),
        ({}, {"samples": np.array([-1])}, "sample -1: no such sample"),
        ({"shuffle_index": np.array([5], np.uint32)}, {}, "no such sample"),
        ({"shuffle_index": np.array([-1])}, {}, "no such sample"),
        ({"document_index": np.array([0, 5], np.int32)}, {}, "no such document"),
        ({"document_index": np.array([0, -1], np.int32)}, {}, "no such document"),
        ({"document_index": np.array([0], np.int32)}, {}, "no such position"),
        ({"sizes": np.array([3, 1], np.int32)}, {}, "does not fit the documents"),
        ({"pointers": np.array([0, 8])}, {}, "does not fit the documents"),
        ({"pointers": np.array([0, -2])}, {}, "does not fit the documents"),
        ({"sample_index": np.array([[0, 0], [0, -2], [1, 1]], np.int32)}, {}, "does not fit"),
        ({}, {"out": np.empty((1, 9), np.int64)}, "does not fit seq_length"),
        ({}, {"out": np.empty((1, 2), np.int64)}, "does not fit"),
        ({}, {"rows": np.array([1])}, "no such row of out"),
        ({}, {"rows": np.array([-1])}, "no such row of out"),
    ],
)
def test_never_reads_or_writes_outside(corpus, call, message):
    arguments = {"samples": np.array([0]), "out": np.empty((1, 3), np.int64)}
    SampleReader(**small_corpus()).read(**arguments)
    assert arguments["out"].tolist() == [[2, 3, 4]]
    with pytest.raises(IndexError, match=rf"data/small\.bin, sample -?\d: .*{message[-12:]}"):
        SampleReader(**(small_corpus() | corpus)).read(**(arguments | call))


@pytest.mark.parametrize(
    ("corpus", "call", "message"),
    [
        ({"tokens": np.array([1j])}, {}, "unknown dtype: complex128"),
        ({"tokens": np.arange(10)[::2]}, {}, "tokens must be contiguous"),
        ({"sizes": np.array([3, 2])}, {}, "sizes has the wrong dtype: int64"),
        ({"sizes": np.array([3], np.int32)}, {}, "differ in length"),
        ({"sample_index": np.array([[0, 0], [0, 2]])}, {}, "sample_index has the wrong dtype"),
        ({"shuffle_index": np.array([0], np.int16)}, {}, "shuffle_index has the wrong dtype"),
        ({}, {"out": np.empty((1, 3), np.int32)}, "out has the wrong dtype"),
        ({}, {"out": np.empty((2, 3), np.int64)}, "differ in number"),
        ({}, {"document_starts": np.empty((1, 2), np.int32)}, "differ in shape"),
    ],
)
def test_wrong_arrays(corpus, call, message):
    arguments = {"samples": np.array([0]), "out": np.empty((1, 3), np.int64)}
    with pytest.raises(ValueError, match=message):
        SampleReader(**(small_corpus() | corpus)).read(**(arguments | call))


def test_other_threads_run_meanwhile():
    """While one thread reads for long, another one gets on: the GIL is not held."""
    tokens = np.zeros(1 << 20, np.uint16)
    reader = SampleReader(
        "corpus", tokens, np.array([0]), np.array([len(tokens)], np.int32),
        np.array([0], np.int32), np.array([[0, 0], [0, len(tokens) - 1]], np.int32),
        np.array([0], np.uint32),
    )  # fmt: skip
    out = np.empty((8, len(tokens)), np.int64)
    rows = np.tile(np.arange(8), 40)
    thread = threading.Thread(target=reader.read, args=(np.zeros(320, np.int64), out, rows))
    begin = time.perf_counter()
    thread.start()
    started = time.perf_counter() - begin
    thread.join()
    whole = time.perf_counter() - begin
    assert started < whole / 2
