"""Consistency checks of the files of a corpus."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from pypkg.data.corpus.files import CorpusFiles, wrong
from pypkg.errors import UserError

_CHECKED_AT_A_TIME = 1 << 20  # sequences; bounds the memory of the checks


def errors(files: CorpusFiles) -> Iterator[UserError]:
    """Errors that make the corpus unusable or reads exceed a file; the first error of each kind."""
    yield from _wrong_sizes(files)
    yield from _outside_of_tokens(files)
    yield from _wrong_documents(files)
    if not np.any(files.sizes):
        yield UserError(
            f"{files.index_file} lists {len(files.sizes)} sequences without any token; the corpus "
            "is empty. Was the text that it was made from empty?"
        )


def _wrong_sizes(files: CorpusFiles) -> Iterator[UserError]:
    """Sizes and pointers that are invalid for every token file."""
    itemsize = files.tokens.itemsize
    for sequence, size, pointer in _sequences_that(
        files, lambda sizes, at: (sizes < 0) | (at < 0) | (at % itemsize != 0)
    ):
        at = None if files.sizes_at is None else files.sizes_at + 4 * sequence
        yield wrong(
            files.index_file,
            f"size and pointer of sequence {sequence}",
            at,
            f"{size} tokens from byte {pointer}",
            f"no negative size, and a multiple of {itemsize} bytes",
        )
        return


def _outside_of_tokens(files: CorpusFiles) -> Iterator[UserError]:
    itemsize, available = files.tokens.itemsize, files.tokens.nbytes
    for sequence, size, pointer in _sequences_that(
        files,
        lambda sizes, at: (
            (sizes >= 0) & (at >= 0) & ((at > available) | (sizes * itemsize > available - at))
        ),
    ):
        yield UserError(
            f"{files.token_file} is shorter than {files.index_file} says: sequence {sequence} "
            f"has {size} tokens of {itemsize} bytes from byte {pointer}, but the file has "
            f"tokens up to byte {available}. Truncated, or the two files do not belong together"
        )
        return


def _sequences_that(
    files: CorpusFiles, are_bad: Callable[[np.ndarray, np.ndarray], np.ndarray]
) -> Iterator[tuple[int, int, int]]:
    """(number, size, pointer) of the sequences for which ``are_bad(sizes, pointers)`` is true."""
    for first in range(0, len(files.sizes), _CHECKED_AT_A_TIME):
        sizes = files.sizes[first : first + _CHECKED_AT_A_TIME].astype(np.int64)
        pointers = files.pointers[first : first + _CHECKED_AT_A_TIME]
        for bad in np.flatnonzero(are_bad(sizes, pointers)).tolist():
            yield first + bad, int(sizes[bad]), int(pointers[bad])


def _wrong_documents(files: CorpusFiles) -> Iterator[UserError]:
    starts, num_sequences = files.document_indices, len(files.sizes)
    expected = f"sequence numbers that rise from 0 to {num_sequences}"
    if len(starts) == 0 or starts[0] != 0 or starts[-1] != num_sequences:
        found = "none" if len(starts) == 0 else f"{starts[0]} to {starts[-1]}"
        yield wrong(files.index_file, "documents", files.documents_at, found, expected)
    falls = starts[1:] < starts[:-1]
    if falls.any():
        document = int(np.argmax(falls))
        at = None if files.documents_at is None else files.documents_at + 8 * document
        found = f"{starts[document]}, then {starts[document + 1]}"
        yield wrong(files.index_file, f"document {document}", at, found, expected)
