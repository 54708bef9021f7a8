"""Joins the parts of a corpus, without the documents that an earlier one repeats."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from pypkg.data.corpus.writer import IndexedDatasetWriter
from pypkg.data.preprocess.filters import DUPLICATE
from pypkg.data.preprocess.shards import Part, PartsFolder
from pypkg.errors import UserError


@dataclass
class Counts:
    """What became of the documents.

    Attributes:
        text_bytes: of the documents in the corpus, in UTF-8.
        dropped: documents left out, by reason.
    """

    text_bytes: int = 0
    dropped: Counter[str] = field(default_factory=Counter)


def assemble(
    folder: PartsFolder, num_parts: int, writer: IndexedDatasetWriter, deduplicate: bool
) -> Counts:
    """Writes the documents of all parts, in order; of identical ones the first."""
    counts = Counts()
    repeated = _repeated(folder, num_parts) if deduplicate else None
    first = 0
    for part in _parts(folder, num_parts):
        end = first + len(part.sequences)
        kept = np.ones(end - first, bool) if repeated is None else ~repeated[first:end]
        first = end
        counts.text_bytes += int(part.text_bytes[kept].sum())
        counts.dropped.update(part.dropped)
        counts.dropped.update({DUPLICATE: int((~kept).sum())})
        _write(part, kept, writer)
    counts.dropped = +counts.dropped  # without zeros
    return counts


def _parts(folder: PartsFolder, num_parts: int) -> Iterator[Part]:
    for number in range(num_parts):
        part = folder.load(number)
        if part is None:
            raise UserError(
                f"{folder.path} lost part {number} while the corpus was made; run the command again"
            )
        yield part


def _repeated(folder: PartsFolder, num_parts: int) -> np.ndarray:
    """bool [documents]: whether an earlier document is identical."""
    digests = [part.digests for part in _parts(folder, num_parts) if len(part.sequences)]
    if not digests:
        return np.zeros(0, bool)
    low, high = np.ascontiguousarray(np.concatenate(digests)).view(np.uint64).T
    order = np.lexsort((low, high))  # stable: of equal ones the first stays first
    low, high = low[order], high[order]
    repeated = np.zeros(len(order), bool)
    repeated[order[1:]] = (low[1:] == low[:-1]) & (high[1:] == high[:-1])
    return repeated


def _write(part: Part, kept: np.ndarray, writer: IndexedDatasetWriter) -> None:
    """Writes the kept documents, those that follow one another at once."""
    sequence_ends = np.concatenate([[0], np.cumsum(part.sequences, dtype=np.int64)])
    token_ends = np.concatenate([[0], np.cumsum(part.sizes, dtype=np.int64)])
    borders = np.flatnonzero(np.diff(np.concatenate([[False], kept, [False]]).astype(np.int8)))
    for first, end in borders.reshape(-1, 2).tolist():
        begin, stop = sequence_ends[first], sequence_ends[end]
        writer.add_tokens(part.tokens[token_ends[begin] : token_ends[stop]])
        writer.add_sizes(part.sizes[begin:stop], part.sequences[first:end])
