"""The blank infilling of GLM: what it does to any sample, and how often."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from corpora import counting_documents
from hypothesis import given, settings
from hypothesis import strategies as st

from pypkg.data import BatchLoader, BlankInfilling, build_train_valid_test_datasets, causal
from pypkg.data.loading.objectives import IGNORED_LABEL
from pypkg.errors import UserError

MASK, GMASK, SOP, EOP = 90001, 90002, 90003, 90004


def objective(seq_length: int, two_dimensional: bool = True, seed: int = 7) -> BlankInfilling:
    return BlankInfilling(
        seq_length=seq_length,
        mask_id=MASK,
        gmask_id=GMASK,
        sop_id=SOP,
        eop_id=EOP,
        two_dimensional=two_dimensional,
        seed=seed,
    )


def build(seq_length: int, samples: list[int], two_dimensional: bool = True, seed: int = 7) -> dict:
    """A batch whose tokens all differ, so that each is found again."""
    text = np.arange(len(samples) * (seq_length + 1)).reshape(len(samples), -1)
    return objective(seq_length, two_dimensional, seed)(np.array(samples), text)


def rows(batch: dict) -> list[dict]:
    return [{name: array[i] for name, array in batch.items()} for i in range(len(batch["labels"]))]


def blanks(row: dict) -> list[tuple[list[int], list[int], list[int]]]:
    """input_ids, labels and columns of each blank, in the order in which they are generated."""
    begins = np.flatnonzero(row["input_ids"] == SOP)
    parts = [*begins, len(row["input_ids"])]
    return [
        (row["input_ids"][a:b].tolist(), row["labels"][a:b].tolist(), list(range(a, b)))
        for a, b in pairwise(parts)
    ]


cases = given(
    seq_length=st.integers(3, 200),
    samples=st.lists(st.integers(0, 2**40), min_size=1, max_size=4),
    two_dimensional=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)


@cases
def test_shapes(seq_length, samples, two_dimensional, seed):
    batch = build(seq_length, samples, two_dimensional, seed)
    sizes = (len(samples), seq_length)
    positions = (len(samples), 2, seq_length) if two_dimensional else sizes
    assert {name: (array.shape, array.dtype) for name, array in batch.items()} == {
        "input_ids": (sizes, np.int64),
        "labels": (sizes, np.int64),
        "position_ids": (positions, np.int64),
        "prefix_lengths": ((len(samples),), np.int32),
    }


@cases
def test_the_sample_is_found_again(seq_length, samples, two_dimensional, seed):
    """Putting what each blank generates in place of its mask gives the tokens in their order."""
    for i, row in enumerate(rows(build(seq_length, samples, two_dimensional, seed))):
        context = row["input_ids"][: row["prefix_lengths"]].tolist()
        first = i * (seq_length + 1)
        parts = [[token] for token in context]
        generated = blanks(row)
        positions = row["position_ids"][0] if two_dimensional else row["position_ids"]
        for inputs, labels, columns in generated:
            assert inputs[0] == SOP
            if GMASK in context:
                assert len(generated) == 1
                assert context[-1] == GMASK and inputs[1:] == labels[:-1]
                parts[-1] = labels
            else:
                assert labels[-1] == EOP and inputs[1:] == labels[:-1]
                assert context[positions[columns[0]]] == MASK
                parts[positions[columns[0]]] = labels[:-1]
        tokens = [token for part in parts for token in part]
        lost = 1 if GMASK in context else 2 * len(generated)
        assert tokens == list(range(first, first + seq_length - lost))
        assert sum(token in (MASK, GMASK) for token in context) == len(generated)


@cases
def test_loss_only_after_the_context(seq_length, samples, two_dimensional, seed):
    for row in rows(build(seq_length, samples, two_dimensional, seed)):
        prefix = row["prefix_lengths"]
        assert row["input_ids"][prefix] == SOP
        assert SOP not in row["input_ids"][:prefix]
        assert (row["labels"][:prefix] == IGNORED_LABEL).all()
        assert (row["labels"][prefix:] != IGNORED_LABEL).all()


@cases
def test_two_dimensional_positions(seq_length, samples, two_dimensional, seed):
    """Position of the mask for all of a blank, counted inside it from 1 on."""
    for row in rows(build(seq_length, samples, True, seed)):
        position, block = row["position_ids"]
        prefix = row["prefix_lengths"]
        assert position[:prefix].tolist() == list(range(prefix))
        assert not block[:prefix].any()
        for _, _, columns in blanks(row):
            assert len(set(position[columns])) == 1
            assert row["input_ids"][position[columns[0]]] in (MASK, GMASK)
            assert block[columns].tolist() == list(range(1, len(columns) + 1))


@cases
def test_one_dimensional_positions(seq_length, samples, two_dimensional, seed):
    both, one = (rows(build(seq_length, samples, two, seed)) for two in (True, False))
    for two_row, one_row in zip(both, one):
        assert (two_row["input_ids"] == one_row["input_ids"]).all()
        if GMASK in one_row["input_ids"]:
            assert one_row["position_ids"].tolist() == list(range(seq_length))
        else:
            assert (one_row["position_ids"] == two_row["position_ids"][0]).all()


@cases
def test_a_row_depends_on_its_sample_and_the_seed_alone(seq_length, samples, two_dimensional, seed):
    text = np.arange(seq_length + 1)
    make = objective(seq_length, two_dimensional, seed)
    together = make(np.array(samples), np.stack([text] * len(samples)))
    np.random.seed(0)
    for i, sample in enumerate(samples):
        alone = make(np.array([sample]), text[None])
        for name in together:
            assert (together[name][i] == alone[name][0]).all()


@settings(max_examples=20)
@given(seq_length=st.integers(7, 300), seed=st.integers(0, 1000))
def test_span_lengths_add_up_to_their_share(seq_length, seed):
    for row in rows(build(seq_length, list(range(20)), seed=seed)):
        if MASK in row["input_ids"]:
            generated = sum(len(labels) - 1 for _, labels, _ in blanks(row))
            assert generated == max(1, int(0.15 * seq_length))


def test_blanks_are_not_adjacent_and_come_in_any_order():
    orders = Counter()
    for row in rows(build(128, list(range(300)))):
        if MASK not in row["input_ids"]:
            continue
        masks = np.flatnonzero(row["input_ids"] == MASK)
        assert (np.diff(masks) > 1).all()
        places = [int(row["position_ids"][0][columns[0]]) for _, _, columns in blanks(row)]
        assert sorted(places) == masks.tolist()
        orders[places == sorted(places)] += 1
    assert orders[False] > 50 > orders[True]


def test_how_often_and_how_long():
    """3,000 samples: shares within 4 standard deviations of what is drawn from."""
    number, seq_length = 3000, 100
    batch = build(seq_length, list(range(number)))
    suffix = (batch["input_ids"] == GMASK).any(axis=1)
    assert abs(suffix.mean() - 0.7) < 4 * np.sqrt(0.7 * 0.3 / number)
    # The length of the suffix is uniform on 1 to 99.
    lengths = seq_length - batch["prefix_lengths"][suffix]
    assert lengths.min() == 1 and lengths.max() == 99
    assert abs(lengths.mean() - 50) < 4 * np.sqrt(98 * 100 / 12 / suffix.sum())
    spans = [len(columns) - 1 for row in rows(batch) if MASK in row["input_ids"]
             for _, _, columns in blanks(row)]  # fmt: skip
    # Mean of a Poisson variable of mean 3 that is not 0: 3 / (1 - exp(-3)) = 3.16. The last span
    # of a sample is cut, at 15 tokens every fifth or so by one or two tokens.
    assert 2.6 < np.mean(spans) < 3.16
    assert set(range(1, 8)) <= set(spans)


def test_an_example_by_hand():
    """The two forms in the docstring, for a sample of 0, 1, ... and seq_length 10."""
    both = rows(build(10, [0, 1, 2, 3, 4, 5, 6, 7]))
    suffix = next(row for row in both if GMASK in row["input_ids"])
    cut = int(suffix["prefix_lengths"]) - 1
    first = suffix["labels"][-1] - 8
    expected = [*range(first, first + cut), GMASK, SOP, *range(first + cut, first + 8)]
    assert suffix["input_ids"].tolist() == expected
    masked = next(row for row in both if MASK in row["input_ids"])  # 15 % of 10: one token
    place = int(np.flatnonzero(masked["input_ids"] == MASK)[0])
    assert masked["prefix_lengths"] == 8
    start = masked["labels"][8] - place
    context = [*range(start, start + place), MASK, *range(start + place + 1, start + 8)]
    assert masked["input_ids"].tolist() == [*context, SOP, start + place]
    assert masked["labels"].tolist() == [IGNORED_LABEL] * 8 + [start + place, EOP]
    assert masked["position_ids"].tolist() == [[*range(8), place, place], [0] * 8 + [1, 2]]


# Of 16 tokens numbered from 0: where [gMASK] stands, or the input_ids of a [MASK] sample.
@pytest.mark.parametrize(
    ("seed", "sample", "cut"),
    [(7, 0, 11), (7, 1, 0), (7, 2, 6), (7, 2**32 + 1, 3), (8, 1, 14)],
)
def test_random_stream_of_a_suffix_is_pinned(seed, sample, cut):
    """Another stream would change what a resumed run sees."""
    expected = [*range(cut), GMASK, SOP, *range(cut, 14)]
    assert build(16, [sample], seed=seed)["input_ids"].tolist() == [expected]


def test_random_stream_of_spans_is_pinned():
    batch = build(40, [3])
    context = [*range(7), MASK, *range(9, 26), MASK, *range(28, 32), MASK]
    assert batch["input_ids"].tolist() == [[*context, SOP, 26, 27, SOP, 7, 8, SOP, 32, 33]]
    labels = [26, 27, EOP, 7, 8, EOP, 32, 33, EOP]
    assert batch["labels"].tolist() == [[IGNORED_LABEL] * 31 + labels]


def test_too_short():
    with pytest.raises(UserError, match="max_seq_length is 2"):
        objective(2)


def test_causal_is_a_shift_by_one():
    text = np.arange(10).reshape(2, 5)
    batch = causal(np.array([0, 1]), text)
    assert batch["input_ids"].tolist() == [[0, 1, 2, 3], [5, 6, 7, 8]]
    assert batch["labels"].tolist() == [[1, 2, 3, 4], [6, 7, 8, 9]]


@pytest.mark.parametrize("size", [1, 3])
def test_no_two_arrays_of_a_batch_share_memory(size):
    """What is written to one, such as -100 to the labels, must not show in another."""
    text = np.arange(size * 41).reshape(size, 41)
    for make in (causal, objective(40), objective(40, two_dimensional=False)):
        arrays = list(make(np.arange(size), text).values())
        assert all(array.flags.writeable and array.flags.c_contiguous for array in arrays)
        for number, array in enumerate(arrays):
            assert not any(np.shares_memory(array, other) for other in [text, *arrays[:number]])


def test_loader_resumes_and_ranks_agree(make_corpus):
    prefix = make_corpus(counting_documents([11, 23, 70, 50]))
    dataset = build_train_valid_test_datasets([prefix], "1", 12, (40, 0, 0), 3)[0]
    make = objective(12)
    whole = [row for batch in BatchLoader(dataset, 2, objective=make) for row in rows(batch)]
    parts = [
        BatchLoader(dataset, 1, 6, objective=make, data_parallel_rank=rank, data_parallel_size=2)
        for rank in (0, 1)
    ]
    rest = [row for batches in zip(*parts) for batch in batches for row in rows(batch)]
    assert len(rest) == len(whole) - 6 > 20
    for left, right in zip(rest, whole[6:]):
        for name in left:
            assert (left[name] == right[name]).all()
