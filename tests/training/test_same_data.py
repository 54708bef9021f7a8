"""The error for ranks that have different files."""

from __future__ import annotations

import numpy as np
import pytest

from pypkg.data import IndexedDataset, IndexedDatasetWriter
from pypkg.training.feed.same_data import _Corpus, _difference, _fingerprint


def corpus(prefix, documents, loss_mask=None) -> IndexedDataset:
    with IndexedDatasetWriter(prefix, "uint16") as writer:
        for document in documents:
            writer.add_document(np.asarray(document))
        writer.commit()
    if loss_mask is not None:
        prefix.with_suffix(".lsm").write_bytes(bytes(loss_mask))
    return IndexedDataset(prefix)


def test_copies_are_the_same(tmp_path):
    documents = [range(9), range(5)]
    one, other = corpus(tmp_path / "a", documents), corpus(tmp_path / "b", documents)
    assert _fingerprint(one) == _fingerprint(other)


@pytest.mark.parametrize(
    ("documents", "mask"),
    [
        ([range(9), range(1, 6)], None),  # other tokens
        ([range(8), [8, *range(5)]], None),  # other borders
        ([range(9), range(5)], [1] * 13 + [0]),
    ],
)
def test_files_that_differ(tmp_path, documents, mask):
    one = corpus(tmp_path / "a", [range(9), range(5)])
    assert _fingerprint(one) != _fingerprint(corpus(tmp_path / "b", documents, mask))


def test_the_last_token_of_a_long_corpus(tmp_path):
    tokens = np.arange(100_000) % 1000
    one = corpus(tmp_path / "a", [tokens])
    tokens[-1] += 1
    assert _fingerprint(one) != _fingerprint(corpus(tmp_path / "b", [tokens]))


def test_messages(tmp_path, monkeypatch):
    monkeypatch.setenv("PADDLE_TRAINER_ENDPOINTS", "10.0.0.1:1,10.0.0.1:2,10.0.0.2:1,10.0.0.2:2")
    one = _Corpus("web", _fingerprint(corpus(tmp_path / "a", [range(9)])), "")
    other = _Corpus("web", _fingerprint(corpus(tmp_path / "b", [range(1200)])), "")
    assert _difference({0: [one], 2: [one]}) == ""
    assert _difference({}) == ""
    found = _difference({0: [one, one], 1: [one, one], 2: [one, other]})
    assert found.startswith("corpus web has 9 tokens in 1 sequences, digest ")
    assert "on ranks 0 and 1 (10.0.0.1); 1,200 tokens in 1 sequences" in found
    assert found.endswith("on rank 2 (10.0.0.2)")
    assert (
        _difference({0: [one], 2: [one, other]})
        == "1 corpora on rank 0 (10.0.0.1), 2 corpora on rank 2 (10.0.0.2)"
    )
    first, second = one._replace(written="12345678ab"), one._replace(written="87654321ab")
    assert _difference({0: [first], 1: [one], 2: [first]}) == ""
    assert _difference({0: [first], 1: [one], 2: [second]}) == (
        "web.manifest.json gives the tokens the checksum 12345678 on rank 0 (10.0.0.1); "
        "87654321 on rank 2 (10.0.0.2)"
    )
