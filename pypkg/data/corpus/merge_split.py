"""Merging and splitting corpora."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path

import numpy as np

from pypkg.data.corpus.files import CODES
from pypkg.data.corpus.reader import IndexedDataset
from pypkg.data.corpus.writer import IndexedDatasetWriter
from pypkg.errors import UserError

_SPLITS = ("train", "valid", "test")


def merge_corpora(prefixes: Sequence[str], output_prefix: str) -> str:
    """Writes the documents of all corpora, in this order, as one corpus.

    The token dtype is the smallest that holds the dtypes of all corpora. If only some corpora have
    a loss mask, all tokens of the others count for the loss.

    Returns:
        A message with the result.

    Raises:
        UserError: a corpus cannot be read or would be overwritten, or the disk is full.
    """
    corpora = [IndexedDataset(prefix) for prefix in prefixes]
    _check_not_an_input(corpora, output_prefix)
    dtype = _common_dtype(corpora)
    with_mask = any(corpus.loss_mask is not None for corpus in corpora)
    with IndexedDatasetWriter(output_prefix, dtype, loss_mask=with_mask) as writer:
        for corpus in corpora:
            add_documents(writer, corpus, 0, len(corpus.document_indices) - 1)
        writer.commit()
    return (
        f"{output_prefix}: {writer.num_documents:,} documents, "
        f"{sum(corpus.num_tokens for corpus in corpora):,} tokens ({dtype}) "
        f"of {len(corpora)} corpora"
    )


def split_corpus(
    prefix: str, output_prefix: str, valid: float, test: float, seed: int | None
) -> list[str]:
    """Writes ``<output_prefix>_train``, ``_valid`` and ``_test``.

    Each part keeps the order of the documents.

    Args:
        valid, test: number of documents of a part, or a share of all documents if below 1; 0: no
            such part.
        seed: seed of a random choice; None takes the last documents, with the test part at the end.

    Returns:
        One message for each part.

    Raises:
        UserError: both parts are empty, or no document is left for training.
    """
    corpus = IndexedDataset(prefix)
    num_documents = len(corpus.document_indices) - 1
    counts = [round(n * num_documents) if n < 1 else int(n) for n in (valid, test)]
    rest = num_documents - sum(counts)
    if sum(counts) == 0 or rest < 1:
        raise UserError(
            f"--valid {valid:g} and --test {test:g} of the {num_documents} documents in {prefix} "
            f"are {counts[0]} and {counts[1]}; expected at least one, and one left for training"
        )
    order = np.arange(num_documents)
    if seed is not None:
        order = np.random.RandomState(seed).permutation(num_documents)
    part_of = np.zeros(num_documents, np.int8)
    part_of[order[rest:]] = 1
    part_of[order[rest + counts[0] :]] = 2
    used = [part for part in range(len(_SPLITS)) if (part_of == part).any()]
    with ExitStack() as stack:
        writers = {}
        for part in used:
            target = f"{output_prefix}_{_SPLITS[part]}"
            _check_not_an_input([corpus], target)
            writers[part] = stack.enter_context(
                IndexedDatasetWriter(
                    target, corpus.tokens.dtype, loss_mask=corpus.loss_mask is not None
                )
            )
        for part, first, end in _runs(part_of):
            add_documents(writers[part], corpus, first, end)
        for writer in writers.values():
            writer.commit()
    return [
        f"{writer.prefix}: {writer.num_documents:,} documents, "
        f"{int(writer.document_sizes().sum()):,} tokens"
        for writer in writers.values()
    ]


def add_documents(
    writer: IndexedDatasetWriter, corpus: IndexedDataset, first: int, end: int
) -> None:
    """Adds the documents [first, end) of a corpus; their tokens need not be adjacent."""
    starts = corpus.document_indices[first : end + 1].astype(np.int64)
    sizes = corpus.sizes[starts[0] : starts[-1]]
    itemsize = corpus.tokens.itemsize
    places = corpus.pointers[starts[0] : starts[-1]] // itemsize
    # Sequences that are adjacent in the file are copied together.
    follows = places[1:] == places[:-1] + sizes[:-1]
    borders = np.concatenate([[0], np.flatnonzero(~follows) + 1, [len(sizes)]])
    for run, run_end in zip(borders[:-1].tolist(), borders[1:].tolist()):
        if run == run_end:
            continue
        begin = int(places[run])
        stop = int(places[run_end - 1]) + int(sizes[run_end - 1])
        mask = None if corpus.loss_mask is None else corpus.loss_mask[begin:stop]
        writer.add_tokens(corpus.tokens[begin:stop], mask)
    writer.add_sizes(sizes, np.diff(starts))


def _runs(values: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """(value, start, end) of each run of equal values."""
    borders = [0, *(np.flatnonzero(np.diff(values)) + 1).tolist(), len(values)]
    for begin, end in pairwise(borders):
        yield int(values[begin]), begin, end


def _common_dtype(corpora: Sequence[IndexedDataset]) -> np.dtype:
    dtypes = {corpus.tokens.dtype for corpus in corpora}
    if len(dtypes) == 1:
        return dtypes.pop()
    common = np.result_type(*dtypes)
    if common not in CODES or (common.kind == "f" and any(d.kind != "f" for d in dtypes)):
        raise UserError(
            "there is no token type that holds those of all corpora: "
            + ", ".join(f"{corpus.prefix} has {corpus.tokens.dtype}" for corpus in corpora)
        )
    return common


def _check_not_an_input(corpora: Sequence[IndexedDataset], output_prefix: str) -> None:
    output = Path(output_prefix + ".bin")
    for corpus in corpora:
        if output.exists() and os.path.samefile(output, corpus.token_file):
            raise UserError(
                f"--output_prefix {output_prefix} is the corpus {corpus.prefix} itself; choose "
                "another path"
            )
