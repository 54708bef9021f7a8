"""Writing .bin/.idx: exact bytes, and nothing half-written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from corpora import GOLDEN, counting_documents
from disk_log import DiskLog

from pypkg.data import IndexedDataset, IndexedDatasetWriter
from pypkg.data.corpus.files import DTYPES
from pypkg.errors import UserError


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def test_exact_bytes(tmp_path):
    with IndexedDatasetWriter(tmp_path / "c", np.uint16) as writer:
        writer.add_document(np.array([1, 2, 3]))
        writer.add_document(np.array([4, 5]))
        writer.commit()
    assert (tmp_path / "c.bin").read_bytes().hex() == "01000200030004000500"
    assert (tmp_path / "c.idx").read_bytes().hex() == (
        "4d4d49444944580000" "0100000000000000" "08" "0200000000000000" "0300000000000000"
        "03000000" "02000000" "0000000000000000" "0600000000000000"
        "0000000000000000" "0100000000000000" "0200000000000000"
    )  # fmt: skip


@pytest.mark.parametrize("name", ["docs_u16", "docs_i32"])
def test_same_bytes_as_megatron(tmp_path, name):
    corpus = IndexedDataset(GOLDEN / name)
    with IndexedDatasetWriter(tmp_path / "c", corpus.tokens.dtype) as writer:
        for first, end in zip(corpus.document_indices[:-1], corpus.document_indices[1:]):
            for sequence in range(first, end):
                writer.add_sequence(corpus[sequence])
            writer.end_document()
        writer.commit()
    for suffix in (".bin", ".idx"):
        written = (tmp_path / f"c{suffix}").read_bytes()
        assert written == (GOLDEN / f"{name}{suffix}").read_bytes()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_every_dtype_round_trips(make_corpus, dtype):
    highest = 2**24 if dtype.kind == "f" else np.iinfo(dtype).max
    corpus = IndexedDataset(make_corpus([[0, highest], [], [1]], dtype=dtype))
    assert corpus.tokens.dtype == dtype
    assert [corpus[i].tolist() for i in range(3)] == [[0, highest], [], [1]]


def test_order_of_documents(tmp_path):
    documents = counting_documents([3, 0, 5, 1, 2])
    with IndexedDatasetWriter(tmp_path / "c", np.int32) as writer:
        for document in documents:
            writer.add_sequence(document[:1])
            writer.add_sequence(document[1:])
            writer.end_document()
        writer.commit(order=np.array([4, 2, 0, 3, 1]))
    corpus = IndexedDataset(tmp_path / "c")
    assert corpus.document_indices.tolist() == [0, 2, 4, 6, 8, 10]
    read = [np.concatenate([corpus[2 * i], corpus[2 * i + 1]]).tolist() for i in range(5)]
    assert read == [documents[i].tolist() for i in (4, 2, 0, 3, 1)]
    assert names(tmp_path) == ["c.bin", "c.idx", "c.manifest.json"]


@pytest.mark.parametrize("documents", [[], [[], []]])
def test_ordering_nothing(tmp_path, documents):
    with IndexedDatasetWriter(tmp_path / "c", np.uint16) as writer:
        for document in documents:
            writer.add_document(np.array(document, np.uint16))
        writer.commit(order=np.arange(len(documents))[::-1])
    assert (tmp_path / "c.bin").read_bytes() == b""
    assert len((tmp_path / "c.idx").read_bytes()) == 34 + 20 * len(documents) + 8


def test_nothing_is_left_without_commit(tmp_path):
    with pytest.raises(KeyboardInterrupt), IndexedDatasetWriter(tmp_path / "c", "u2") as writer:
        writer.add_document(np.arange(10))
        raise KeyboardInterrupt
    assert names(tmp_path) == []


def test_earlier_corpus_survives_a_failed_run(make_corpus, tmp_path):
    prefix = make_corpus([[1, 2, 3]])
    with pytest.raises(RuntimeError), IndexedDatasetWriter(prefix, "u2") as writer:
        writer.add_document(np.arange(1000))
        raise RuntimeError
    assert IndexedDataset(prefix)[0].tolist() == [1, 2, 3]
    assert names(tmp_path) == ["corpus.bin", "corpus.idx", "corpus.manifest.json"]


def test_leftovers_of_a_killed_run_are_overwritten(tmp_path, make_corpus):
    (tmp_path / "corpus.bin.tmp").write_bytes(bytes(1000))
    assert IndexedDataset(make_corpus([[7]])).num_tokens == 1
    assert names(tmp_path) == ["corpus.bin", "corpus.idx", "corpus.manifest.json"]
    assert (tmp_path / "corpus.bin").stat().st_size == 2


def rewrite(prefix: str, loss_mask: bool, order: np.ndarray | None) -> None:
    with IndexedDatasetWriter(prefix, np.uint16, loss_mask=loss_mask) as writer:
        writer.add_tokens(np.array([7, 8, 9]))
        writer.add_sizes(np.array([1, 2], np.int32), np.array([1, 1]))
        writer.commit(order)


# The index goes first and comes last: without it a .bin is no corpus.
UNMASKED = [
    "unlink corpus.idx",
    "rename corpus.bin.tmp corpus.bin",
    "rename corpus.manifest.json.tmp corpus.manifest.json",
    "rename corpus.idx.tmp corpus.idx",
]
MASKED = [*UNMASKED[:2], "rename corpus.lsm.tmp corpus.lsm", *UNMASKED[2:]]
ORDERED = [
    "unlink corpus.bin.tmp", UNMASKED[0], "rename corpus.bin.ordered.tmp corpus.bin", *UNMASKED[2:],
]  # fmt: skip


@pytest.mark.parametrize(
    ("loss_mask", "order", "expected"),
    [(False, None, UNMASKED), (True, None, MASKED), (False, np.array([1, 0]), ORDERED)],
    ids=["plain", "masked", "ordered"],
)
def test_order_of_sync_and_rename(make_corpus, monkeypatch, loss_mask, order, expected):
    prefix = make_corpus([[1, 2, 3]])
    disk = DiskLog(monkeypatch)
    rewrite(prefix, loss_mask, order)
    assert disk.changes() == expected
    disk.check()
    before = disk.events[: disk.events.index("unlink corpus.idx")]
    renamed = [event.split()[1] for event in expected if event.startswith("rename")]
    assert {f"fsync {name}" for name in renamed} <= set(before)


def test_a_loss_mask_of_the_earlier_corpus_is_removed_before_the_index_comes(
    make_corpus, monkeypatch
):
    prefix = make_corpus([[1]])
    rewrite(prefix, True, None)
    disk = DiskLog(monkeypatch)
    rewrite(prefix, False, None)
    assert disk.changes() == [*UNMASKED[:2], "unlink corpus.lsm", *UNMASKED[2:]]


@pytest.mark.parametrize("event", MASKED)
def test_no_moment_shows_files_of_two_corpora(make_corpus, monkeypatch, event):
    prefix = make_corpus([[1, 2, 3], [4]])
    DiskLog(monkeypatch).crash_before(event)
    with pytest.raises(KeyboardInterrupt):
        rewrite(prefix, True, None)
    if event == MASKED[0]:
        assert IndexedDataset(prefix)[0].tolist() == [1, 2, 3]
    else:
        assert not Path(prefix + ".idx").exists()


def test_ids_that_do_not_fit(tmp_path):
    with IndexedDatasetWriter(tmp_path / "c", np.uint16) as writer:
        for ids in ([65536], [-1]):
            with pytest.raises(ValueError, match="do not fit uint16"):
                writer.add_document(np.array(ids))


def test_document_of_2_to_the_31_tokens(tmp_path):
    document = np.broadcast_to(np.uint16(0), 2**31)  # takes no memory
    with (
        IndexedDatasetWriter(tmp_path / "c", np.uint16) as writer,
        pytest.raises(UserError, match="document 0 has 2147483648 tokens; the format allows"),
    ):
        writer.add_document(document)


def test_two_writers_of_the_same_files(tmp_path):
    with IndexedDatasetWriter(tmp_path / "c", "u2") as writer:
        with pytest.raises(UserError, match="another process is writing"):
            IndexedDatasetWriter(tmp_path / "c", "u2")
        writer.add_document(np.array([1]))
        writer.commit()
    assert IndexedDataset(tmp_path / "c").num_tokens == 1


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*sub/c\.bin: Not a directory"):
        IndexedDatasetWriter(tmp_path / "file" / "sub" / "c", "u2")


# A limit on the size of files stands in for a full disk: writes fail half-way.
DISK_FULL = """
import resource, sys
import numpy as np
from pypkg.data import IndexedDatasetWriter
from pypkg.errors import UserError
limit = int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    with IndexedDatasetWriter(sys.argv[1], np.uint16) as writer:
        for _ in range(int(sys.argv[3])):
            writer.add_document(np.arange(int(sys.argv[4])))
        writer.commit(order=np.arange(writer.num_documents)[::-1] if sys.argv[5] == "1" else None)
except UserError as error:
    print(error)
    sys.exit(2)
"""


@pytest.mark.parametrize(
    ("limit", "documents", "tokens", "ordered", "file"),
    [
        (3_000_000, 100, 50_000, 0, "corpus.bin"),  # while writing
        (50_000, 1, 50_000, 0, "corpus.bin"),  # while the last buffer goes out
        (10_000, 1000, 1, 0, "corpus.idx"),
        (10_000, 1000, 1, 1, "corpus.idx"),
    ],
)
def test_disk_full(tmp_path, make_corpus, limit, documents, tokens, ordered, file):
    prefix = make_corpus([[1, 2, 3]])
    arguments = [prefix, *map(str, (limit, documents, tokens, ordered))]
    run = subprocess.run(
        [sys.executable, "-c", DISK_FULL, *arguments], capture_output=True, text=True
    )
    assert run.returncode == 2, run.stderr
    assert f"cannot write {tmp_path / file}: File too large" in run.stdout
    assert run.stderr == ""
    assert names(tmp_path) == ["corpus.bin", "corpus.idx", "corpus.manifest.json"]
    assert IndexedDataset(prefix)[0].tolist() == [1, 2, 3]
