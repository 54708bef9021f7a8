"""Index maps on disk: found again, never wrong, whatever happened to the files."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
from corpora import GOLDEN, counting_documents
from disk_log import DiskLog

from pypkg.data import IndexedDataset, build_datasets, build_train_valid_test_datasets
from pypkg.data.index import cache
from pypkg.data.index.cache import FOLDER, IndexCache
from pypkg.errors import UserError

SIZES = [30, 0, 7, 1, 55, 12, 200, 3]


@pytest.fixture
def builds(monkeypatch) -> list:
    """The plans that index maps were built for."""
    plans = []
    build = cache.build_index_maps

    def counted(sizes, plan):
        plans.append(plan)
        return build(sizes, plan)

    monkeypatch.setattr(cache, "build_index_maps", counted)
    return plans


@pytest.fixture
def corpus(make_corpus) -> str:
    return make_corpus(counting_documents(SIZES))


def test_a_set_is_whole_before_its_description_and_waits_for_no_disk(corpus, monkeypatch):
    """Checksums notice what a crash of the machine loses (test_damaged_files_are_made_anew)."""
    disk = DiskLog(monkeypatch)
    train(corpus)
    suffixes = [event.rpartition(".")[2] for event in disk.changes()]
    assert suffixes == ["npy", "npy", "npy", "dsc"]
    assert disk.events == disk.changes()


def train(prefix, num_samples=60, cache="beside", seed=3):
    """The samples of a train dataset, all of them."""
    cache = IndexCache() if cache == "beside" else cache
    prefixes = [prefix] if isinstance(prefix, str) else prefix
    datasets, _ = build_datasets(prefixes, "1", 8, (num_samples, 0, 0), seed, cache=cache)
    return datasets[0].read(np.arange(len(datasets[0]))).tolist()


def files(folder) -> list[str]:
    """The names in a folder, without the lock's."""
    return sorted(set(os.listdir(folder)) - {"build.lock"})


def test_found_again(corpus, builds):
    expected = train(corpus, cache=None)
    assert train(corpus) == expected
    assert len(builds) == 1
    names = files(Path(corpus).parent / FOLDER)
    assert [name.split("_", 1)[-1] for name in names if name.endswith(".npy")] == [
        "doc_idx.npy",
        "sample_idx.npy",
        "shuffle_idx.npy",
    ]
    assert train(corpus) == expected
    assert len(builds) == 1


def test_the_fixed_call_keeps_maps_beside_the_data_or_in_data_cache(corpus, builds, tmp_path):
    arguments = ([corpus], "80,20", 8, (60, 4, 0), 3)
    expected, _ = build_datasets(*arguments)
    for options in ({}, {"data_cache": str(tmp_path / "own")}, {"share_folder": True}):
        for ours, same in zip(build_train_valid_test_datasets(*arguments, **options), expected):
            assert (ours is None) == (same is None)
            if ours is not None:
                assert [t.tolist() for t in ours.read(np.arange(len(ours)))] == [
                    t.tolist() for t in same.read(np.arange(len(same)))
                ]
    assert len(builds) == 2  # train and valid, found beside the data ever after
    assert not (tmp_path / "own").exists()


def test_data_cache(corpus, builds, tmp_path):
    cache = IndexCache(tmp_path / "some" / "where")
    for _ in range(2):
        assert train(corpus, cache=cache) == train(corpus, cache=None)
    assert len(builds) == 1
    assert len(files(tmp_path / "some" / "where")) == 4
    assert not (tmp_path / FOLDER).exists()


def test_what_does_not_matter_does_not_build_anew(corpus, builds, monkeypatch):
    train(corpus, 60)
    epoch = len(train(corpus, 60, None))
    train(corpus, 61)  # as many epochs
    monkeypatch.chdir(Path(corpus).parent)
    train("corpus")
    (Path(corpus).parent / "link").symlink_to(Path(corpus).parent)
    train(str(Path(corpus).parent / "link" / "corpus"))
    assert len(builds) == 1
    train(corpus, 60, seed=4)
    train(corpus, epoch + 1)
    assert len(builds) == 3


@pytest.mark.parametrize("same_sizes", [False, True])
def test_other_data_under_the_same_name(make_corpus, same_sizes):
    train(make_corpus(counting_documents(SIZES)))
    sizes = SIZES if same_sizes else [*SIZES[::-1], 4]
    prefix = make_corpus([document + 1000 for document in counting_documents(sizes)])
    found = train(prefix)
    assert found == train(prefix, cache=None)
    assert min(map(min, found)) >= 1000


def _halve(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def _zero(file: Path) -> None:
    size = file.stat().st_size
    with open(file, "r+b") as opened:
        opened.seek(size // 2)
        opened.write(bytes(size - size // 2))


def _flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-2] ^= 1
    file.write_bytes(data)


def _empty(file: Path) -> None:
    os.truncate(file, 0)


@pytest.mark.parametrize("harm", [_halve, _zero, _flip, _empty, os.remove])
@pytest.mark.parametrize("kind", ["doc_idx.npy", "sample_idx.npy", "shuffle_idx.npy", ".dsc"])
def test_damaged_files_are_made_anew(corpus, builds, harm, kind):
    expected = train(corpus)
    folder = Path(corpus).parent / FOLDER
    (file,) = [folder / name for name in files(folder) if name.endswith(kind)]
    whole = file.read_bytes()
    harm(file)
    assert train(corpus) == expected
    assert len(builds) == 2
    assert file.read_bytes() == whole
    assert train(corpus) == expected
    assert len(builds) == 2


def test_nothing_is_left_by_builders_that_died(corpus):
    folder = Path(corpus).parent / FOLDER
    folder.mkdir()
    old, new = folder / "abc_doc_idx.npy.host.1.tmp", folder / "abc_doc_idx.npy.host.2.tmp"
    for file in (old, new):
        file.write_bytes(b"part")
    os.utime(old, (1, 1))
    train(corpus)
    assert not old.exists() and new.exists()


def test_a_folder_is_tidied_once_for_all_its_sets(make_corpus, monkeypatch):
    """Looking through a folder for each set that is built takes the square of their number."""
    tidied = []
    monkeypatch.setattr(cache, "remove_abandoned", tidied.append)
    index_cache = IndexCache()
    prefixes = [make_corpus(counting_documents(SIZES), name) for name in ("one", "two")]
    for prefix in prefixes:
        train(prefix, cache=index_cache)
    assert tidied == sorted({Path(prefix).parent / FOLDER for prefix in prefixes})


def test_a_small_disk_is_noticed_before_building(corpus, builds, tmp_path, monkeypatch, logged):
    usage = namedtuple("usage", "total used free")(10**9, 10**9, 100)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    logged()
    assert train(corpus) == train(corpus, cache=None)
    said = logged()
    assert "are not kept on disk" in said and "0 MiB free" in said
    with pytest.raises(UserError, match=r"data_cache cannot keep .* 0 MiB free"):
        train(corpus, cache=IndexCache(tmp_path / "own"))
    assert len(builds) == 1


def test_a_data_cache_that_cannot_be(corpus, tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below", "/proc/nowhere"):
        with pytest.raises(UserError, match="data_cache cannot keep"):
            train(corpus, cache=IndexCache(path))


def test_blends(make_corpus, builds, tmp_path):
    a = make_corpus(counting_documents(SIZES), "a")
    b = make_corpus([document + 500 for document in counting_documents(SIZES[::-1])], "b")
    blend = ["0.3", a, "0.7", b]
    expected = train(blend, cache=None)
    assert train(blend) == expected  # members beside the data, the blend itself nowhere
    assert len(builds) == 2
    own = IndexCache(tmp_path / "own")
    assert train(blend, cache=own) == expected
    kept = {np.load(file).dtype.name: file for file in (tmp_path / "own").glob("*.npy")}
    assert sorted(kept) == ["int16", "int64"]
    _flip(kept["int16"])
    assert train(blend, cache=own) == expected
    assert train(["0.31", a, "0.69", b], cache=own) == train(["0.31", a, "0.69", b], cache=None)


# What PaddleNLP has written.


@pytest.fixture
def paddlenlp_cache(tmp_path):
    """A golden corpus with the maps that PaddleNLP drew for its train split, swapped a little.

    The first two samples change places, which tells these maps from those built here.
    """
    (case,) = [c for c in json.loads((GOLDEN / "cases.json").read_text())["cases"]
               if c["case"] == "u16_multi_epoch_sep"]  # fmt: skip
    for suffix in (".bin", ".idx"):
        shutil.copy(GOLDEN / f"docs_u16{suffix}", tmp_path / f"docs_u16{suffix}")
    prefix = str(tmp_path / "docs_u16")
    text = (
        f"GPT Dataset\n\nData prefix {prefix}\nDataset name train\n"
        f"Number of samples {case['num_samples'][0]}\nSequence length {case['seq_length']}\n"
        f"Random seed {case['seed']}\nSplit {case['split']}\n"
    )
    name = hashlib.md5(text.encode()).hexdigest()
    folder = tmp_path / FOLDER
    folder.mkdir()
    (folder / f"{name}.dsc").write_text(text)
    expected = np.load(GOLDEN / case["file"])
    for key in ("doc_idx", "sample_idx", "shuffle_idx"):
        array = expected[f"train.{key}"]
        if key == "shuffle_idx":
            array[:2] = array[1::-1].copy()
        np.save(folder / f"{name}_{key}.npy", array)

    arguments = (
        [prefix], case["split"], case["seq_length"], (case["num_samples"][0], 0, 0), case["seed"]
    )  # fmt: skip
    return arguments, folder / name, expected["train.shuffle_idx"]


def _damage_documents(base: Path) -> None:
    file = base.with_name(base.name + "_doc_idx.npy")
    documents = np.load(file)
    documents[[0, -1]] = documents[[-1, 0]]  # out of the last epoch, into it
    np.save(file, documents)


def _repeat_a_sample(base: Path) -> None:
    file = base.with_name(base.name + "_shuffle_idx.npy")
    samples = np.load(file)
    samples[0] = samples[1]
    np.save(file, samples)


def _damage_samples(base: Path) -> None:
    _flip(base.with_name(base.name + "_sample_idx.npy"))


def _halve_documents(base: Path) -> None:
    _halve(base.with_name(base.name + "_doc_idx.npy"))


def test_maps_of_paddlenlp(paddlenlp_cache, builds):
    arguments, _, shuffle_index = paddlenlp_cache
    train = build_train_valid_test_datasets(*arguments)[0]
    swapped = [*shuffle_index[1::-1], *shuffle_index[2:]]
    assert train.shuffle_idx.tolist() == swapped
    assert 0 not in [plan.first for plan in builds]  # those of the other splits alone


@pytest.mark.parametrize(
    "harm", [_damage_documents, _repeat_a_sample, _damage_samples, _halve_documents]
)
def test_damaged_maps_of_paddlenlp(paddlenlp_cache, harm):
    arguments, base, shuffle_index = paddlenlp_cache
    harm(base)
    train = build_train_valid_test_datasets(*arguments)[0]
    expected = build_datasets(*arguments)[0][0]
    assert train.shuffle_idx.tolist() == shuffle_index.tolist()
    assert np.array_equal(train.doc_idx, expected.doc_idx)
    assert np.array_equal(train.sample_idx, expected.sample_idx)


def test_maps_of_paddlenlp_for_other_data(paddlenlp_cache, make_corpus):
    """As many tokens in as many documents, but other documents."""
    arguments, _, _ = paddlenlp_cache
    sizes = IndexedDataset(arguments[0][0]).sizes[:190].tolist()
    make_corpus(counting_documents([*sizes[::-1], *[1] * 10]), "docs_u16")
    train = build_train_valid_test_datasets(*arguments)[0]
    expected = build_datasets(*arguments)[0][0]
    samples = np.arange(len(expected))
    assert train.read(samples).tolist() == expected.read(samples).tolist()
