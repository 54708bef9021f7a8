"""Converts text files to ``.bin/.idx``: trains a tokenizer on request, tokenizes, joins shards."""

from __future__ import annotations

import hashlib
import json
import logging
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from pypkg.data.corpus.made_with import ids_digest
from pypkg.data.corpus.writer import IndexedDatasetWriter
from pypkg.data.preprocess.assemble import assemble
from pypkg.data.preprocess.encoder import Progress, Task, make_encoder
from pypkg.data.preprocess.input.documents import Document, LineCounter, Problem
from pypkg.data.preprocess.input.files import (
    TextFile,
    Unit,
    check_unchanged,
    find_text_files,
    plan_units,
)
from pypkg.data.preprocess.input.readers import read_documents
from pypkg.data.preprocess.options import PreparationOptions
from pypkg.data.preprocess.shards import FileShardFolder
from pypkg.data.preprocess.summary import (
    Summary,
    meta_file,
    previous_summary,
    sizes_and_times,
    write_summary,
)
from pypkg.data.preprocess.workers import run_tasks
from pypkg.data.tokenizers.load import Tokenizer, load_tokenizer
from pypkg.data.tokenizers.train_bpe import is_trained, train_tokenizer
from pypkg.errors import UserError

logger = logging.getLogger("pypkg")

_LARGEST_UINT16 = 65535
_NAMED_FILES = 20  # of those that are lost
_KEPT = (
    "What is finished is kept in {}: the same command goes on from there if the files can be read "
    "by then, and begins anew if they have changed or are left out."
)


class _Problems:
    """Logs documents that cannot be used, or raises at the first; collects unreadable files."""

    def __init__(self, on_error: str, shown: int = 10) -> None:
        self._stop = on_error == "stop"
        self._shown = shown
        self._count = 0
        self._lines = LineCounter()
        self._lost: dict[Path, str] = {}

    def __call__(self, problem: Problem) -> None:
        if self._stop:
            way_out = "--exclude" if problem.file_lost else "--on_error skip"
            raise UserError(f"{problem.describe(self._lines)} ({way_out} leaves it out)")
        if problem.file_lost:
            self._lost.setdefault(problem.file, problem.describe(self._lines))
            return
        self._count += 1
        if self._count <= self._shown:
            what = "mended" if problem.mended else "skipped"
            logger.warning("%s %s", what, problem.describe(self._lines))
            if self._count == self._shown:
                logger.warning("more such documents are only counted")

    def raise_lost_files(self, kept: Path | None = None) -> None:
        """
        Args:
            kept: folder of what is finished.

        Raises:
            UserError: a file could not be read, or not to its end.
        """
        if self._lost:
            described = list(self._lost.values())
            more = ["..."] if len(described) > _NAMED_FILES else []
            raise UserError(
                "\n  ".join(
                    [
                        f"{len(described)} of the files cannot be read to the end, so that no "
                        "corpus is written. Mend them, or leave them out with --exclude and their "
                        "names:",
                        *described[:_NAMED_FILES],
                        *more,
                        *([_KEPT.format(kept)] if kept and kept.is_dir() else []),
                    ]
                )
            )


def prepare(options: PreparationOptions) -> Summary:
    """Writes the corpus, unless it exists and was made from the same input and options.

    Units that an interrupted run with the same options has finished are reused.

    Raises:
        UserError: the input, the tokenizer or an option cannot be used, or writing fails. No
            incomplete file has the name of an output.
    """
    start = time.monotonic()
    found = find_text_files(options.input_path, options.file_suffix, options.exclude)
    found.log_left_out()
    files = found.files
    tokenizer = _trained_or_loaded(options, files)
    if options.append_eos and tokenizer.eos_id is None:
        raise UserError(
            f"--append_eos: the files beside {tokenizer.file} name no eos_token; add one to "
            "tokenizer_config.json or leave out --append_eos"
        )
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size - 1 <= _LARGEST_UINT16 else np.int32)
    fingerprint = _fingerprint(
        files,
        **options.token_options(),
        tokenizer=_sha256(tokenizer.sources),
        dtype=dtype.name,
        vocab_size=tokenizer.vocab_size,
        eos_id=options.append_eos and tokenizer.eos_id,
        shuffle_seed=options.shuffle_seed,
        on_error=options.on_error,
    )
    previous = previous_summary(options.output_prefix, fingerprint)
    if previous is not None:
        return previous
    shards = FileShardFolder(options.output_prefix, dtype)
    made = _make(options, tokenizer, files, fingerprint, shards)
    outputs, modified = sizes_and_times(options.output_prefix)
    summary = Summary(
        **made,
        vocab_size=tokenizer.vocab_size,
        dtype=dtype.name,
        tokenizer=str(options.tokenizer_name_or_path),
        ids_digest=ids_digest(tokenizer),
        outputs=outputs,
        modified=modified,
        seconds=round(time.monotonic() - start, 1),
        fingerprint=fingerprint,
    )
    write_summary(options.output_prefix, summary)
    shards.remove()
    return summary


def _make(
    options: PreparationOptions,
    tokenizer: Tokenizer,
    files: Sequence[TextFile],
    fingerprint: str,
    shards: FileShardFolder,
) -> dict[str, Any]:
    """Writes the files; returns the fields of :class:`Summary` that describe their contents."""
    units = plan_units(files, options.doc_spliter)
    # The lock that the writer holds on the outputs also protects the file shards.
    with IndexedDatasetWriter(options.output_prefix, shards.dtype) as writer:
        missing = shards.begin(fingerprint, len(units))
        resumed = (
            f"{len(units) - len(missing)} of {len(units)}" if len(missing) < len(units) else ""
        )
        if resumed:
            logger.info("%s units were finished earlier", resumed)
        try:
            _encode_units(options, tokenizer, units, missing, shards)
        finally:
            shards.remove_if_empty()
        check_unchanged(files)
        counts = assemble(shards, len(units), writer, options.deduplicate)
        if writer.num_documents == 0:
            shards.remove()
            raise UserError(
                f"--input_path {options.input_path} gave no tokens: {len(files)} files, no "
                f"document is left; dropped: {_named_counts(counts.dropped)}"
            )
        meta_file(options.output_prefix).unlink(missing_ok=True)
        sizes = writer.document_sizes()
        writer.commit(_document_order(writer.num_documents, options.shuffle_seed))
    return {
        "documents": writer.num_documents,
        "sequences": writer.num_sequences,
        "tokens": int(sizes.sum()),
        "text_bytes": counts.text_bytes,
        "dropped": dict(sorted(counts.dropped.items())),
        "mended": counts.mended,
        "lengths": _histogram(sizes),
        "resumed": resumed,
    }


def _trained_or_loaded(options: PreparationOptions, files: Sequence[TextFile]) -> Tokenizer:
    folder = options.tokenizer_name_or_path
    if options.train_tokenizer is not None:
        fingerprint = _fingerprint(
            files,
            json_key=options.json_key,
            doc_spliter=options.doc_spliter,
            vocab_size=options.train_tokenizer,
            train_bytes=options.tokenizer_train_bytes,
            on_error=options.on_error,
        )
        if not is_trained(folder, fingerprint):
            start = time.monotonic()
            texts = _training_texts(options, files)
            entries = train_tokenizer(texts, options.train_tokenizer, folder, fingerprint)
            logger.info(
                "trained a tokenizer of %s entries in %.1f s: %s",
                entries,
                time.monotonic() - start,
                folder,
            )
    return load_tokenizer(folder)


def _training_texts(options: PreparationOptions, files: Sequence[TextFile]) -> Iterator[str]:
    """Text for the tokenizer, from documents spread evenly over the input."""
    total_bytes, train_bytes = sum(file.size for file in files), options.tokenizer_train_bytes
    share = min(1.0, train_bytes / max(total_bytes, 1))
    problems = _Problems(options.on_error, shown=0)  # tokenization logs them
    read = taken = 0
    documents: Iterable[Document] = (
        document
        for unit in plan_units(files, options.doc_spliter)
        for span in unit
        for document in read_documents(
            span,
            options.json_key,
            options.doc_spliter,
            problems,
            replace=options.on_error == "replace",
        )
    )
    with _progress_bar("training the tokenizer", min(total_bytes, train_bytes)) as bar:
        for document in documents:
            read += document.file_bytes
            if taken >= train_bytes:
                break
            if taken < share * read:
                num_bytes = len(document.text.encode())
                taken += num_bytes
                bar.update(num_bytes)
                yield document.text
    problems.raise_lost_files()


def _encode_units(
    options: PreparationOptions,
    tokenizer: Tokenizer,
    units: Sequence[Unit],
    missing: Sequence[int],
    shards: FileShardFolder,
) -> None:
    """Tokenizes the missing units."""
    if not missing:
        return
    processes = min(options.workers, len(missing))
    threads = max(1, options.workers // processes)
    # Reading a large tokenizer takes seconds. This process has read it, and the workers share a
    # second copy, which is read once.
    load = (lambda: tokenizer) if processes == 1 else partial(load_tokenizer, tokenizer.file)
    setup = partial(make_encoder, options, shards, threads)
    tasks = [Task(number, units[number]) for number in missing]
    problems = _Problems(options.on_error)
    documents = tokens = 0
    next_log = options.log_interval
    total = sum(span.file_bytes for task in tasks for span in task.unit)
    with (
        _progress_bar("tokenizing", total) as bar,
        closing(run_tasks(load, setup, tasks, processes)) as events,
    ):
        for event in events:
            if isinstance(event, Problem):
                problems(event)
                continue
            assert isinstance(event, Progress)
            documents += event.documents
            tokens += event.tokens
            bar.set_postfix_str(f"{tokens / 1e6:.1f} M tokens", refresh=False)
            bar.update(event.file_bytes)
            if bar.disable and documents >= next_log:
                next_log = documents + options.log_interval
                logger.info("%s documents, %s tokens", f"{documents:,}", f"{tokens:,}")
    problems.raise_lost_files(kept=shards.path)


def _document_order(num_documents: int, shuffle_seed: int | None) -> np.ndarray | None:
    if shuffle_seed is None:
        return None
    return np.random.RandomState(shuffle_seed).permutation(num_documents)


def _histogram(sizes: np.ndarray) -> list[list[int]]:
    powers, counts = np.unique(np.frexp(sizes.astype(np.float64))[1], return_counts=True)
    return [[2 ** (power - 1), count] for power, count in zip(powers.tolist(), counts.tolist())]


def _named_counts(counts: Counter[str]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in counts.items()) or "none"


def _progress_bar(description: str, total_bytes: int) -> tqdm:
    return tqdm(
        total=total_bytes,
        desc=description,
        unit="B",
        unit_scale=True,
        dynamic_ncols=True,
        disable=not sys.stderr.isatty(),
    )


def _sha256(files: Sequence[Path]) -> str:
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _fingerprint(files: Sequence[TextFile], **settings: object) -> str:
    inputs = [(f.name, f.size, f.mtime_ns, f.kind, f.compression) for f in files]
    return hashlib.sha256(json.dumps([inputs, settings], sort_keys=True).encode()).hexdigest()
