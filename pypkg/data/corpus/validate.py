"""All problems of a finished corpus, including those that do not make it unusable."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pypkg.data.corpus.checks import errors
from pypkg.data.corpus.files import CorpusFiles, open_corpus_files
from pypkg.data.corpus.manifest import changed_files
from pypkg.errors import UserError

_TOKENS_AT_A_TIME = 1 << 24


def validate(prefix: str, vocab_size: int | None = None) -> list[str]:
    """Descriptions of the problems of a corpus, one for each kind of problem.

    Args:
        vocab_size: exclusive upper bound of the token ids; None: not checked.

    Returns:
        Messages; each describes the first problem of its kind. Empty for a corpus in order.
    """
    try:
        files = open_corpus_files(prefix)
    except UserError as error:
        return [str(error), *(changed_files(prefix) or ())]
    problems = [str(error) for error in errors(files)]
    problems += _layout_problems(files)
    problems += _token_problems(files, vocab_size)
    problems += _mask_problems(files, prefix)
    problems += _summary_problems(files, Path(prefix + ".meta.json"))
    problems += changed_files(prefix) or ()
    return problems


def _layout_problems(files: CorpusFiles) -> Iterator[str]:
    """Gaps and overlaps between sequences, and bytes that belong to no sequence."""
    if files.token_remainder:
        yield (
            f"{files.token_file}: {files.token_remainder} bytes at the end, from byte "
            f"{files.tokens.nbytes} on, make no whole token of {files.tokens.itemsize} bytes"
        )
    total = int(files.sizes.sum(dtype=np.int64))
    if files.tokens.size > total:
        yield (
            f"{files.token_file} holds {files.tokens.size} tokens, {files.index_file} lists "
            f"{total} of them"
        )
    ends = np.cumsum(files.sizes, dtype=np.int64)
    expected = (ends - files.sizes) * files.tokens.itemsize
    moved = np.flatnonzero(files.pointers != expected)
    if moved.size:
        sequence = int(moved[0])
        at = (
            ""
            if files.sizes_at is None
            else f" (at byte {files.sizes_at + 4 * len(ends) + 8 * sequence})"
        )
        yield (
            f"{files.index_file}: {moved.size} sequences do not begin where the one before ends; "
            f"the first is sequence {sequence}{at}: it begins at byte {files.pointers[sequence]} "
            f"of the tokens, expected {expected[sequence]}"
        )
    starts = files.document_indices
    without = np.flatnonzero(starts[1:] == starts[:-1])
    if without.size:
        yield (
            f"{files.index_file}: {without.size} documents have no sequence; the first is document "
            f"{without[0]}"
        )
    empty = np.flatnonzero(files.sizes == 0)
    if empty.size:
        yield (
            f"{files.index_file}: {empty.size} sequences are empty; the first is "
            f"sequence {empty[0]}"
        )


def _token_problems(files: CorpusFiles, vocab_size: int | None) -> Iterator[str]:
    most = np.inf if vocab_size is None else vocab_size - 1
    count, first = 0, 0
    for begin in range(0, files.tokens.size, _TOKENS_AT_A_TIME):
        tokens = files.tokens[begin : begin + _TOKENS_AT_A_TIME]
        bad = ~((tokens >= 0) & (tokens <= most))
        if tokens.dtype.kind == "f":
            bad |= tokens != np.floor(tokens)
        if bad.any():
            first = first if count else begin + int(np.argmax(bad))
            count += int(bad.sum())
    if count:
        byte = first * files.tokens.itemsize
        limit = "whole numbers from 0" + ("" if vocab_size is None else f" to {vocab_size - 1}")
        yield (
            f"{files.token_file}: {count} token ids are not {limit}; the first, at byte {byte}, "
            f"{_place(files, byte)}, is {files.tokens[first]}"
        )


def _place(files: CorpusFiles, byte: int) -> str:
    ends = files.pointers + files.sizes.astype(np.int64) * files.tokens.itemsize
    holds = (files.pointers <= byte) & (byte < ends)
    return f"in sequence {int(np.argmax(holds))}" if holds.any() else "in no sequence"


def _mask_problems(files: CorpusFiles, prefix: str) -> Iterator[str]:
    if files.loss_mask is not None:
        bad = np.flatnonzero(files.loss_mask > 1)
        if bad.size:
            yield (
                f"{prefix}.lsm: {bad.size} bytes are neither 0 nor 1; the first, at byte "
                f"{bad[0]}, is {files.loss_mask[bad[0]]}"
            )


def _summary_problems(files: CorpusFiles, meta_file: Path) -> Iterator[str]:
    """Differences between the files and the summary that preprocessing wrote."""
    if not meta_file.exists():
        return
    try:
        summary = json.loads(meta_file.read_text())
        said = {name: summary[name] for name in ("documents", "tokens", "dtype")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        yield f"{meta_file} is not a summary of preprocessing: {error!r}"
        return
    found = {
        "documents": max(len(files.document_indices) - 1, 0),
        "tokens": int(files.sizes.sum(dtype=np.int64)),
        "dtype": files.tokens.dtype.name,
    }
    for name, value in said.items():
        if value != found[name]:
            yield f"{meta_file} tells of {name}: {value}; {files.index_file} has {found[name]}"
