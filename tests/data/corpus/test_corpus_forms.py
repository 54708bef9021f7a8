"""The rarer files of a corpus: _ids.npz, .lsm, Megatron's modes; hostile ones among them."""

from __future__ import annotations

import io
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
from corpora import GOLDEN
from damaged_corpora import changes, damage, read_everything
from hypothesis import given, settings
from hypothesis import strategies as st

from pypkg import preprocess
from pypkg.data import IndexedDataset, build_train_valid_test_datasets, resolve_input_dir
from pypkg.data.corpus.validate import validate
from pypkg.errors import UserError


def test_modes_of_megatron():
    """Written by megatron-core 0.16.1's builder with multimodal=True."""
    corpus = IndexedDataset(GOLDEN / "modes")
    assert [corpus[i].tolist() for i in range(len(corpus))] == [
        [1, 2, 3], [4, 5], [6], [], [7, 8, 9, 10],
    ]  # fmt: skip
    assert corpus.document_indices.tolist() == [0, 2, 3, 5]


LAZY = [[5, 6, 7], [8, 9], [10], [11, 12, 13, 14], [15, 16]]


def lazy_index(
    width: str = "q", version=1, code=8, itemsize=2, count=5, sizes=(3, 2, 1, 4, 2),
    offsets=(0, 3, 5, 6, 10, 12), documents=(0, 2, 3, 5), num_sizes=5,
) -> bytes:  # fmt: skip
    """The .idx of ``LAZY`` of data_impl lazy; width "i" as in PaddleNLP, "q" Megatron-LM."""
    return (
        b"TNTIDX\0\0"
        + struct.pack("<6Q", version, code, itemsize, count, num_sizes, len(documents))
        + struct.pack("<6q", *range(6))
        + struct.pack(f"<{len(offsets)}q", *offsets)
        + struct.pack(f"<{len(sizes)}{width}", *sizes)
        + struct.pack(f"<{len(documents)}q", *documents)
    )


def write_lazy(folder: Path, index: bytes) -> str:
    (folder / "c.idx").write_bytes(index)
    (folder / "c.bin").write_bytes(np.arange(5, 17, dtype=np.uint16).tobytes())
    return str(folder / "c")


def test_lazy_form_of_paddlenlp():
    """Written by IndexedDatasetBuilder of PaddleNLP 3.0.0b4 (paddlenlp/data/indexed_dataset.py)."""
    corpus = IndexedDataset(GOLDEN / "lazy")
    assert corpus.tokens.dtype == np.uint16
    assert [corpus[i].tolist() for i in range(len(corpus))] == LAZY
    assert corpus.document_indices.tolist() == [0, 2, 3, 5]
    assert (GOLDEN / "lazy.idx").read_bytes() == lazy_index("i")


def test_lazy_form_of_megatron(tmp_path):
    """Its sizes have 8 bytes each."""
    corpus = IndexedDataset(write_lazy(tmp_path, lazy_index("q")))
    assert [corpus[i].tolist() for i in range(len(corpus))] == LAZY
    assert corpus.document_indices.tolist() == [0, 2, 3, 5]
    assert corpus.sizes.dtype == np.int32


def test_samples_of_the_lazy_form(tmp_path):
    """They are those of the same documents in the usual form, which ``merge`` makes of it."""
    assert preprocess.main(["merge", str(GOLDEN / "lazy"), "--output_prefix", f"{tmp_path}/m"]) == 0
    assert validate(f"{tmp_path}/m") == validate(str(GOLDEN / "lazy")) == []
    lazy, usual = (
        build_train_valid_test_datasets(
            [str(prefix)], "1", 3, (9, 0, 0), 1, data_cache=str(tmp_path)
        )[0]
        for prefix in (GOLDEN / "lazy", tmp_path / "m")
    )
    assert len(lazy) == len(usual) >= 9
    assert [lazy[i]["text"].tolist() for i in range(9)] == [
        usual[i]["text"].tolist() for i in range(9)
    ]


@pytest.mark.parametrize(
    ("index", "said"),
    [
        (lazy_index()[:40], ["header at byte 0", "40 bytes", "56"]),
        (lazy_index(version=2), ["version at byte 8", "found 2"]),
        (lazy_index(code=11), ["dtype code at byte 16", "found 11"]),
        (lazy_index(itemsize=4), ["bytes of a token at byte 24", "found 4", "2, those of uint16"]),
        (lazy_index(num_sizes=6), ["number of sizes at byte 40", "found 6", "5"]),
        (lazy_index()[:-3], ["at byte 32", "5 and 3 in a file of 221 bytes", "204 or 224 bytes"]),
        (lazy_index(count=2**63, num_sizes=2**63), ["at byte 32", str(2**63)]),
        (lazy_index(sizes=(3, 2, -1, 4, 2)), ["sizes of the sequences at byte 152", "-1 to 4"]),
        (lazy_index(sizes=(3, 2, 2**31, 4, 2)), ["sizes of the sequences", str(2**31)]),
        (lazy_index(offsets=(0, 3, 5, 6, 11, 13)), ["is shorter than", "sequence 4"]),
        (lazy_index(documents=(0, 3, 2, 5)), ["document 1 at byte 200", "3, then 2"]),
    ],
)
def test_bad_lazy_index(tmp_path, index, said):
    with pytest.raises(UserError) as error:
        IndexedDataset(write_lazy(tmp_path, index))
    for part in [str(tmp_path / "c.idx"), *said]:
        assert part in str(error.value)


def test_tokens_without_an_index_are_named(make_corpus, tmp_path, logged):
    prefix = make_corpus([[1]], "whole")
    (tmp_path / "half.bin").write_bytes(b"12")
    (tmp_path / "old_ids.npy").write_bytes(b"12")
    assert resolve_input_dir(str(tmp_path)) == [prefix]
    said = logged()
    assert f"{tmp_path / 'half.bin'} has no index file beside it and is left out" in said
    assert f"{tmp_path / 'old_ids.npy'} has no index file" in said and "whole" not in said


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


@settings(max_examples=250, deadline=None)
@given(flips=changes, cut=st.integers(0, 700), tail=st.binary(max_size=9), packed=st.booleans())
def test_fuzzed_ids_npz(tmp_path_factory, flips, cut, tail, packed):
    file = tmp_path_factory.mktemp("fuzz") / "c_ids.npz"
    save = np.savez_compressed if packed else np.savez
    save(file, ids=np.arange(6, dtype=np.uint16), lens=np.array([4, 0, 2]))
    damage(file, flips, cut, tail)
    read_everything(str(file).removesuffix("_ids.npz"))


@settings(max_examples=250, deadline=None)
@given(
    flips=changes, index_flips=changes, cut=st.integers(0, 8), tail=st.binary(max_size=9),
    name=st.sampled_from(["c.lsm", "c.bin"]),
)  # fmt: skip
def test_fuzzed_masked_pair(tmp_path_factory, flips, index_flips, cut, tail, name):
    folder = tmp_path_factory.mktemp("fuzz")
    prefix = write_pair(folder, bytes(5))
    damage(folder / name, flips, cut, tail)
    damage(folder / "c.idx", index_flips)
    read_everything(prefix)
