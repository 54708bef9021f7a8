"""Reading .bin/.idx and _ids.npy/_idx.npz, good and bad."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from corpora import GOLDEN
from damaged_corpora import changes, damage, read_everything
from hypothesis import given, settings
from hypothesis import strategies as st

from pypkg.data import IndexedDataset
from pypkg.errors import UserError

DTYPES = {
    1: "u1", 2: "i1", 3: "i2", 4: "i4", 5: "i8", 6: "f8", 7: "f4", 8: "u2", 9: "u4", 10: "u8",
}  # fmt: skip
SEQUENCES = ([1, 2, 3], [4, 5], [], [6])


def index_bytes(
    magic=b"MMIDIDX\0\0", version=1, code=8, sizes=(3, 2, 0, 1), pointers=(0, 6, 10, 10),
    documents=(0, 1, 3, 4), num_sequences=None, num_boundaries=None, modes=b"",
) -> bytes:  # fmt: skip
    """An .idx written out field by field, for two-byte tokens."""
    count = len(sizes) if num_sequences is None else num_sequences
    boundaries = len(documents) if num_boundaries is None else num_boundaries
    return (
        magic
        + struct.pack("<QBQQ", version, code, count, boundaries)
        + struct.pack(f"<{len(sizes)}i", *sizes)
        + struct.pack(f"<{len(pointers)}q", *pointers)
        + struct.pack(f"<{len(documents)}q", *documents)
        + modes
    )


def write_pair(folder: Path, index: bytes, tokens: bytes = bytes(range(12))) -> str:
    (folder / "c.idx").write_bytes(index)
    (folder / "c.bin").write_bytes(tokens)
    return str(folder / "c")


@pytest.mark.parametrize("name", ["docs_u16", "docs_i32", "old"])
def test_golden_files(name):
    corpus = IndexedDataset(GOLDEN / name)
    expected = np.load(GOLDEN / f"{name}.expected.npz")
    assert corpus.sizes.tolist() == expected["sequence_lengths"].tolist()
    assert corpus.document_indices.tolist() == expected["document_indices"].tolist()
    tokens = np.concatenate([corpus[i] for i in range(len(corpus))])
    assert tokens.tolist() == expected["tokens"].tolist()
    assert corpus.num_tokens == len(expected["tokens"])


@pytest.mark.parametrize(("code", "dtype"), DTYPES.items())
def test_every_dtype_code(tmp_path, code, dtype):
    itemsize = np.dtype(dtype).itemsize
    index = index_bytes(code=code, pointers=[itemsize * k for k in (0, 3, 5, 5)])
    prefix = write_pair(tmp_path, index, np.arange(1, 7, dtype="<" + dtype).tobytes())
    corpus = IndexedDataset(prefix)
    assert corpus[0].dtype == np.dtype(dtype)
    assert [corpus[i].tolist() for i in range(4)] == [list(s) for s in SEQUENCES]
    assert [corpus.document_of(i) for i in range(4)] == [0, 1, 1, 2]


def test_trailing_modes_are_tolerated(tmp_path):
    corpus = IndexedDataset(write_pair(tmp_path, index_bytes(modes=bytes(4))))
    assert corpus.num_tokens == 6


def test_more_tokens_than_listed(tmp_path, logged):
    corpus = IndexedDataset(write_pair(tmp_path, index_bytes(), bytes(17)))
    assert corpus.num_tokens == 6
    said = logged()
    assert "c.bin holds 8 tokens" in said and "lists 6 of them" in said


def test_sequence_out_of_range(tmp_path):
    corpus = IndexedDataset(write_pair(tmp_path, index_bytes()))
    for sequence in (-1, 4):
        with pytest.raises(IndexError):
            corpus[sequence]


@pytest.mark.parametrize(
    ("index", "said"),
    [
        (b"", ["header at byte 0", "0 bytes", "34"]),
        (index_bytes()[:33], ["header at byte 0", "33 bytes", "34"]),
        (index_bytes(magic=b"OTHERIDX\0"), ["magic at byte 0", "OTHERIDX", "MMIDIDX"]),
        (index_bytes(version=2), ["version at byte 9", "found 2", "expected 1"]),
        (index_bytes(code=0), ["dtype code at byte 17", "found 0", "1 to 10"]),
        (index_bytes(code=11), ["dtype code at byte 17", "found 11"]),
        (index_bytes()[:-1], ["at byte 18", "113 bytes", "114 bytes"]),
        (index_bytes()[:60], ["at byte 18", "60 bytes", "114 bytes"]),
        (index_bytes(modes=bytes(3)), ["at byte 18", "117 bytes", "114 bytes"]),
        (index_bytes(num_sequences=2**63), ["at byte 18", str(2**63)]),
        (index_bytes(num_boundaries=2**64 - 1), ["at byte 18", str(2**64 - 2)]),
        (index_bytes(sizes=(3, -2, 0, 1)), ["sequence 1 at byte 38", "-2 tokens", "negative"]),
        (index_bytes(pointers=(0, -6, 10, 10)), ["sequence 1", "from byte -6"]),
        (index_bytes(pointers=(0, 5, 10, 10)), ["sequence 1", "byte 5", "multiple of 2"]),
        (index_bytes(sizes=(3, 2, 0, 2)), ["c.bin is shorter", "sequence 3", "byte 12"]),
        (index_bytes(pointers=(0, 6, 10, 2**62)), ["c.bin is shorter", "sequence 3"]),
        (index_bytes(documents=(0, 1, 3, 5)), ["documents at byte 82", "0 to 5", "to 4"]),
        (index_bytes(documents=(1, 1, 3, 4)), ["documents at byte 82", "1 to 4"]),
        (index_bytes(documents=(0, 3, 1, 4)), ["document 1 at byte 90", "3, then 1"]),
        (index_bytes(documents=()), ["documents at byte 82", "found none"]),
        (index_bytes(sizes=(), pointers=(), documents=(0,)), ["0 sequences", "empty"]),
        (index_bytes(sizes=(0, 0), pointers=(0, 0), documents=(0, 2)), ["2 sequences", "empty"]),
    ],
)
def test_wrong_index(tmp_path, index, said):
    prefix = write_pair(tmp_path, index, bytes(12))
    with pytest.raises(UserError) as error:
        IndexedDataset(prefix)
    for part in ["c.idx", *said]:
        assert part in str(error.value)


def test_truncated_anywhere(tmp_path):
    whole = index_bytes()
    for length in range(len(whole)):
        with pytest.raises(UserError, match=r"c\.idx"):
            IndexedDataset(write_pair(tmp_path, whole[:length]))


@pytest.mark.parametrize("missing", ["c.idx", "c.bin"])
def test_missing_file(tmp_path, missing):
    prefix = write_pair(tmp_path, index_bytes())
    (tmp_path / missing).unlink()
    with pytest.raises(UserError, match=f"cannot read .*{missing}: No such file"):
        IndexedDataset(prefix)


def test_unreadable_file(tmp_path):
    prefix = write_pair(tmp_path, index_bytes())
    (tmp_path / "c.bin").unlink()
    (tmp_path / "c.bin").mkdir()
    with pytest.raises(UserError, match=r"cannot read .*c\.bin"):
        IndexedDataset(prefix)


def write_npy(folder: Path, ids: np.ndarray, **arrays: np.ndarray) -> str:
    np.save(folder / "c_ids.npy", ids)
    np.savez(folder / "c_idx.npz", **arrays)
    return str(folder / "c")


def test_npy_form(tmp_path):
    prefix = write_npy(
        tmp_path,
        np.arange(1, 7, dtype=np.int32),
        lens=np.array([3, 2, 0, 1]),
        docs=np.array([0, 4]),
    )
    corpus = IndexedDataset(prefix)
    assert [corpus[i].tolist() for i in range(4)] == [list(s) for s in SEQUENCES]


@pytest.mark.parametrize(
    ("ids", "arrays", "said"),
    [
        ([1, 2], {"lens": [2]}, "'docs' is missing"),
        ([1, 2], {"docs": [0, 1]}, "'lens' is missing"),
        ([1, 2], {"lens": [2.0], "docs": [0, 1]}, "not a list of integers"),
        ([1, 2], {"lens": [[2]], "docs": [0, 1]}, "not a list of integers"),
        ([1, 2], {"lens": [-2], "docs": [0, 1]}, "lens: found -2"),
        ([1, 2], {"lens": [2**31], "docs": [0, 1]}, "lens: found 2147483648"),
        ([1, 2], {"lens": [3], "docs": [0, 1]}, "shorter than"),
        ([1, 2], {"lens": [2], "docs": [0, 2]}, "documents: found 0 to 2"),
        ([[1, 2]], {"lens": [2], "docs": [0, 1]}, "shape (1, 2)"),
        (["a"], {"lens": [1], "docs": [0, 1]}, "<U1"),
    ],
)
def test_wrong_npy_form(tmp_path, ids, arrays, said):
    prefix = write_npy(tmp_path, np.array(ids), **{k: np.array(v) for k, v in arrays.items()})
    with pytest.raises(UserError) as error:
        IndexedDataset(prefix)
    assert said in str(error.value)
    assert "c_id" in str(error.value)


@settings(max_examples=400, deadline=None)
@given(flips=changes, cut=st.integers(0, 120), tail=st.binary(max_size=9))
def test_fuzzed_index(tmp_path_factory, flips, cut, tail):
    folder = tmp_path_factory.mktemp("fuzz")
    prefix = write_pair(folder, index_bytes())
    damage(Path(f"{prefix}.idx"), flips, cut, tail)
    read_everything(prefix)


@settings(max_examples=200, deadline=None)
@given(index_flips=changes, ids_flips=changes, cut=st.integers(0, 600), tail=st.binary(max_size=9))
def test_fuzzed_npy_form(tmp_path_factory, index_flips, ids_flips, cut, tail):
    folder = tmp_path_factory.mktemp("fuzz")
    prefix = write_npy(
        folder, np.arange(6, dtype=np.uint16), lens=np.array([4, 2]), docs=np.array([0, 2])
    )
    for name, flips in (("c_idx.npz", index_flips), ("c_ids.npy", ids_flips)):
        damage(folder / name, flips, cut, tail)
    read_everything(prefix)
