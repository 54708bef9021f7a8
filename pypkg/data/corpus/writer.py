"""Writing ``.bin/.idx``; :mod:`pypkg.data.corpus.files` describes the layout."""

from __future__ import annotations

import os
from array import array
from pathlib import Path

import numpy as np

from pypkg.data.corpus.files import CODES, HEADER, MAGIC, MAX_SEQUENCE_TOKENS, VERSION
from pypkg.data.corpus.manifest import MANIFEST_SUFFIX, corpus_manifest
from pypkg.data.corpus.mapping import map_file
from pypkg.errors import UserError
from pypkg.files import OutputFile
from pypkg.files.checksums import Checksum

_BLOCK_TOKENS = 1 << 22  # tokens written at a time


class _SummedFile(OutputFile):
    """A file with the checksum of the bytes written to it; the disk may hold others."""

    def __init__(self, path: Path, suffix: str = ".tmp") -> None:
        super().__init__(path, suffix)
        self.checksum = Checksum()

    def write(self, data: bytes | memoryview) -> None:
        super().write(data)
        self.checksum.update(data)


class IndexedDatasetWriter:
    """Writes a corpus under ``<prefix>.bin`` and ``<prefix>.idx``, and its manifest.

    The files have these names only after :meth:`commit` has written them to the disk::

        with IndexedDatasetWriter("data/corpus", np.uint16) as writer:
            writer.add_document(token_ids)
            writer.commit()

    Leaving the block without ``commit`` removes what was written.

    Raises:
        UserError: the disk is full or cannot be written.
    """

    def __init__(
        self,
        prefix: str | os.PathLike[str],
        dtype: np.typing.DTypeLike,
        loss_mask: bool = False,
    ) -> None:
        """
        Args:
            prefix: path of the corpus without suffix.
            dtype: dtype of the tokens in the file, a value of ``files.DTYPES``.
            loss_mask: also write ``<prefix>.lsm`` from the masks given to :meth:`add_tokens`.

        Raises:
            ValueError: the format has no code for ``dtype``.
        """
        self.prefix = os.fspath(prefix)
        self.dtype = np.dtype(dtype)
        if self.dtype not in CODES:
            raise ValueError(f"dtype {self.dtype} has no code; use one of {list(CODES)}")
        self._sizes = array("i")
        self._document_indices = array("q", [0])
        self._bin = _SummedFile(Path(self.prefix + ".bin"))
        self._outputs: list[OutputFile] = [self._bin]
        self._mask = None
        if loss_mask:
            self._mask = _SummedFile(Path(self.prefix + ".lsm"))
            self._outputs.append(self._mask)

    def __enter__(self) -> IndexedDatasetWriter:
        return self

    def __exit__(self, *_: object) -> None:
        for output in self._outputs:
            output.discard()

    @property
    def num_documents(self) -> int:
        return len(self._document_indices) - 1

    @property
    def num_sequences(self) -> int:
        return len(self._sizes)

    def add_sequence(self, token_ids: np.ndarray) -> None:
        """Adds a sequence to the current document.

        Args:
            token_ids: int [tokens], within the range of the dtype of the file.

        Raises:
            UserError: the sequence is longer than the format allows.
            ValueError: an id is out of range.
        """
        token_ids = np.asarray(token_ids)
        if token_ids.size > MAX_SEQUENCE_TOKENS:
            raise UserError(
                f"{self.prefix}: document {self.num_documents} has {token_ids.size} tokens; the "
                f"format allows {MAX_SEQUENCE_TOKENS}. Split the document"
            )
        self._check_range(token_ids)
        self._bin.write(np.ascontiguousarray(token_ids, self.dtype).data)
        self._sizes.append(token_ids.size)

    def end_document(self) -> None:
        self._document_indices.append(len(self._sizes))

    def add_document(self, token_ids: np.ndarray) -> None:
        """Adds a document of one sequence."""
        self.add_sequence(token_ids)
        self.end_document()

    def add_tokens(self, tokens: np.ndarray, loss_mask: np.ndarray | None = None) -> None:
        """Adds the tokens of many sequences; :meth:`add_sizes` adds their sizes.

        Args:
            tokens: int [tokens], within the range of the dtype of the file.
            loss_mask: uint8 [tokens]; None: all tokens count for the loss.
        """
        for first in range(0, tokens.size, _BLOCK_TOKENS):
            block = tokens[first : first + _BLOCK_TOKENS]
            self._bin.write(np.ascontiguousarray(block, self.dtype).data)
            if self._mask is not None:
                mask = np.ones(block.size, np.uint8) if loss_mask is None else loss_mask[first:]
                self._mask.write(np.ascontiguousarray(mask[: block.size]).data)

    def add_sizes(self, sizes: np.ndarray, sequences_per_document: np.ndarray) -> None:
        """Adds the sizes of whole documents; :meth:`add_tokens` adds their tokens.

        Args:
            sizes: int32 [sequences], number of tokens of each sequence.
            sequences_per_document: int [documents], number of sequences of each document.
        """
        starts = np.cumsum(sequences_per_document, dtype=np.int64) + len(self._sizes)
        self._sizes.frombytes(sizes.astype(np.int32).tobytes())
        self._document_indices.frombytes(starts.tobytes())

    def document_sizes(self) -> np.ndarray:
        """The number of tokens of each document added so far, int64 [documents]."""
        ends = np.concatenate(
            [[0], np.cumsum(np.frombuffer(self._sizes, np.int32), dtype=np.int64)]
        )
        return np.diff(ends[np.frombuffer(self._document_indices, np.int64)])

    def commit(self, order: np.ndarray | None = None) -> None:
        """Writes everything to the disk and gives the files their final names.

        Args:
            order: int [documents], the numbers of the documents in the order of the files; None:
                the order in which they were added.

        Raises:
            ValueError: ``order`` is given for a corpus with a loss mask.
        """
        self._bin.sync()
        if self._mask is not None:
            self._mask.sync()
        sizes = np.array(self._sizes, np.int32)
        starts = np.array(self._document_indices, np.int64)
        if order is not None:
            if self._mask is not None:
                raise ValueError("a corpus with a loss mask keeps the order of its documents")
            sizes, starts = self._reorder(sizes, starts, order)
        ends = np.cumsum(sizes, dtype=np.int64)
        index = _SummedFile(Path(self.prefix + ".idx"))
        self._outputs.append(index)
        index.write(HEADER.pack(MAGIC, VERSION, CODES[self.dtype], len(sizes), len(starts)))
        for values in (sizes, (ends - sizes) * self.dtype.itemsize, starts):
            index.write(values.data)
        index.sync()
        manifest = self._write_manifest(index)
        # Removes the old index first: a .bin without .idx is not a corpus, so that files of the old
        # and the new corpus never make a pair.
        index.path.unlink(missing_ok=True)
        self._bin.publish()
        if self._mask is None:
            Path(self.prefix + ".lsm").unlink(missing_ok=True)
        else:
            self._mask.publish()
        manifest.publish()
        index.publish()

    def _write_manifest(self, index: _SummedFile) -> OutputFile:
        files = {".bin": self._bin, ".idx": index}
        if self._mask is not None:
            files[".lsm"] = self._mask
        manifest = OutputFile(Path(self.prefix + MANIFEST_SUFFIX))
        self._outputs.append(manifest)
        records = {suffix: file.checksum.record() for suffix, file in files.items()}
        manifest.write(corpus_manifest(records))
        manifest.sync()
        return manifest

    def _check_range(self, token_ids: np.ndarray) -> None:
        if token_ids.size == 0 or token_ids.dtype == self.dtype or self.dtype.kind == "f":
            return
        limits = np.iinfo(self.dtype)
        if token_ids.min() < limits.min or token_ids.max() > limits.max:
            raise ValueError(
                f"token ids {token_ids.min()} to {token_ids.max()} do not fit {self.dtype}"
            )

    def _reorder(
        self, sizes: np.ndarray, starts: np.ndarray, order: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Rewrites the tokens in ``order``; returns the sizes and document starts of the result."""
        ordered = _SummedFile(self._bin.path, ".ordered.tmp")
        self._outputs.append(ordered)
        ends = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]) * self.dtype.itemsize
        bounds = ends[starts].tolist()
        tokens = map_file(self._bin.temporary)
        for document in order.tolist():
            ordered.write(tokens[bounds[document] : bounds[document + 1]].data)
        ordered.sync()
        self._bin.discard()
        self._bin = ordered
        counts = np.diff(starts)
        runs = [np.arange(starts[d], starts[d + 1]) for d in order.tolist()]
        sequences = np.concatenate(runs) if runs else np.arange(0)
        return sizes[sequences], np.concatenate([[0], np.cumsum(counts[order])])
