"""Joins the file shards of a corpus, without repeated documents."""

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
    """Counts of the documents.

    Attributes:
        text_bytes: UTF-8 bytes of the documents in the corpus.
        dropped: number of documents left out, by reason.
        mended: number of documents, also among those left out, in which invalid UTF-8 was replaced.
    """

    text_bytes: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    mended: int = 0


def assemble(
    folder: FileShardFolder, num_shards: int, writer: IndexedDatasetWriter, deduplicate: bool
) -> Counts:
    """Writes the documents of all file shards in order.

    Args:
        deduplicate: write only the first of identical documents.
    """
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
    counts.dropped = +counts.dropped  # removes zeros
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
    """For each document, whether an earlier one is identical, bool [documents]."""
    digests = [shard.digests for shard in _shards(folder, num_shards) if len(shard.sequences)]
    if not digests:
        return np.zeros(0, bool)
    low, high = np.ascontiguousarray(np.concatenate(digests)).view(np.uint64).T
    order = np.lexsort((low, high))  # a stable sort keeps the order of equal documents
    low, high = low[order], high[order]
    repeated = np.zeros(len(order), bool)
    repeated[order[1:]] = (low[1:] == low[:-1]) & (high[1:] == high[:-1])
    return repeated


def _write(shard: FileShard, kept: np.ndarray, writer: IndexedDatasetWriter) -> None:
    """Writes the kept documents; adjacent documents are written together."""
    sequence_ends = np.concatenate([[0], np.cumsum(shard.sequences, dtype=np.int64)])
    token_ends = np.concatenate([[0], np.cumsum(shard.sizes, dtype=np.int64)])
    borders = np.flatnonzero(np.diff(np.concatenate([[False], kept, [False]]).astype(np.int8)))
    for first, end in borders.reshape(-1, 2).tolist():
        begin, stop = sequence_ends[first], sequence_ends[end]
        writer.add_tokens(shard.tokens[token_ends[begin] : token_ends[stop]])
        writer.add_sizes(shard.sizes[begin:stop], shard.sequences[first:end])
