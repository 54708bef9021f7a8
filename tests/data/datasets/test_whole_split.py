"""A whole split, of which an evaluation counts every sample once."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from corpora import counting_documents

from pypkg.data import (
    IGNORED_LABEL,
    BatchLoader,
    BlankInfilling,
    OrderOptions,
    Packing,
    build_datasets,
)
from pypkg.errors import UserError

SEQ = 4
SIZES = ([11, 0, 23, 7], [5, 9], [2, 1])  # tokens 41, 14 and 3; 10, 3 and no sample


@pytest.fixture
def prefixes(make_corpus):
    """Corpora of which all tokens differ."""
    made, first = [], 0
    for number, sizes in enumerate(SIZES):
        documents = [document + first for document in counting_documents(sizes)]
        first += sum(sizes)
        made.append(make_corpus(documents, f"c{number}", np.int32))
    return made


def whole(prefixes, weights=(1, 1, 1), **options):
    blend = [x for w, p in zip(weights, prefixes) for x in (str(w), p)]
    data_prefix = blend if len(prefixes) > 1 else list(prefixes)
    return build_datasets(data_prefix, "0,1,0", SEQ, [0, None, 0], 3, OrderOptions(**options))[0][1]


def labels_of(loader) -> list[int]:
    labels = [batch["labels"] for batch in loader]
    return [x for each in labels for x in each[each != IGNORED_LABEL].tolist()]


@pytest.mark.parametrize("kind", ["run", "epoch"])
@pytest.mark.parametrize("chosen", [[0], [0, 1], [1, 0, 2]])
def test_every_sample_once(prefixes, chosen, kind, logged):
    dataset = whole([prefixes[c] for c in chosen], (0.01, 5, 1), kind=kind)
    expected = {0: 10, 1: 3, 2: 0}
    count = sum(expected[c] for c in chosen)
    assert len(dataset) == dataset.samples_per_epoch == count
    inputs = [x for i in range(count) for x in dataset[i]["text"][:-1].tolist()]
    assert len(set(inputs)) == len(inputs) == SEQ * count
    sources = dataset.sources(np.arange(count))
    kept = [c for c in chosen if expected[c]]
    assert Counter(sources.tolist()) == {k: expected[c] for k, c in enumerate(kept)}
    assert dataset.samples_consumed(count) == [expected[c] for c in kept]
    assert dataset.samples_consumed(count - 1) == [
        expected[c] - (k == len(kept) - 1) for k, c in enumerate(kept)
    ]
    for sample in range(count):
        corpus, _ = dataset.document_at(sample, 0)
        assert corpus is dataset.corpora[sources[sample]]
        assert dataset[sample]["text"][0] in corpus.tokens
    assert (f"{prefixes[2]} is smaller than a sample: left out" in logged()) == (2 in chosen)


def test_the_samples_of_an_epoch_in_order(prefixes):
    """They are those of PaddleNLP for as many samples as one epoch has."""
    dataset = whole(prefixes[:1])
    (_, usual, _), _ = build_datasets(prefixes[:1], "0,1,0", SEQ, [0, 10, 0], 3)
    assert usual.samples_per_epoch == len(usual) == 10
    assert [dataset[i]["text"].tolist() for i in range(10)] == [
        usual[i]["text"].tolist() for i in range(10)
    ]
    (_, longer, _), _ = build_datasets(["1", prefixes[0], "1", prefixes[1]], "0,1,0", SEQ,
                                       [0, 50, 0], 3)  # fmt: skip
    assert len(longer) == 50 and longer.samples_per_epoch == 13


def test_no_corpus_has_a_sample(prefixes):
    with pytest.raises(UserError, match="the whole valid split is asked for, but no corpus has 5"):
        whole(prefixes[2:])


@pytest.mark.parametrize("threads", [0, 2])
@pytest.mark.parametrize(
    ("batch_size", "ranks"), [(1, 1), (4, 1), (2, 2), (3, 4), (20, 1), (1, 20)]
)
def test_ranks_count_every_sample_once(prefixes, batch_size, ranks, threads):
    dataset = whole(prefixes[:2])
    loaders = [
        BatchLoader(dataset, batch_size, data_parallel_rank=rank, data_parallel_size=ranks,
                    threads=threads, every_sample=True, vocab_size=100, with_sources=True)
        for rank in range(ranks)
    ]  # fmt: skip
    counts = {len(loader) for loader in loaders}
    assert counts == {-(-13 // (batch_size * ranks))}  # ranks wait for one another in each batch
    found = [x for loader in loaders for x in labels_of(loader)]
    expected = [x for i in range(13) for x in dataset[i]["text"][1:].tolist()]
    assert sorted(found) == sorted(expected)
    for loader in loaders:
        for batch in loader:
            assert {name: array.shape[0] for name, array in batch.items()} == {
                "input_ids": batch_size, "labels": batch_size, "sources": batch_size,
            }  # fmt: skip
    without = BatchLoader(dataset, batch_size, data_parallel_size=ranks)
    assert len(without) == 13 // (batch_size * ranks)


def test_the_rest_of_a_dataset(prefixes):
    dataset = whole(prefixes[:1])
    assert len(labels_of(BatchLoader(dataset, 4, 7, every_sample=True))) == 3 * SEQ
    assert list(BatchLoader(dataset, 4, 10, every_sample=True)) == []


@pytest.mark.parametrize(
    "options",
    [
        {"packing": Packing(True, True, True)},
        {"objective": BlankInfilling(SEQ, 91, 92, 93, 94, False, 7)},
    ],
    ids=["packing", "blanks"],
)
def test_filled_up_batches_of_other_objectives(prefixes, options):
    dataset = whole(prefixes[:1])
    filled = list(BatchLoader(dataset, 4, every_sample=True, **options))[-1]
    single = [next(iter(BatchLoader(dataset, 1, i, **options))) for i in (8, 9)]
    for name, array in filled.items():
        assert np.array_equal(array[:2], np.concatenate([batch[name] for batch in single]))
    assert (filled["labels"][2:] == IGNORED_LABEL).all()
    assert (filled["labels"][:2] != IGNORED_LABEL).any()
