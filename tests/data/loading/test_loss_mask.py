"""Loss masks (.lsm) beside a corpus, up to the labels of a batch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pypkg.data import BatchLoader, BlankInfilling, build_train_valid_test_datasets
from pypkg.data.loading.packing import Packing
from pypkg.errors import UserError

SEQ = 8


def masked(token: np.ndarray) -> np.ndarray:
    """Whether a token is masked in these tests, which depends on nothing but its id."""
    return token % 3 == 1


@pytest.fixture
def corpora(make_corpus):
    """Prefixes of a corpus with a mask and of one without, whose ids are 1000 and higher."""
    generator = np.random.default_rng(0)
    documents = [generator.integers(0, 1000, n) for n in generator.integers(0, 30, 80)]
    with_mask = make_corpus(documents, "masked", np.int32)
    tokens = np.concatenate(documents)
    Path(with_mask + ".lsm").write_bytes((~masked(tokens)).astype(np.uint8).tobytes())
    plain = make_corpus([document + 1000 for document in documents], "plain", np.int32)
    return with_mask, plain


def batches(prefixes: list[str], samples: int = 40, size: int = 4, **options):
    train, _, _ = build_train_valid_test_datasets(prefixes, "1,0,0", SEQ, [samples, 0, 0], 3)
    return train, list(BatchLoader(train, size, threads=0, **options))


@pytest.mark.parametrize("size", [1, 4])
def test_masked_tokens_are_no_labels(corpora, size):
    train, found = batches([corpora[0]], 400, size)  # more than one epoch
    assert len(found) >= 400 // size
    for number, batch in enumerate(found):
        text = np.stack([train[number * size + row]["text"] for row in range(size)])
        assert np.array_equal(batch["input_ids"], text[:, :-1])
        assert np.array_equal(batch["labels"], np.where(masked(text[:, 1:]), -100, text[:, 1:]))
    labels = np.concatenate([batch["labels"] for batch in found])
    assert 0.2 < (labels == -100).mean() < 0.5


def test_without_a_mask_all_tokens_are_labels(corpora):
    assert all((batch["labels"] >= 1000).all() for batch in batches([corpora[1]])[1])


def test_a_blend_of_both(corpora):
    train, found = batches(["0.5", corpora[1], "0.5", corpora[0]], 200)
    seen = set()
    for number, batch in enumerate(found):
        for row in range(4):
            text = train[number * 4 + row]["text"][1:]
            plain = bool(text[0] >= 1000)
            seen.add(plain)
            expected = text if plain else np.where(masked(text), -100, text)
            assert np.array_equal(batch["labels"][row], expected)
    assert seen == {True, False}


def test_with_packed_documents(corpora):
    prefix = [corpora[0]]
    _, plain = batches(prefix)
    _, packed = batches(prefix, packing=Packing(eod_mask_loss=True))
    more = 0
    for one, other in zip(plain, packed):
        assert (other["labels"][one["labels"] == -100] == -100).all()
        more += int(((other["labels"] == -100) & (one["labels"] != -100)).sum())
    assert more > 0


def test_a_mask_and_blank_filling(corpora):
    objective = BlankInfilling(SEQ, 1, 2, 3, 4, False, 0)
    with pytest.raises(UserError, match=r"there is a loss mask \(\.lsm\) beside the data"):
        batches([corpora[0]], objective=objective)
