"""Reading token files: ``.bin/.idx`` of Megatron-LM and PaddleNLP, and ``_ids.npy/_idx.npz``.

``<prefix>.bin`` holds the token ids of all documents one after another. ``<prefix>.idx``, all
little-endian and without padding:

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

The older ``<prefix>_ids.npy`` is one array of token ids; ``<prefix>_idx.npz`` holds ``lens``,
tokens of each sequence, and ``docs``, sequence with which each document begins.
"""

from __future__ import annotations

import logging
import os
import struct
from pathlib import Path

import numpy as np

from pypkg.errors import UserError

logger = logging.getLogger("pypkg")

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {
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
MAX_SEQUENCE_TOKENS = np.iinfo(np.int32).max
_CHECKED_AT_A_TIME = 1 << 20  # sequences; bounds the memory that checking takes


class IndexedDataset:
    """The token ids of a corpus, mapped into memory.

    Attributes:
        prefix: path without ``.bin``.
        tokens: [tokens], all of them, in the dtype of the file.
        sizes: int32 [sequences], tokens of each sequence.
        pointers: int64 [sequences], byte at which each sequence begins in ``tokens``.
        document_indices: int64 [documents + 1], sequence with which each document begins.
        num_tokens: sum of ``sizes``.
        token_file, index_file: the two files, for messages.

    Everything is checked when the files are opened, so that later reads stay inside of them.

    Raises:
        UserError: a file is missing, unreadable, truncated or wrong, or there are no tokens. The
            message names the file, the field with its offset, what was found and what was expected.
    """

    def __init__(self, prefix: str | os.PathLike[str]) -> None:
        self.prefix = os.fspath(prefix)
        if Path(self.prefix + "_ids.npy").exists() and Path(self.prefix + "_idx.npz").exists():
            self.token_file = Path(self.prefix + "_ids.npy")
            self.index_file = Path(self.prefix + "_idx.npz")
            self._open_npy()
        else:
            self.token_file = Path(self.prefix + ".bin")
            self.index_file = Path(self.prefix + ".idx")
            self._open_bin()
        self._check_sequences()
        self._check_documents()
        self.num_tokens = int(self.sizes.sum(dtype=np.int64))
        if self.num_tokens == 0:
            raise UserError(
                f"{self.index_file} lists {len(self)} sequences without any token; the corpus is "
                "empty. Was the text that it was made from empty?"
            )

        if self.tokens.size != self.num_tokens:
            logger.warning(
                "%s holds %s tokens, %s lists %s of them; do the two files belong together?",
                self.token_file,
                f"{self.tokens.size:,}",
                self.index_file,
                f"{self.num_tokens:,}",
            )

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self.sizes)

    def __getitem__(self, sequence: int) -> np.ndarray:
        """The token ids of a sequence: a view in the dtype of the file."""
        if not 0 <= sequence < len(self):
            raise IndexError(f"sequence {sequence} of {len(self)}")
        first = int(self.pointers[sequence]) // self.tokens.itemsize
        return self.tokens[first : first + int(self.sizes[sequence])]

    def document_of(self, sequence: int) -> int:
        """The document that a sequence belongs to."""
        return int(np.searchsorted(self.document_indices, sequence, side="right")) - 1

    def _open_bin(self) -> None:
        index = _map_bytes(self.index_file)
        if index.size < HEADER.size:
            raise _wrong(
                self.index_file, "header", 0, f"{index.size} bytes", f"{HEADER.size}; truncated?"
            )
        magic, version, code, num_sequences, num_boundaries = HEADER.unpack(
            index[: HEADER.size].tobytes()
        )
        if magic != MAGIC:
            raise _wrong(self.index_file, "magic", 0, magic, f"{MAGIC!r}; not an .idx file?")
        if version != VERSION:
            raise _wrong(self.index_file, "version", 9, version, VERSION)
        if code not in DTYPES:
            raise _wrong(self.index_file, "dtype code", 17, code, f"1 to {max(DTYPES)}")
        pointers_at = HEADER.size + 4 * num_sequences
        documents_at = pointers_at + 8 * num_sequences
        end = documents_at + 8 * num_boundaries
        if index.size not in (end, end + num_sequences):
            raise _wrong(
                self.index_file,
                "number of sequences and documents",
                18,
                f"{num_sequences} and {num_boundaries - 1} in a file of {index.size} bytes",
                f"{end} bytes for these; truncated?",
            )
        self.sizes = index[HEADER.size : pointers_at].view("<i4")
        self.pointers = index[pointers_at:documents_at].view("<i8")
        self.document_indices = index[documents_at:end].view("<i8")
        self._sizes_at, self._documents_at = HEADER.size, documents_at
        tokens = _map_bytes(self.token_file)
        dtype = DTYPES[code]
        self.tokens = tokens[: tokens.size // dtype.itemsize * dtype.itemsize].view(dtype)

    def _open_npy(self) -> None:
        arrays = _load_numpy(self.index_file)
        for name in ("lens", "docs"):
            if (
                not isinstance(arrays.get(name), np.ndarray)
                or arrays[name].ndim != 1
                or (arrays[name].dtype.kind not in "iu")
            ):
                raise UserError(
                    f"{self.index_file}: array '{name}' is missing or not a list of integers; "
                    f"found {sorted(arrays)}, expected 'lens' and 'docs'"
                )
        lens = arrays["lens"]
        if lens.size and not 0 <= lens.min() <= lens.max() <= MAX_SEQUENCE_TOKENS:
            raise _wrong(
                self.index_file, "lens", None, f"{lens.min()} to {lens.max()}", "0 to 2^31-1"
            )
        self.tokens = _load_numpy(self.token_file)
        if self.tokens.ndim != 1 or self.tokens.dtype not in DTYPES.values():
            raise _wrong(
                self.token_file,
                "array",
                None,
                f"{self.tokens.dtype} of shape {self.tokens.shape}",
                "one dimension of integers",
            )
        self.sizes = lens.astype(np.int32)
        ends = np.cumsum(lens, dtype=np.int64)
        self.pointers = (ends - lens) * self.tokens.itemsize
        self.document_indices = arrays["docs"].astype(np.int64)
        self._sizes_at = self._documents_at = None

    def _check_sequences(self) -> None:
        """Every sequence lies inside of the token file, and begins at a whole token."""
        itemsize, available = self.tokens.itemsize, self.tokens.nbytes
        for first in range(0, len(self), _CHECKED_AT_A_TIME):
            sizes = self.sizes[first : first + _CHECKED_AT_A_TIME].astype(np.int64)
            pointers = self.pointers[first : first + _CHECKED_AT_A_TIME]
            good = (sizes >= 0) & (pointers >= 0) & (pointers % itemsize == 0)
            good &= (pointers <= available) & (sizes * itemsize <= available - pointers)
            if good.all():
                continue
            bad = int(np.argmin(good))
            sequence, size, pointer = first + bad, int(sizes[bad]), int(pointers[bad])
            at = None if self._sizes_at is None else self._sizes_at + 4 * sequence
            if size < 0 or pointer < 0 or pointer % itemsize:
                raise _wrong(
                    self.index_file,
                    f"size and pointer of sequence {sequence}",
                    at,
                    f"{size} tokens from byte {pointer}",
                    f"no negative size, and a multiple of {itemsize} bytes",
                )
            raise UserError(
                f"{self.token_file} is shorter than {self.index_file} says: sequence {sequence} "
                f"has {size} tokens of {itemsize} bytes from byte {pointer}, but the file has "
                f"tokens up to byte {available}. Truncated, or the two files do not belong together"
            )

    def _check_documents(self) -> None:
        starts = self.document_indices
        expected = f"sequence numbers that rise from 0 to {len(self)}"
        if len(starts) == 0 or starts[0] != 0 or starts[-1] != len(self):
            found = "none" if len(starts) == 0 else f"{starts[0]} to {starts[-1]}"
            raise _wrong(self.index_file, "documents", self._documents_at, found, expected)
        falls = starts[1:] < starts[:-1]
        if falls.any():
            document = int(np.argmax(falls))
            at = None if self._documents_at is None else self._documents_at + 8 * document
            found = f"{starts[document]}, then {starts[document + 1]}"
            raise _wrong(self.index_file, f"document {document}", at, found, expected)


def _wrong(
    file: Path, field: str, offset: int | None, found: object, expected: object
) -> UserError:
    where = field if offset is None else f"{field} at byte {offset}"
    return UserError(
        f"{file}: {where}: found {found}, expected {expected}. Make the file again, or copy it anew"
    )


def _map_bytes(path: Path) -> np.ndarray:
    """uint8 [bytes] of a file."""
    try:
        if path.stat().st_size == 0:  # cannot be mapped
            return np.empty(0, np.uint8)
        return np.asarray(np.memmap(path, np.uint8, mode="r"))
    except OSError as error:
        raise _cannot_read(path, error) from error


def _load_numpy(path: Path) -> np.ndarray | dict[str, np.ndarray]:
    try:
        loaded = np.load(path, mmap_mode="r", allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return np.asarray(loaded)
        with loaded:
            return {name: loaded[name] for name in loaded.files}
    except OSError as error:
        raise _cannot_read(path, error) from error
    except Exception as error:  # a corrupt file can make NumPy and zipfile raise almost anything
        raise UserError(f"{path} is not a whole NumPy file: {error}") from error


def _cannot_read(path: Path, error: OSError) -> UserError:
    return UserError(
        f"cannot read {path}: {error.strerror or error}. Data is given by its prefix, the path "
        "without .bin and .idx (or without _ids.npy and _idx.npz)"
    )
