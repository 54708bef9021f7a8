"""Checks that all ranks read the same corpora. Each machine may have its own copy."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import paddle.distributed as dist

from pypkg.data import IndexedDataset
from pypkg.data.corpus.manifest import MANIFEST_SUFFIX, written_digest
from pypkg.errors import UserError
from pypkg.files.checksums import Checksum
from pypkg.parallel import mesh
from pypkg.parallel.launch import watchdog
from pypkg.parallel.launch.rendezvous import named

_BLOCKS = 16  # blocks of tokens that are compared, including the first and the last
_BLOCK_BYTES = 4096


class _Fingerprint(NamedTuple):
    tokens: int
    sequences: int
    digest: str

    def __str__(self) -> str:
        return f"{self.tokens:,} tokens in {self.sequences:,} sequences, digest {self.digest[:8]}"


class _Corpus(NamedTuple):
    name: str
    fingerprint: _Fingerprint
    written: str  # checksum of all tokens in the manifest; empty without one


def check_same_data(corpora: Sequence[IndexedDataset] | None) -> None:
    """Compares the corpora of the ranks: all sizes of sequences, and some of the tokens.

    Checksums of all tokens are compared as well, among the ranks whose copy has a manifest.

    Every rank must call this.

    Args:
        corpora: in the order of the blend; None on a rank that reads none.

    Raises:
        UserError: on every rank, if two ranks have different corpora.
    """
    if mesh.current().world_size == 1:
        return
    own = None
    if corpora is not None:
        own = [
            _Corpus(os.path.basename(each.prefix), _fingerprint(each), written_digest(each.prefix))
            for each in corpora
        ]
    watchdog.wait_for_all()  # one machine may have read and built for longer
    found: list[list[_Corpus] | None] = []
    dist.all_gather_object(found, own)
    readers = {rank: lists for rank, lists in enumerate(found) if lists is not None}
    if problem := _difference(readers):
        raise UserError(
            f"the ranks read different data: {problem}. Give every machine the same files in "
            "input_dir."
        )


def _difference(readers: dict[int, list[_Corpus]]) -> str:
    """The first corpus that differs, with the ranks that have each version; empty if none."""
    counts: dict[int, list[int]] = {}
    for rank, corpora in readers.items():
        counts.setdefault(len(corpora), []).append(rank)
    if len(counts) > 1:
        return ", ".join(f"{count} corpora on {named(ranks)}" for count, ranks in counts.items())
    for number in range(min(counts, default=0)):
        read: dict[_Fingerprint, list[int]] = {}
        written: dict[str, list[int]] = {}
        for rank, corpora in readers.items():
            read.setdefault(corpora[number].fingerprint, []).append(rank)
            if checksum := corpora[number].written:
                written.setdefault(checksum, []).append(rank)
        name = readers[min(readers)][number].name
        if len(read) > 1:
            listed = "; ".join(f"{form} on {named(ranks)}" for form, ranks in read.items())
            return f"corpus {name} has {listed}"
        if len(written) > 1:
            listed = "; ".join(f"{form[:8]} on {named(ranks)}" for form, ranks in written.items())
            return f"{name}{MANIFEST_SUFFIX} gives the tokens the checksum {listed}"
    return ""


def _fingerprint(corpus: IndexedDataset) -> _Fingerprint:
    checksum = Checksum()
    checksum.update(corpus.sizes.data)
    for array in (corpus.tokens, corpus.loss_mask):
        if array is None:
            continue
        per_block = min(_BLOCK_BYTES // array.itemsize, array.size)
        for start in np.linspace(0, array.size - per_block, _BLOCKS, dtype=np.int64).tolist():
            checksum.update(array[start : start + per_block].data)
    return _Fingerprint(corpus.num_tokens, len(corpus), checksum.record().digest)
