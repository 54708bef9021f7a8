"""Resumed and changed runs: no sample comes twice or is left out beyond the promised order."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from corpora import counting_documents
from hypothesis import given, settings
from hypothesis import strategies as st

from pypkg.data import (
    BatchLoader,
    IndexedDatasetWriter,
    OrderOptions,
    SampleOrder,
    build_datasets,
    build_train_valid_test_datasets,
    resolve_input_dir,
)
from pypkg.data.datasets.order import part_length
from pypkg.errors import UserError

SEQ = 4
SIZES = {"a": [11, 0, 23, 7, 40, 5, 30], "b": [9, 50, 3], "c": [300]}


@pytest.fixture(scope="module")
def prefixes(tmp_path_factory) -> dict[str, str]:
    """Corpora whose tokens tell where they are from: a counts from 0, b from 1000, c from 2000."""
    folder = tmp_path_factory.mktemp("corpora")
    for number, (name, sizes) in enumerate(SIZES.items()):
        with IndexedDatasetWriter(str(folder / name), np.uint16) as writer:
            for document in counting_documents(sizes):
                writer.add_document((document + 1000 * number).astype(np.uint16))
            writer.commit()
    return {name: str(folder / name) for name in SIZES}


def build(data_prefix, num_samples, earlier=None, consumed=0, kind="run", seed=3, split="1"):
    """The train dataset and its order; ``earlier`` goes through JSON, as in a checkpoint."""
    options = OrderOptions(kind=kind, consumed=consumed)
    if earlier is not None:
        dataset, order = earlier
        state = json.loads(json.dumps(order.to_json(dataset.samples_consumed(consumed))))
        options = OrderOptions(kind=kind, earlier=SampleOrder.from_json(state), consumed=consumed)
    datasets, order = build_datasets(data_prefix, split, SEQ, (num_samples, 0, 0), seed, options)
    return datasets[0], order


def texts(dataset, first=0, end=None) -> list[list[int]]:
    return dataset.read(np.arange(first, len(dataset) if end is None else end)).tolist()


def blend(prefixes, **weights) -> list[str]:
    return [part for name, weight in weights.items() for part in (str(weight), prefixes[name])]


def corpus_of(text: list[int]) -> str:
    return "abc"[text[0] // 1000]


@pytest.mark.parametrize("kind", ["run", "epoch"])
@pytest.mark.parametrize("consumed", [0, 1, 30, 58])
def test_the_same_settings_go_on_as_if_nothing_had_happened(prefixes, kind, consumed):
    for data_prefix in ([prefixes["a"]], blend(prefixes, a=1, b=3)):
        whole = build(data_prefix, 60, kind=kind)
        resumed, _ = build(data_prefix, 60, whole, consumed, kind)
        assert texts(resumed) == texts(whole[0])
        fixed = build_train_valid_test_datasets(data_prefix, "1", SEQ, (60, 0, 0), 3)[0]
        if kind == "run":
            assert texts(whole[0]) == texts(fixed)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_longer_run_ends_the_order_and_adds_to_it(prefixes, data):
    """Made longer again and again: whole epochs of the first order, then of the second, ..."""
    needed = data.draw(st.integers(1, 100))
    run = build([prefixes["a"]], needed)
    whole = sum(SIZES["a"])
    consumed = 0
    for _ in range(3):
        before = texts(run[0])
        consumed = data.draw(st.integers(consumed, needed))
        needed = data.draw(st.integers(consumed, 200))
        run = build([prefixes["a"]], needed, run, consumed)
        assert len(run[0]) >= needed
        assert texts(run[0])[: len(before)] == before
    begin = 0
    for part in run[1].corpora[0].parts:
        length = part_length(whole, SEQ, part)
        tokens = [token for text in texts(run[0], begin, begin + length) for token in text[:-1]]
        counts = np.bincount(tokens, minlength=whole)
        # Whole epochs: every token as often as any other, save those of what is left at the end.
        epochs = -(-length * SEQ // whole)
        assert set(counts.tolist()) <= {epochs - 1, epochs}
        assert (counts == epochs - 1).sum() == epochs * whole - length * SEQ <= SEQ
        begin += length
    assert begin == len(run[0])


def test_a_shorter_run_or_another_batch_size_changes_nothing(prefixes):
    first = build([prefixes["a"]], 60)
    resumed, _ = build([prefixes["a"]], 20, first, 10)
    assert texts(resumed) == texts(first[0])
    # 10 of 60 samples in batches of 2; then batches of 5 on each of two ranks.
    loaders = [
        BatchLoader(resumed, 5, 10, data_parallel_rank=rank, data_parallel_size=2)
        for rank in range(2)
    ]
    got = [row for pair in zip(*loaders) for batch in pair for row in batch["input_ids"].tolist()]
    assert got == [text[:-1] for text in texts(first[0], 10, 10 + len(got))]


def test_a_longer_blend_begins_like_the_shorter_one(prefixes):
    data_prefix = blend(prefixes, a=1, b=3)
    first = build(data_prefix, 60)
    longer, order = build(data_prefix, 500, first, 33)
    assert len(longer) == 500
    assert texts(longer, 0, 60) == texts(first[0])
    assert [len(corpus.parts) for corpus in order.corpora] == [2, 2]
    again, _ = build(data_prefix, 500, (longer, order), 300)
    assert texts(again) == texts(longer)


@pytest.mark.parametrize("consumed", [0, 17, 60])
def test_in_another_blend_each_corpus_goes_on_where_it_was(prefixes, consumed):
    first = build(blend(prefixes, a=1, b=3), 60)
    given = first[0].samples_consumed(consumed)
    assert sum(given) == consumed
    changed = build(blend(prefixes, c=1, b=1), 160, first, consumed)
    dataset, order = changed
    assert len(dataset) == 160 and order.start == consumed
    if consumed:
        with pytest.raises(IndexError, match=f"where the first is {consumed}"):
            dataset.read(np.array([consumed - 1]))
    later = texts(dataset, consumed)
    of_b = [text for text in later if corpus_of(text) == "b"]
    of_c = [text for text in later if corpus_of(text) == "c"]
    assert len(of_b) + len(of_c) == len(later) and abs(len(of_b) - len(of_c)) <= 1
    # What b gives continues what it gave before; c begins at its beginning.
    before = [text for text in texts(first[0], 0, consumed) if corpus_of(text) == "b"]
    member = first[0].datasets[1]
    everything = texts(member)
    assert (before + of_b)[: len(everything)] == everything[: len(before + of_b)]
    alone = build([prefixes["c"]], len(of_c) + 20)[0]
    assert of_c == texts(alone, 0, len(of_c))
    # And once more from the middle of the second blend, whose weights stay.
    resumed, _ = build(blend(prefixes, c=1, b=1), 160, changed, consumed + 41)
    assert texts(resumed, consumed) == later


def test_from_one_corpus_to_a_blend_and_back(prefixes):
    first = build([prefixes["a"]], 60)
    blended = build(blend(prefixes, a=1, c=1), 60, first, 20)
    of_a = [text for text in texts(blended[0], 20) if corpus_of(text) == "a"]
    assert of_a == texts(first[0], 20, 20 + len(of_a))
    back, order = build([prefixes["a"]], 100, blended, 50)
    given_by_a = 20 + sum(corpus_of(text) == "a" for text in texts(blended[0], 20, 50))
    assert order.corpora[0].first == given_by_a
    known = texts(first[0])[given_by_a:]
    assert texts(back, 50)[: len(known)] == known


@pytest.mark.parametrize("change", [{"seed": 4}, {"split": "3,1"}, {"kind": "epoch"}])
def test_another_order_is_said_and_begins_at_its_beginning(prefixes, change, logged):
    first = build([prefixes["a"]], 60)
    changed, _ = build([prefixes["a"]], 80, first, 20, **change)
    assert f"{next(iter(change))} was" in logged()
    fresh, _ = build([prefixes["a"]], 60, **change)
    assert texts(changed, 20, 80) == texts(fresh, 0, 60)


def test_changed_files_are_another_corpus(prefixes, tmp_path, logged):
    first = build([prefixes["a"]], 60)
    with IndexedDatasetWriter(str(tmp_path / "a"), np.uint16) as writer:
        writer.add_document(np.arange(200, dtype=np.uint16))
        writer.commit()
    changed, _ = build([str(tmp_path / "a")], 80, first, 20)
    assert "another one since" in logged()
    assert texts(changed, 20, 60) == texts(build([str(tmp_path / "a")], 60)[0], 0, 40)


def test_the_epoch_order_does_not_depend_on_the_length_of_the_run(prefixes):
    tokens = sum(SIZES["a"])
    in_epoch = (tokens - 1) // SEQ
    for data_prefix in ([prefixes["a"]], blend(prefixes, a=1, b=3)):
        short, longer = (build(data_prefix, number, kind="epoch")[0] for number in (5, 400))
        assert texts(longer, 0, 5) == texts(short, 0, 5)
    alone = build([prefixes["a"]], 3 * in_epoch, kind="epoch")[0]
    assert len(alone) == 3 * in_epoch
    epochs = [texts(alone, k * in_epoch, (k + 1) * in_epoch) for k in range(3)]
    assert epochs[0] != epochs[1] != epochs[2]
    for epoch in epochs:
        counts = np.bincount([token for text in epoch for token in text[:-1]], minlength=tokens)
        assert counts.max() == 1 and counts.sum() == in_epoch * SEQ
    # The first epoch is PaddleNLP's first epoch.
    assert epochs[0] == texts(build([prefixes["a"]], in_epoch)[0])


def test_an_epoch_without_a_sample(prefixes):
    """A split smaller than a sample repeats its documents within it, in either order."""
    for kind in ("run", "epoch"):
        datasets, _ = build_datasets(
            [prefixes["b"]], "2,1,0", SEQ, (3, 3, 0), 3, OrderOptions(kind=kind)
        )
        assert len(datasets[1]) >= 3


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"blend_by": "size"}, [116, 62, 300]),
        ({"blend_by": "temperature", "blend_temperature": 2.0}, np.sqrt([116, 62, 300])),
        ({"blend_by": "temperature", "blend_temperature": 1e9}, [1, 1, 1]),
        ({"blend_by": "weights"}, [1, 1, 1]),
    ],
)
def test_blends_by_size(prefixes, options, expected):
    data_prefix = resolve_input_dir(" ".join(prefixes.values()), weighted=False)
    assert data_prefix == [part for prefix in prefixes.values() for part in ("1.0", prefix)]
    datasets, order = build_datasets(data_prefix, "1", SEQ, (600, 0, 0), 3, OrderOptions(**options))
    assert order.weights == pytest.approx(np.array(expected) / np.sum(expected))
    given = datasets[0].samples_consumed(600)
    assert np.abs(np.array(given) - 600 * np.array(order.weights)).max() <= 1
    assert given == np.bincount([text[0] // 1000 for text in texts(datasets[0])]).tolist()


def test_weights_beside_another_way_to_blend(prefixes):
    with pytest.raises(UserError, match=r"weight 0\.3, but blend_by takes the weights from"):
        resolve_input_dir(f"0.3 {prefixes['a']} 0.7 {prefixes['b']}", weighted=False)


def test_sources_are_those_of_the_samples(prefixes):
    first = build(blend(prefixes, a=1, b=3), 60)
    for dataset, begin in (first[0], 0), (build(blend(prefixes, b=1, c=1), 90, first, 30)[0], 30):
        names = [corpus.prefix for corpus in dataset.corpora]
        loader = BatchLoader(dataset, 5, begin, with_sources=True)
        for batch in loader:
            for text, source in zip(batch["input_ids"].tolist(), batch["sources"]):
                assert names[source] == prefixes[corpus_of(text)]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("kind", "random"), ("split", 7), ("seq_length", 0), ("seq_length", True), ("seed", -1),
        ("weights", [0.5]), ("weights", ["1", 1]), ("weights", [float("nan"), 1]), ("corpora", {}),
        ("corpora", [7, 8]), ("start", 1.5), ("end", 0), ("corpora[1].name", None),
        ("corpora[1].parts", "12"), ("corpora[1].parts", [-1]), ("corpora[1].position", "1"),
        ("corpora[1].last", 3),
    ],
)  # fmt: skip
def test_an_order_that_no_run_writes_is_named(prefixes, field, value):
    dataset, order = build(blend(prefixes, a=1, b=3), 60)
    state = order.to_json(dataset.samples_consumed(4))
    assert SampleOrder.from_json(state).corpora[1].name == "b"
    where = state["corpora"][1] if "." in field else state
    where[field.rpartition(".")[2]] = value
    with pytest.raises(ValueError, match=re.escape(field)):
        SampleOrder.from_json(state)
    del where[field.rpartition(".")[2]]
    if field not in ("end", "corpora[1].last"):
        with pytest.raises(ValueError, match=re.escape(f"{field} is missing")):
            SampleOrder.from_json(state)
