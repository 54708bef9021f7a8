"""Datasets: the very samples that PaddleNLP draws, and what cannot be built."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from corpora import GOLDEN, counting_documents

from pypkg import _native
from pypkg.data import build_datasets, build_train_valid_test_datasets, resolve_input_dir
from pypkg.data.datasets.concat import ChainedDataset, LaterDataset
from pypkg.errors import UserError

CASES = json.loads((GOLDEN / "cases.json").read_text())["cases"]
SPLITS = ("train", "valid", "test")


def build(data_prefix, split="1", seq_length=4, num_samples=(10, 0, 0), seed=0):
    return build_train_valid_test_datasets(data_prefix, split, seq_length, num_samples, seed)


@pytest.fixture(scope="module")
def golden(tmp_path_factory) -> Path:
    """A copy of the golden data, beside which index maps may be kept."""
    return Path(shutil.copytree(GOLDEN, tmp_path_factory.mktemp("golden") / "data"))


@pytest.mark.parametrize("found", ["built", "kept"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["case"])
def test_golden(case, found, golden):
    """As PaddleNLP; built at first, later from the index maps that the first call has kept."""
    if "prefix" in case:
        data_prefix = [str(golden / case["prefix"])]
    else:
        data_prefix = [x for weight, name in case["prefixes"] for x in (str(weight), golden / name)]
        data_prefix = list(map(str, data_prefix))
    datasets = build(
        data_prefix, case["split"], case["seq_length"], case["num_samples"], case["seed"]
    )
    expected = np.load(GOLDEN / case["file"])
    maps = ("doc_idx", "sample_idx", "shuffle_idx", "dataset_index", "dataset_sample_index")
    compared = 0
    for name, dataset in zip(SPLITS, datasets):
        if f"{name}.none" in expected:
            assert dataset is None
            continue
        assert len(dataset) == expected[f"{name}.len"]
        for sample, tokens in enumerate(expected[f"{name}.tokens"]):
            text = dataset[sample]["text"]
            assert text.dtype == np.int64
            assert text.tolist() == tokens.tolist()
        for key in (key for key in maps if f"{name}.{key}" in expected):
            assert getattr(dataset, key).dtype == expected[f"{name}.{key}"].dtype
            assert np.array_equal(getattr(dataset, key), expected[f"{name}.{key}"])
            compared += 1
    assert compared >= 6


def test_a_batch_is_its_samples(golden):
    train, _, _ = build(["0.3", str(golden / "docs_u16"), "0.7", str(golden / "docs_i32")],
                        seq_length=32, num_samples=(50, 0, 0))  # fmt: skip
    samples = np.array([3, 1, 44, 3])
    batch = train.read(samples)
    assert batch.tolist() == [train[i]["text"].tolist() for i in samples.tolist()]


def test_document_at(make_corpus):
    documents = counting_documents([3, 0, 5, 1, 7, 2])
    (train, _, _) = build([make_corpus(documents)], num_samples=(30, 0, 0))
    for sample in range(len(train)):
        for offset, token in enumerate(train[sample]["text"]):
            corpus, document = train.document_at(sample, offset)
            assert token in documents[document]
            assert corpus is train.corpus


@pytest.mark.parametrize("is_blend", [False, True])
def test_documents_of_a_sample(make_corpus, is_blend):
    """Those of its tokens, in order; alone, in a blend and from a later position on."""
    prefix = make_corpus(counting_documents([3, 0, 5, 1, 7, 2]))
    given = ["0.5", prefix, "0.5", prefix] if is_blend else [prefix]
    (train, _, _) = build(given, num_samples=(30, 0, 0))
    later = LaterDataset(ChainedDataset([train, train]), 3, 5)
    for sample in range(len(train)):
        at = [train.document_at(sample, offset) for offset in range(train.seq_length + 1)]
        corpus, documents = train.documents(sample)
        assert corpus is at[0][0]
        assert documents == list(dict.fromkeys(document for _, document in at))
        assert later.documents(len(train) + sample - 2) == (corpus, documents)


def test_samples_out_of_range(make_corpus):
    prefix = make_corpus(counting_documents([30]))
    for data_prefix in ([prefix], ["1", prefix]):
        train, _, _ = build(data_prefix)
        for sample in (-1, len(train)):
            with pytest.raises(IndexError):
                train[sample]


def test_corpus_smaller_than_a_sample(make_corpus):
    prefix = make_corpus([[1, 2, 3], [4]])
    with pytest.raises(UserError, match=r"corpus has 4 tokens in 2 documents .* needs 5"):
        build([prefix])
    train, _, _ = build([prefix], seq_length=3)
    assert len(train) >= 10
    train, _, _ = build([prefix], num_samples=(0, 0, 0))  # nothing is asked for
    assert len(train) == 0


def test_small_held_out_splits_repeat_their_documents(make_corpus, logged):
    prefix = make_corpus([list(range(20)), [1, 2, 3], [7]])
    _, valid, test = build([prefix], "1,1,1", num_samples=(4, 2, 3))
    assert set(valid[0]["text"].tolist()) == {1, 2, 3}
    assert test[2]["text"].tolist() == [7] * 5
    said = logged()
    assert "the valid split of" in said and "the test split of" in said


def test_splits_that_hold_nothing_are_none(make_corpus):
    prefix = make_corpus([list(range(20)), [], []])
    assert [d is None for d in build([prefix], "1,1,1")] == [False, True, True]
    assert [d is None for d in build([prefix], "0,1,0", num_samples=(5, 5, 5))] == [
        True,
        False,
        True,
    ]


def test_nothing_asked_for(make_corpus):
    prefix = make_corpus([list(range(20)), [1, 2]])
    train, valid, _ = build([prefix], "1,1", num_samples=(0, 0, 0))
    assert (len(train), len(valid)) == (4, 0)  # the whole epoch, as PaddleNLP
    train, _, _ = build(["1", prefix], num_samples=(0, 0, 0))
    assert len(train) == 0


def test_blend_leaves_out_an_empty_split(make_corpus):
    large = make_corpus(counting_documents([10] * 20), "large")
    small = make_corpus([[1000] * 30], "small")
    train, valid, test = build(["1", small, "3", large], "90,10,0", num_samples=(40, 12, 0))
    assert [dataset.corpus.prefix for dataset in train.datasets] == [small, large]
    assert np.bincount(train.dataset_index).tolist() == [10, 30]
    assert [dataset.corpus.prefix for dataset in valid.datasets] == [large]
    assert len(valid) == 12 and valid[11]["text"].max() < 1000
    assert test is None


def test_weights_beside_an_empty_train_split_add_up_to_one(make_corpus):
    """The members have to be built for all samples: one corpus has nothing to give."""
    prefixes = [
        make_corpus(counting_documents([10] * 20), "a"),
        make_corpus([[], [1, 2, 3]], "empty"),
        make_corpus(counting_documents([10] * 20), "b"),
    ]
    blend = [word for weight, prefix in zip("153", prefixes) for word in (weight, prefix)]
    (train, _, _), order = build_datasets(blend, "1,1", 4, (400, 0, 0), 0)
    assert order.weights == [0.25, 0.75]
    assert [corpus.parts for corpus in order.corpora] == [[121], [322]]
    assert np.bincount(train.dataset_index).tolist() == [100, 300]


@pytest.mark.parametrize("count", [1, 2, 3, 7, 8, 9, 16, 40])
@pytest.mark.parametrize("kind", ["equal", "random", "tenths"])
def test_blend_takes_what_lags_its_weight_the_most(count, kind):
    """The first of equals, of which weights that are equal or round numbers make many."""
    weights = {
        "equal": np.ones(count),
        "random": np.random.RandomState(count).random_sample(count),
        "tenths": np.arange(1, count + 1) % 4 + 1.0,
    }[kind]
    weights /= weights.sum()
    datasets, samples = _native.build_blending_indices(weights, 1000)
    taken = np.zeros(count, np.int64)
    for step, (dataset, sample) in enumerate(zip(datasets, samples)):
        assert dataset == np.argmax(weights * max(step, 1) - taken)
        assert sample == taken[dataset]
        taken[dataset] += 1
    assert np.all(np.abs(taken - weights * 1000) <= 1)


@pytest.mark.parametrize("weights", [[], [[1.0]], [np.nan], [0.5, np.inf]])
def test_blend_refuses_wrong_weights(weights):
    with pytest.raises(ValueError, match="weights must be"):
        _native.build_blending_indices(np.array(weights, np.float64), 10)


@pytest.mark.parametrize(
    ("data_prefix", "said"),
    [
        ([], "0 parts"),
        (["1", "a", "2"], "3 parts"),
        (["a", "1"], "'a' where a positive weight"),
        (["0", "a"], "'0' where"),
        (["-1", "a"], "'-1' where"),
        (["nan", "a"], "'nan' where"),
        (["inf", "a"], "'inf' where"),
        (["1", "a"] * 32768, "32768 datasets"),
    ],
)
def test_wrong_blend(data_prefix, said):
    with pytest.raises(UserError, match=said):
        build(data_prefix)


def test_wrong_numbers(make_corpus):
    with pytest.raises(UserError, match="seq_length is 0"):
        build([make_corpus([[1, 2]])], seq_length=0)
    with pytest.raises(UserError, match="no negative number"):
        build([make_corpus([[1, 2]])], num_samples=(1, -1, 0))


def test_input_dir_folder(make_corpus, tmp_path):
    b = make_corpus([[1]], "b")
    assert resolve_input_dir(str(tmp_path)) == [b]
    a = make_corpus([[1]], "a b")
    np.save(tmp_path / "c_ids.npy", np.array([1, 2]))
    np.savez(tmp_path / "c_idx.npz", lens=[2], docs=[0, 1])
    (tmp_path / "notes.txt").write_text("")
    c = str(tmp_path / "c")
    assert resolve_input_dir(str(tmp_path)) == ["1.0", a, "1.0", b, "1.0", c]


@pytest.mark.parametrize("suffix", ["", ".bin", ".idx"])
def test_input_dir_prefix(make_corpus, suffix):
    prefix = make_corpus([[1]], "with a space")
    assert resolve_input_dir(prefix + suffix) == [prefix]


def test_input_dir_blend():
    blend = ["0.3", "data/a", "0.7", "data/b c"]
    assert resolve_input_dir("0.3 data/a 0.7 'data/b c.idx'") == blend
    assert resolve_input_dir(" 0.3  data/a.bin 0.7 data/b\\ c ") == blend


@pytest.mark.parametrize("input_dir", ["nowhere", "'open quote 1", ""])
def test_input_dir_that_is_nothing(input_dir):
    with pytest.raises(UserError, match="input_dir is"):
        resolve_input_dir(input_dir)


def test_input_dir_without_a_corpus(tmp_path):
    with pytest.raises(UserError, match=r"no file named \*\.idx"):
        resolve_input_dir(str(tmp_path))
