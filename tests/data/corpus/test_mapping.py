"""Mapped files keep no descriptor, and one that is cut short is named."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pypkg.data import IndexCache, IndexedDataset, IndexedDatasetWriter
from pypkg.data.corpus.mapping import map_file, map_npy
from pypkg.data.datasets.gpt import GPTDataset
from pypkg.errors import UserError


def test_bytes_of_a_file(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"abc")
    mapped = map_file(file)
    assert mapped.tobytes() == b"abc" and mapped.dtype == np.uint8
    assert not mapped.flags.writeable
    file.write_bytes(b"")
    assert map_file(file).size == 0
    with pytest.raises(FileNotFoundError, match="missing"):
        map_file(tmp_path / "missing")
    with pytest.raises(IsADirectoryError):
        map_file(tmp_path)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("shape", [(), (0,), (5,), (3, 4)])
def test_arrays_of_numpy(tmp_path, shape, order):
    array = np.asarray(np.arange(np.prod(shape, dtype=int)).reshape(shape), "<i4", order)
    np.save(tmp_path / "array.npy", array)
    found = map_npy(tmp_path / "array.npy")
    assert found.dtype == array.dtype and found.flags.f_contiguous == array.flags.f_contiguous
    np.testing.assert_array_equal(found, array)


def test_no_whole_array(tmp_path):
    file = tmp_path / "array.npy"
    np.save(file, np.arange(100))
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"takes 800 bytes, and array\.npy has 799"):
        map_npy(file)
    np.save(file, np.array([{}]), allow_pickle=True)
    with pytest.raises(ValueError, match="Python objects"):
        map_npy(file)


def write_corpus(prefix: Path) -> None:
    with IndexedDatasetWriter(prefix, "uint16") as writer:
        for _ in range(4):
            writer.add_document(np.arange(5000) % 100)
        writer.commit()


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def dataset(prefix, cache: IndexCache | None = None) -> GPTDataset:
    corpus = IndexedDataset(prefix)
    return GPTDataset("train", corpus, 0, len(corpus), 16, 64, 1, cache=cache)


def test_a_corpus_keeps_no_descriptor(tmp_path):
    write_corpus(tmp_path / "corpus")
    before = open_descriptors()
    datasets = [dataset(tmp_path / "corpus", IndexCache()) for _ in range(2)]  # built, then read
    assert open_descriptors() == before
    assert len(datasets[0]) == len(datasets[1])


def test_a_file_that_is_cut_short_while_samples_are_read(tmp_path):
    write_corpus(tmp_path / "corpus")
    samples = dataset(tmp_path / "corpus")
    assert samples[0]["text"].size == 65
    os.truncate(tmp_path / "corpus.bin", 0)
    with pytest.raises(UserError, match=r"corpus\.bin cannot be read to the end.*truncated"):
        for number in range(len(samples)):
            samples[number]
    del samples
    write_corpus(tmp_path / "other")
    assert dataset(tmp_path / "other")[0]["text"].size == 65  # the first one is closed


READ_ALL = """
import os, sys
from pypkg.data import IndexedDataset
corpus = IndexedDataset(sys.argv[1])
os.truncate(sys.argv[1] + ".bin", 0)
print(corpus.tokens.sum())
"""


def test_a_file_that_is_cut_short_while_numpy_reads(tmp_path):
    write_corpus(tmp_path / "corpus")
    done = subprocess.run(
        [sys.executable, "-c", READ_ALL, tmp_path / "corpus"], capture_output=True, text=True
    )
    assert done.returncode == 2, done
    assert done.stderr.startswith(f"error: {tmp_path / 'corpus.bin'} cannot be read to the end")
    assert done.stdout == ""


KILLED = """
import os, signal, sys
from pypkg.data.corpus.mapping import map_file
kept = map_file(sys.argv[1])
os.kill(os.getpid(), signal.SIGBUS)
"""


def test_another_cause_of_the_signal_ends_the_process_as_ever(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    done = subprocess.run([sys.executable, "-c", KILLED, tmp_path / "file"], capture_output=True)
    assert done.returncode == -7, done
