"""Joins the file shards of a corpus, without the documents that an earlier one repeats."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from pypkg.data.corpus.writer import IndexedDatasetWriter
from pypkg.data.preprocess.filters import DUPLICATE
from pypkg.data.preprocess.shards import FileShard, FileShardFolder
from pypkg.errors import UserError


@dataclass
class Counts:
    """What became of the documents.

    Attributes:
        text_bytes: of the documents in the corpus, in UTF-8.
        dropped: documents left out, by reason.
        mended: documents in which what is not UTF-8 was replaced, also of those left out.
    """

    text_bytes: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    mended: int = 0


def assemble(
    folder: FileShardFolder, num_shards: int, writer: IndexedDatasetWriter, deduplicate: bool
) -> Counts:
    """Writes the documents of all file shards, in order; of identical ones the first."""
    counts = Counts()
    repeated = _repeated(folder, num_shards) if deduplicate else None
    first = 0
    for shard in _shards(folder, num_shards):
        end = first + len(shard.sequences)
        kept = np.ones(end - first, bool) if repeated is None else ~repeated[first:end]
        first = end
        counts.text_bytes += int(shard.text_bytes[kept].sum())
        counts.dropped.update(shard.dropped)
        counts.mended += shard.mended
        counts.dropped.update({DUPLICATE: int((~kept).sum())})
        _write(shard, kept, writer)
    counts.dropped = +counts.dropped  # without zeros
    return counts


def _shards(folder: FileShardFolder, num_shards: int) -> Iterator[FileShard]:
    for number in range(num_shards):
        shard = folder.load(number)
        if shard is None:
            raise UserError(
                f"{folder.path} lost file shard {number} while the corpus was made; run the "
                "command again"
            )
        yield shard


def _repeated(folder: FileShardFolder, num_shards: int) -> np.ndarray:
    """bool [documents]: whether an earlier document is identical."""
    digests = [shard.digests for shard in _shards(folder, num_shards) if len(shard.sequences)]
    if not digests:
        return np.zeros(0, bool)
    low, high = np.ascontiguousarray(np.concatenate(digests)).view(np.uint64).T
    order = np.lexsort((low, high))  # stable: of equal ones the first stays first
    low, high = low[order], high[order]
    repeated = np.zeros(len(order), bool)
    repeated[order[1:]] = (low[1:] == low[:-1]) & (high[1:] == high[:-1])
    return repeated


def _write(shard: FileShard, kept: np.ndarray, writer: IndexedDatasetWriter) -> None:
    """Writes the kept documents, those that follow one another at once."""
    sequence_ends = np.concatenate([[0], np.cumsum(shard.sequences, dtype=np.int64)])
    token_ends = np.concatenate([[0], np.cumsum(shard.sizes, dtype=np.int64)])
    borders = np.flatnonzero(np.diff(np.concatenate([[False], kept, [False]]).astype(np.int8)))
    for first, end in borders.reshape(-1, 2).tolist():
        begin, stop = sequence_ends[first], sequence_ends[end]
        writer.add_tokens(shard.tokens[token_ends[begin] : token_ends[stop]])
        writer.add_sizes(shard.sizes[begin:stop], shard.sequences[first:end])
