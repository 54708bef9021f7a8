"""Damage of a corpus is noticed, whichever file has it."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest

from pypkg import preprocess
from pypkg.config import Settings
from pypkg.data import IndexedDatasetWriter
from pypkg.data.corpus.manifest import changed_files
from pypkg.data.corpus.validate import validate
from pypkg.errors import UserError
from pypkg.files.checksums import file_record, sealed_json
from pypkg.training.start.verify_data import verify_corpora

SUFFIXES = (".bin", ".idx", ".lsm", ".manifest.json")


def write(prefix: Path, seed: int = 0) -> str:
    tokens = np.random.default_rng(seed).integers(0, 1000, 600)
    with IndexedDatasetWriter(prefix, np.uint16, loss_mask=True) as writer:
        writer.add_tokens(tokens, (tokens % 2).astype(np.uint8))
        writer.add_sizes(np.full(6, 100, np.int32), np.ones(6, np.int64))
        writer.commit()
    return str(prefix)


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    return write(tmp_path / "corpus")


def flip(file: Path, random: np.random.Generator) -> None:
    data = bytearray(file.read_bytes())
    data[random.integers(len(data))] ^= 1 << random.integers(8)
    file.write_bytes(data)


def test_the_manifest_has_what_the_disk_holds(corpus):
    files = json.loads(Path(corpus + ".manifest.json").read_text())["files"]
    assert files.keys() == {".bin", ".idx", ".lsm"}
    for suffix, record in files.items():
        assert record == vars(file_record(Path(corpus + suffix)))
    assert changed_files(corpus) == [] and validate(corpus) == []


def test_documents_in_another_order_have_the_checksums_of_that_order(tmp_path):
    with IndexedDatasetWriter(tmp_path / "c", np.uint16) as writer:
        for document in ([1, 2], [3]):
            writer.add_document(np.array(document))
        writer.commit(order=np.array([1, 0]))
    assert changed_files(str(tmp_path / "c")) == []


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_flips_at_random_places_are_noticed(corpus, suffix):
    file, random = Path(corpus + suffix), np.random.default_rng(1)
    before = file.read_bytes()
    for _ in range(20):
        flip(file, random)
        assert any(file.name in problem for problem in changed_files(corpus))
        assert validate(corpus)
        file.write_bytes(before)
    assert changed_files(corpus) == []


def test_truncated_swapped_and_missing_files(corpus, tmp_path):
    other = write(tmp_path / "other", seed=1)
    for suffix in (".bin", ".lsm"):
        shutil.copy(other + suffix, corpus + suffix)
        (problem,) = changed_files(corpus)
        assert f"corpus{suffix} has another checksum" in problem
        Path(corpus + suffix).write_bytes(b"short")
        assert "has 5 bytes, expected" in changed_files(corpus)[0]
        Path(corpus + suffix).unlink()
        assert f"corpus{suffix} is missing" in changed_files(corpus)[0]
        write(Path(corpus))


def test_a_renamed_corpus_keeps_its_manifest(corpus, tmp_path):
    for suffix in SUFFIXES:
        Path(corpus + suffix).rename(tmp_path / f"new{suffix}")
    assert changed_files(str(tmp_path / "new")) == []


def test_a_loss_mask_of_another_corpus(tmp_path, corpus):
    with IndexedDatasetWriter(tmp_path / "plain", np.uint16) as writer:
        writer.add_document(np.arange(600))
        writer.commit()
    shutil.copy(corpus + ".lsm", tmp_path / "plain.lsm")
    (problem,) = changed_files(str(tmp_path / "plain"))
    assert "plain.lsm is no part of the corpus" in problem


def test_a_manifest_of_a_later_version(corpus):
    Path(corpus + ".manifest.json").write_bytes(sealed_json({"format": 2, "checksum": "x"}))
    assert "is of a later version" in changed_files(corpus)[0]


def test_the_corpora_of_a_run(tmp_path, corpus, caplog):
    caplog.set_level(logging.INFO, "pypkg")
    second = write(tmp_path / "second", seed=2)

    def verify(input_dir: str, **changes: object) -> None:
        verify_corpora(Settings(max_steps=1, input_dir=input_dir, **changes))

    for input_dir, options in (
        (corpus, {}), (str(tmp_path), {}), (f"0.3 {corpus} 0.7 {second}", {}),
        (f"{corpus} {second}", {"blend_by": "size"}),
    ):  # fmt: skip
        verify(input_dir, **options)
    assert "no corpus of 2 is damaged" in caplog.text
    for prefix in (corpus, second):
        flip(Path(prefix + ".bin"), np.random.default_rng(0))
    for input_dir, options in (
        (str(tmp_path), {}), (f"0.3 {corpus} 0.7 {second}", {}),
        (f"{corpus} {second}", {"blend_by": "size"}),
    ):  # fmt: skip
        with pytest.raises(UserError, match=r"2 problems with the corpora") as caught:
            verify(input_dir, **options)
        assert f"{corpus}.bin" in str(caught.value) and f"{second}.bin" in str(caught.value)


def test_a_corpus_without_a_manifest(corpus, caplog):
    Path(corpus + ".manifest.json").unlink()
    verify_corpora(Settings(max_steps=1, input_dir=corpus))
    assert f"{corpus} has no .manifest.json, so it cannot be verified" in caplog.text


def test_validate_tells_a_flip_that_makes_another_token(corpus, capsys):
    file = Path(corpus + ".bin")
    data = bytearray(file.read_bytes())
    data[0] ^= 1
    file.write_bytes(data)
    assert preprocess.main(["validate", corpus]) == 1
    assert "corpus.bin has another checksum than when it was written" in capsys.readouterr().out
