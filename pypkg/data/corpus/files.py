"""The files of a corpus: ``.bin/.idx`` of Megatron-LM and PaddleNLP, and PaddleNLP's older ones.

``<prefix>.bin`` holds the token ids of all documents back to back. ``<prefix>.idx`` is
little-endian without padding:

====================  ==================  ======================================================
offset                type                content
====================  ==================  ======================================================
0                     9 bytes             magic ``MMIDIDX\\0\\0``
9                     uint64              version, 1
17                    uint8               code of the token dtype, see ``DTYPES``
18                    uint64              n, number of sequences
26                    uint64              m, number of documents + 1
34                    int32 [n]           tokens of each sequence
34 + 4 n              int64 [n]           byte at which each sequence begins in the .bin
34 + 12 n             int64 [m]           sequence with which each document begins; the last is n
34 + 12 n + 8 m       int8 [n], optional  modes, written by Megatron-LM for images; not used here
====================  ==================  ======================================================

With ``data_impl`` lazy and cached the ``.bin`` is the same and the ``.idx`` has the form of
fairseq. d is 4 bytes in files of PaddleNLP and 8 bytes in files of Megatron-LM:

=========================  ==================  =================================================
offset                     type                content
=========================  ==================  =================================================
0                          8 bytes             magic ``TNTIDX\\0\\0``
8                          uint64              version, 1
16                         uint64              code of the token dtype, see ``DTYPES``
24                         uint64              bytes of a token
32                         uint64, uint64      n, number of sequences, twice
48                         uint64              m, number of documents + 1
56                         int64 [n + 1]       dimensions before each sequence, 0 to n
64 + 8 n                   int64 [n + 1]       tokens before each sequence
72 + 16 n                  int of d bytes [n]  tokens of each sequence
72 + (16 + d) n            int64 [m]           sequence with which each document begins
=========================  ==================  =================================================

Two older forms are NumPy files. In the first, ``<prefix>_ids.npy`` is one array of token ids, and
``<prefix>_idx.npz`` holds ``lens``, the tokens of each sequence, and ``docs``, the first sequence
of each document. In the oldest form, ``<prefix>_ids.npz`` holds ``ids`` and ``lens``, and each
sequence is a document.

A corpus of any form may have a ``<prefix>.lsm`` with one byte for each token, in the same order:
0 for tokens that do not count for the loss.
"""

from __future__ import annotations

import os
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pypkg.data.corpus.mapping import map_file, map_npy, read_npy_header
from pypkg.errors import UserError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
_LAZY_MAGIC = b"TNTIDX\x00\x00"
_LAZY_HEADER = struct.Struct("<8sQQQQQQ")
DTYPES: dict[int, np.dtype[Any]] = {
    1: np.dtype(np.uint8),
    2: np.dtype(np.int8),
    3: np.dtype(np.int16),
    4: np.dtype(np.int32),
    5: np.dtype(np.int64),
    6: np.dtype(np.float64),
    7: np.dtype(np.float32),
    8: np.dtype(np.uint16),
    9: np.dtype(np.uint32),
    10: np.dtype(np.uint64),
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
MAX_SEQUENCE_TOKENS = np.iinfo(np.int32).max
INDEX_SUFFIXES = (".idx", "_idx.npz", "_ids.npz")  # one of these makes files a corpus
TOKEN_SUFFIXES = (".bin", "_ids.npy")
_SUFFIXES = (*INDEX_SUFFIXES, *TOKEN_SUFFIXES, ".lsm")


@dataclass
class CorpusFiles:
    """The contents of the files, before they are checked against each other.

    Attributes:
        tokens: [tokens], all tokens in the dtype of the file.
        sizes: int32 [sequences], number of tokens of each sequence.
        pointers: int64 [sequences], byte offset of each sequence in ``tokens``.
        document_indices: int64 [documents + 1], first sequence of each document.
        token_file, index_file: paths, for messages.
        sizes_at, documents_at: byte offsets of these arrays in the index file; None for NumPy
            files.
        token_remainder: number of bytes after the last whole token of the token file.
        loss_mask: uint8 [tokens], or None without an .lsm file.
    """

    tokens: np.ndarray
    sizes: np.ndarray
    pointers: np.ndarray
    document_indices: np.ndarray
    token_file: Path
    index_file: Path
    sizes_at: int | None = None
    documents_at: int | None = None
    token_remainder: int = 0
    loss_mask: np.ndarray | None = None


def open_corpus_files(prefix: str) -> CorpusFiles:
    """Maps the files into memory. As in PaddleNLP, NumPy files take precedence over ``.bin/.idx``.

    Args:
        prefix: path without the suffixes of the files.

    Raises:
        UserError: a file is missing, unreadable, truncated or of another format. The message names
            the file, the field with its offset, the value found and the value expected.
    """
    ids, index, both = (Path(prefix + end) for end in ("_ids.npy", "_idx.npz", "_ids.npz"))
    if ids.exists() and index.exists():
        files = _open_npy(ids, index)
    elif both.exists() and not Path(prefix + ".idx").exists():
        files = _open_npz(both)
    else:
        files = _open_bin(Path(prefix + ".bin"), Path(prefix + ".idx"))
    mask_file = Path(prefix + ".lsm")
    if mask_file.exists():
        files.loss_mask = map_bytes(mask_file)
        if files.loss_mask.size != files.tokens.size:
            raise wrong(
                mask_file,
                "size",
                None,
                f"{files.loss_mask.size} bytes",
                f"{files.tokens.size}, one for each token of {files.token_file}",
            )
    return files


def prefix_of(path: str) -> str:
    """The prefix of a corpus, given the prefix or the path of one of its files."""
    for suffix in _SUFFIXES:
        if path.endswith(suffix):
            return path[: -len(suffix)]
    return path


def output_prefix_of(path: str) -> str:
    """:func:`prefix_of` of a corpus that is to be written.

    Raises:
        UserError: the prefix is a folder, so that the names of the files would begin with a dot.
    """
    prefix = prefix_of(path)
    if os.path.basename(prefix) in ("", ".", ".."):
        raise UserError(
            f"--output_prefix is '{path}', a folder; expected the path of the files without .bin "
            f"and .idx, such as {os.path.join(prefix, 'corpus')}"
        )
    return prefix


def _open_bin(token_file: Path, index_file: Path) -> CorpusFiles:
    index = map_bytes(index_file)
    if index[: len(_LAZY_MAGIC)].tobytes() == _LAZY_MAGIC:
        return _open_lazy(token_file, index_file, index)
    if index.size < HEADER.size:
        raise wrong(index_file, "header", 0, f"{index.size} bytes", f"{HEADER.size}; truncated?")
    magic, version, code, num_sequences, num_boundaries = HEADER.unpack(
        index[: HEADER.size].tobytes()
    )
    if magic != MAGIC:
        raise wrong(index_file, "magic", 0, magic, f"{MAGIC!r}; not an .idx file?")
    if version != VERSION:
        raise wrong(index_file, "version", 9, version, VERSION)
    if code not in DTYPES:
        raise wrong(index_file, "dtype code", 17, code, f"1 to {max(DTYPES)}")
    pointers_at = HEADER.size + 4 * num_sequences
    documents_at = pointers_at + 8 * num_sequences
    end = documents_at + 8 * num_boundaries
    if index.size not in (end, end + num_sequences):
        raise wrong(
            index_file,
            "number of sequences and documents",
            18,
            f"{num_sequences} and {num_boundaries - 1} in a file of {index.size} bytes",
            f"{end} bytes for these; truncated?",
        )
    tokens, remainder = _map_tokens(token_file, DTYPES[code])
    return CorpusFiles(
        tokens=tokens,
        sizes=index[HEADER.size : pointers_at].view("<i4"),
        pointers=index[pointers_at:documents_at].view("<i8"),
        document_indices=index[documents_at:end].view("<i8"),
        token_file=token_file,
        index_file=index_file,
        sizes_at=HEADER.size,
        documents_at=documents_at,
        token_remainder=remainder,
    )


def _open_lazy(token_file: Path, index_file: Path, index: np.ndarray) -> CorpusFiles:
    if index.size < _LAZY_HEADER.size:
        found = f"{index.size} bytes"
        raise wrong(index_file, "header", 0, found, f"{_LAZY_HEADER.size}; truncated?")
    _, version, code, itemsize, num_sequences, num_sizes, num_boundaries = _LAZY_HEADER.unpack(
        index[: _LAZY_HEADER.size].tobytes()
    )
    if version != 1:
        raise wrong(index_file, "version", 8, version, 1)
    if code not in DTYPES:
        raise wrong(index_file, "dtype code", 16, code, f"1 to {max(DTYPES)}")
    if itemsize != DTYPES[code].itemsize:
        expected = f"{DTYPES[code].itemsize}, those of {DTYPES[code]}"
        raise wrong(index_file, "bytes of a token", 24, itemsize, expected)
    if num_sizes != num_sequences:
        expected = f"{num_sequences}, as many as there are sequences"
        raise wrong(index_file, "number of sizes", 40, num_sizes, expected)
    offsets_at = _LAZY_HEADER.size + 8 * (num_sequences + 1)
    sizes_at = offsets_at + 8 * (num_sequences + 1)
    ends = {
        width: sizes_at + width * num_sequences + 8 * num_boundaries for width in (4, 8)
    }  # of the file, by the bytes of a size
    width = next((width for width, end in ends.items() if end == index.size), None)
    if width is None:
        raise wrong(
            index_file,
            "number of sequences and documents",
            32,
            f"{num_sequences} and {num_boundaries - 1} in a file of {index.size} bytes",
            f"{ends[4]} or {ends[8]} bytes for these; truncated?",
        )
    documents_at = index.size - 8 * num_boundaries
    sizes = index[sizes_at:documents_at].view(f"<i{width}")
    _check_sizes(sizes, index_file, "sizes of the sequences", sizes_at)
    tokens, remainder = _map_tokens(token_file, DTYPES[code])
    return CorpusFiles(
        tokens=tokens,
        sizes=sizes.astype(np.int32),
        pointers=index[offsets_at:sizes_at].view("<i8")[:-1] * itemsize,
        document_indices=index[documents_at:].view("<i8"),
        token_file=token_file,
        index_file=index_file,
        documents_at=documents_at,
        token_remainder=remainder,
    )


def _map_tokens(file: Path, dtype: np.dtype) -> tuple[np.ndarray, int]:
    """The whole tokens of a .bin file, and the number of bytes after them."""
    contents = map_bytes(file)
    remainder = contents.size % dtype.itemsize
    return contents[: contents.size - remainder].view(dtype), remainder


def _check_sizes(sizes: np.ndarray, file: Path, field: str, offset: int | None = None) -> None:
    if sizes.size and not 0 <= sizes.min() <= sizes.max() <= MAX_SEQUENCE_TOKENS:
        found = f"{sizes.min()} to {sizes.max()}"
        raise wrong(file, field, offset, found, "0 to 2^31-1")


def _open_npy(token_file: Path, index_file: Path) -> CorpusFiles:
    arrays = _read_npz(index_file, ("lens", "docs"))
    try:
        tokens = map_npy(token_file)
    except OSError as error:
        raise _cannot_read(token_file, error) from error
    except Exception as error:  # a corrupt file can make NumPy raise almost anything
        raise UserError(f"{token_file} is not a whole NumPy file: {error}") from error
    return _from_arrays(tokens, arrays["lens"], arrays["docs"], token_file, index_file)


def _open_npz(file: Path) -> CorpusFiles:
    arrays = _read_npz(file, ("ids", "lens"))
    documents = np.arange(arrays["lens"].size + 1)
    return _from_arrays(arrays["ids"], arrays["lens"], documents, file, file)


def _from_arrays(
    tokens: np.ndarray, lens: np.ndarray, docs: np.ndarray, token_file: Path, index_file: Path
) -> CorpusFiles:
    for name, array in (("lens", lens), ("docs", docs)):
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise wrong(
                index_file,
                f"array '{name}'",
                None,
                f"{array.dtype} of shape {array.shape}, which is not a list of integers",
                "a list of integers",
            )
    _check_sizes(lens, index_file, "lens")
    if tokens.ndim != 1 or tokens.dtype not in CODES:
        found = f"{tokens.dtype} of shape {tokens.shape}"
        raise wrong(token_file, "array", None, found, "one dimension of integers")
    ends = np.cumsum(lens, dtype=np.int64)
    return CorpusFiles(
        tokens=tokens,
        sizes=lens.astype(np.int32),
        pointers=(ends - lens.astype(np.int64)) * tokens.itemsize,
        document_indices=docs.astype(np.int64),
        token_file=token_file,
        index_file=index_file,
    )


def _read_npz(path: Path, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    try:
        with zipfile.ZipFile(path) as archive:
            found = sorted(name.removesuffix(".npy") for name in archive.namelist())
            arrays = {name: _read_member(archive, name) for name in names if name in found}
    except OSError as error:
        raise _cannot_read(path, error) from error
    except Exception as error:  # a corrupt file can make NumPy and zipfile raise almost anything
        raise UserError(f"{path} is not a whole NumPy file: {error}") from error
    for name in names:
        if name not in arrays:
            raise UserError(
                f"{path}: array '{name}' is missing; found {found}, expected {' and '.join(names)}"
            )
    return arrays


def _read_member(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """An array of an .npz. The allocation is at most the size that the archive lists for it."""
    info = archive.getinfo(name + ".npy")
    with archive.open(info) as data:
        shape, fortran_order, dtype = read_npy_header(data)
        num_bytes = dtype.itemsize * int(np.prod(shape, dtype=object))
        if fortran_order or num_bytes != info.file_size - data.tell():
            raise ValueError(
                f"the header of array '{name}' says {dtype} of shape {shape}, but "
                f"{info.file_size - data.tell()} bytes follow"
            )
        contents = data.read()
        if len(contents) != num_bytes:
            raise ValueError(f"array '{name}' ends after {len(contents)} of {num_bytes} bytes")
    return np.frombuffer(contents, dtype).reshape(shape)


def map_bytes(path: Path) -> np.ndarray:
    """The bytes of a file, uint8 [bytes], mapped into memory.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        return map_file(path)
    except OSError as error:
        raise _cannot_read(path, error) from error


def wrong(file: Path, field: str, offset: int | None, found: object, expected: object) -> UserError:
    """The error for a wrong field of a file.

    Args:
        offset: byte offset of the field; None: not known.
    """
    where = field if offset is None else f"{field} at byte {offset}"
    text = f"{file}: {where}: found {found}, expected {expected}"
    end = "" if text.endswith("?") else "."
    return UserError(f"{text}{end} Make the file again, or copy it anew")


def _cannot_read(path: Path, error: OSError) -> UserError:
    return UserError(
        f"cannot read {path}: {error.strerror or error}. Data is given by its prefix, the path "
        "without .bin and .idx (or without _ids.npy and _idx.npz)"
    )
