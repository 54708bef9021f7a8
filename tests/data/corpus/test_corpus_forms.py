"""The rarer files of a corpus: _ids.npz, .lsm, Megatron's modes; hostile ones among them."""

from __future__ import annotations

import io
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
from corpora import GOLDEN
from hypothesis import given, settings
from hypothesis import strategies as st

from pypkg.data import IndexedDataset, resolve_input_dir
from pypkg.errors import UserError


def test_modes_of_megatron():
    """Written by megatron-core 0.16.1's builder with multimodal=True."""
    corpus = IndexedDataset(GOLDEN / "modes")
    assert [corpus[i].tolist() for i in range(len(corpus))] == [
        [1, 2, 3], [4, 5], [6], [], [7, 8, 9, 10],
    ]  # fmt: skip
    assert corpus.document_indices.tolist() == [0, 2, 3, 5]


def write_npz(path: Path, **arrays: np.ndarray) -> None:
    np.savez(path, **arrays)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_ids_npz(tmp_path, dtype):
    write_npz(tmp_path / "c_ids.npz", ids=np.arange(1, 7, dtype=dtype), lens=np.array([3, 0, 2, 1]))
    corpus = IndexedDataset(tmp_path / "c")
    assert [corpus[i].tolist() for i in range(4)] == [[1, 2, 3], [], [4, 5], [6]]
    assert corpus.document_indices.tolist() == [0, 1, 2, 3, 4]
    assert corpus.tokens.dtype == dtype
    prefix = str(tmp_path / "c")
    for given_path in (tmp_path, prefix, prefix + "_ids.npz"):
        assert resolve_input_dir(str(given_path)) == [prefix]


@pytest.mark.parametrize(
    ("forms", "first_token"),
    [
        (("npz",), 1), (("npz", "bin"), 2), (("npz", "npy"), 3), (("npz", "bin", "npy"), 3),
        (("bin", "ids.npy alone"), 2), (("bin", "idx.npz alone"), 2),
    ],
    ids=str,
)  # fmt: skip
def test_which_form_wins(make_corpus, tmp_path, forms, first_token):
    """_ids.npy with _idx.npz, then .bin with .idx, then _ids.npz."""
    if "npz" in forms:
        write_npz(tmp_path / "c_ids.npz", ids=np.array([1]), lens=np.array([1]))
    if "bin" in forms:
        make_corpus([[2]], "c")
    if {"npy", "ids.npy alone"} & set(forms):
        np.save(tmp_path / "c_ids.npy", np.array([3]))
    if {"npy", "idx.npz alone"} & set(forms):
        write_npz(tmp_path / "c_idx.npz", lens=np.array([1]), docs=np.array([0, 1]))
    assert IndexedDataset(tmp_path / "c")[0].tolist() == [first_token]


@pytest.mark.parametrize("compress", [np.savez, np.savez_compressed])
@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"ids": [1, 2]}, "array 'lens' is missing; found ['ids'], expected ids and lens"),
        ({"lens": [1, 2]}, "array 'ids' is missing"),
        ({"ids": [1, 2], "lens": [3]}, "shorter than"),
        ({"ids": [1, 2], "lens": [-1, 3]}, "lens: found -1 to 3"),
        ({"ids": [[1, 2]], "lens": [2]}, "shape (1, 2)"),
        ({"ids": ["a", "b"], "lens": [2]}, "<U1"),
        ({"ids": [1, 2], "lens": [2**31]}, "lens: found 2147483648"),
        ({"ids": [1, 2], "lens": [None]}, "object"),
    ],
)
def test_wrong_ids_npz(tmp_path, compress, arrays, said):
    arrays = {name: np.array(values) for name, values in arrays.items()}
    compress(tmp_path / "c_ids.npz", **arrays)
    with pytest.raises(UserError) as error:
        IndexedDataset(tmp_path / "c")
    assert "c_ids.npz" in str(error.value) and said in str(error.value)


def hostile_npz(path: Path, header: str, contents: bytes = b"") -> None:
    """An .npz whose array 'lens' has any header."""
    text = header.encode()
    member = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + contents
    ids = io.BytesIO()
    np.save(ids, np.arange(4, dtype=np.uint16))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("ids.npy", ids.getvalue())
        archive.writestr("lens.npy", member)


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '<i8', 'fortran_order': False, 'shape': (1099511627776,)}",
        "{'descr': '<i8', 'fortran_order': False, 'shape': (9223372036854775807, 3)}",
        "{'descr': '<i8', 'fortran_order': False, 'shape': (-1,)}",
        "{'descr': '|O', 'fortran_order': False, 'shape': (1,)}",
        "{'descr': '<i8', 'fortran_order': False, 'shape': 3}",
        "{'descr': '<i8'}",
        "__import__('os').system('true')",
        "{" * 2000,
        "",
    ],
    ids=range(9),
)
def test_hostile_headers(tmp_path, header):
    hostile_npz(tmp_path / "c_ids.npz", header, bytes(24))
    with pytest.raises(UserError, match=r"c_ids\.npz"):
        IndexedDataset(tmp_path / "c")


def write_pair(folder: Path, mask: bytes | None) -> str:
    index = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, 3, 4)
    index += struct.pack("<3i3q4q", 2, 0, 3, 0, 4, 4, 0, 1, 2, 3)
    (folder / "c.idx").write_bytes(index)
    (folder / "c.bin").write_bytes(bytes(range(10)))
    if mask is not None:
        (folder / "c.lsm").write_bytes(mask)
    return str(folder / "c")


def test_loss_mask(tmp_path):
    corpus = IndexedDataset(write_pair(tmp_path, bytes([1, 0, 1, 1, 0])))
    assert [corpus.loss_mask_of(i).tolist() for i in range(3)] == [[1, 0], [], [1, 1, 0]]
    (tmp_path / "c.lsm").unlink()
    corpus = IndexedDataset(tmp_path / "c")
    assert corpus.loss_mask is None and corpus.loss_mask_of(0) is None


@pytest.mark.parametrize("size", [0, 4, 6, 10])
def test_loss_mask_of_another_size(tmp_path, size):
    with pytest.raises(UserError) as error:
        IndexedDataset(write_pair(tmp_path, bytes(size)))
    for part in ("c.lsm", f"{size} bytes", "5, one for each token", "c.bin"):
        assert part in str(error.value)


def read_everything(prefix: str) -> None:
    """Opens and reads a corpus, which either agrees with itself or raises UserError."""
    try:
        corpus = IndexedDataset(prefix)
    except UserError as error:
        assert prefix in str(error)
        return
    for sequence in range(len(corpus)):
        ids, mask = corpus[sequence], corpus.loss_mask_of(sequence)
        assert len(ids) == corpus.sizes[sequence]
        assert mask is None or len(mask) == len(ids)
        float(ids.sum())  # touches every byte
    assert corpus.num_tokens == corpus.document_sizes().sum() > 0


changes = st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=4)


def change(file: Path, flips: list[tuple[int, int]], cut: int, tail: bytes) -> None:
    data = bytearray(file.read_bytes())
    data = data[: len(data) - cut] if cut else data
    for position, value in flips:
        if data:
            data[position % len(data)] = value
    file.write_bytes(bytes(data) + tail)


@settings(max_examples=250, deadline=None)
@given(flips=changes, cut=st.integers(0, 700), tail=st.binary(max_size=9), packed=st.booleans())
def test_fuzzed_ids_npz(tmp_path_factory, flips, cut, tail, packed):
    file = tmp_path_factory.mktemp("fuzz") / "c_ids.npz"
    save = np.savez_compressed if packed else np.savez
    save(file, ids=np.arange(6, dtype=np.uint16), lens=np.array([4, 0, 2]))
    change(file, flips, cut, tail)
    read_everything(str(file).removesuffix("_ids.npz"))


@settings(max_examples=250, deadline=None)
@given(
    flips=changes, index_flips=changes, cut=st.integers(0, 8), tail=st.binary(max_size=9),
    name=st.sampled_from(["c.lsm", "c.bin"]),
)  # fmt: skip
def test_fuzzed_masked_pair(tmp_path_factory, flips, index_flips, cut, tail, name):
    folder = tmp_path_factory.mktemp("fuzz")
    prefix = write_pair(folder, bytes(5))
    change(folder / name, flips, cut, tail)
    change(folder / "c.idx", index_flips, 0, b"")
    read_everything(prefix)
