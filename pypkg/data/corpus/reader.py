"""Reading a corpus; :mod:`pypkg.data.corpus.files` describes its files."""

from __future__ import annotations

import logging
import os

import numpy as np

from pypkg.data.corpus.checks import errors
from pypkg.data.corpus.files import open_corpus_files

logger = logging.getLogger("pypkg")


class IndexedDataset:
    """The token ids of a corpus, mapped into memory.

    The constructor checks sizes and offsets, so that later reads stay within the files.

    Attributes:
        prefix: path without ``.bin``.
        tokens: [tokens], all tokens in the dtype of the file.
        sizes: int32 [sequences], number of tokens of each sequence.
        pointers: int64 [sequences], byte offset of each sequence in ``tokens``.
        document_indices: int64 [documents + 1], first sequence of each document.
        loss_mask: uint8 [tokens], in the order of ``tokens``: 0 for tokens that do not count for
            the loss. None without an ``.lsm`` file.
        num_tokens: sum of ``sizes``.
        token_file, index_file: paths of the two files, for messages.

    Raises:
        UserError: a file is missing, unreadable, truncated or wrong, or there are no tokens. The
            message names the file, the field with its offset, the value found and the value
            expected.
    """

    def __init__(self, prefix: str | os.PathLike[str]) -> None:
        self.prefix = os.fspath(prefix)
        files = open_corpus_files(self.prefix)
        for error in errors(files):
            raise error
        self.tokens = files.tokens
        self.sizes = files.sizes
        self.pointers = files.pointers
        self.document_indices = files.document_indices
        self.loss_mask = files.loss_mask
        self.token_file = files.token_file
        self.index_file = files.index_file
        self.num_tokens = int(self.sizes.sum(dtype=np.int64))
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
        """The token ids of a sequence, [tokens]: a view in the dtype of the file.

        Raises:
            IndexError: there is no such sequence.
        """
        return self.tokens[self._tokens_of(sequence)]

    def loss_mask_of(self, sequence: int) -> np.ndarray | None:
        """The loss mask of a sequence, uint8 [tokens]; None without an ``.lsm`` file."""
        return None if self.loss_mask is None else self.loss_mask[self._tokens_of(sequence)]

    def document_of(self, sequence: int) -> int:
        """The number of the document that a sequence belongs to."""
        return int(np.searchsorted(self.document_indices, sequence, side="right")) - 1

    def document_sizes(self) -> np.ndarray:
        """The number of tokens of each document, int64 [documents]."""
        ends = np.concatenate([[0], np.cumsum(self.sizes, dtype=np.int64)])
        return np.diff(ends[self.document_indices])

    def _tokens_of(self, sequence: int) -> slice:
        if not 0 <= sequence < len(self):
            raise IndexError(f"sequence {sequence} of {len(self)}")
        first = int(self.pointers[sequence]) // self.tokens.itemsize
        return slice(first, first + int(self.sizes[sequence]))
