"""From text files to ``.bin/.idx``: reads, trains a tokenizer if wanted, tokenizes, writes."""

from __future__ import annotations

import hashlib
import json
import logging
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from pypkg.data.bpe_training import is_trained, train_tokenizer
from pypkg.data.indexed_dataset_writer import IndexedDatasetWriter
from pypkg.data.output_file import write_file
from pypkg.data.prefetch import prefetch
from pypkg.data.text_files import Document, TextFile, find_text_files, read_documents
from pypkg.data.tokenize import Tokenizer, load_tokenizer
from pypkg.errors import UserError

logger = logging.getLogger("pypkg")

_BATCH_BYTES = 1 << 20  # of text that is tokenized at a time
_BATCH_DOCUMENTS = 4096


@dataclass(frozen=True)
class PreparationOptions:
    """What ``python -m pypkg.preprocess`` is told; the names are its options."""

    input_path: Path
    output_prefix: str
    tokenizer_name_or_path: Path
    json_key: str = "text"
    file_suffix: Sequence[str] = (".txt",)
    exclude: Sequence[str] = ()
    append_eos: bool = False
    shuffle_seed: int | None = None
    on_error: str = "skip"  # or "stop"
    train_tokenizer: int | None = None  # size of the vocabulary
    tokenizer_train_bytes: int = 0
    log_interval: int = 0  # documents


@dataclass(frozen=True)
class Summary:
    """What was written, as in ``<prefix>.meta.json``.

    Attributes:
        documents, tokens, text_bytes: that are in the corpus; the bytes are those of UTF-8.
        skipped, empty: documents left out, as unusable or without a token.
        outputs: size of each file by name.
        fingerprint: of everything that the outputs depend on.
        reused: they were there before, made in the same way.
    """

    documents: int
    skipped: int
    empty: int
    tokens: int
    text_bytes: int
    vocab_size: int
    dtype: str
    tokenizer: str
    outputs: dict[str, int]
    seconds: float
    fingerprint: str
    reused: bool = field(default=False, compare=False)


@dataclass
class _Counts:
    tokens: int = 0
    text_bytes: int = 0
    empty: int = 0


class _Problems:
    """Counts documents that cannot be used, or stops at the first."""

    def __init__(self, on_error: str, shown: int = 10) -> None:
        self._stop = on_error == "stop"
        self._shown = shown
        self.count = 0

    def __call__(self, description: str) -> None:
        if self._stop:
            raise UserError(f"{description} (--on_error skip leaves such documents out)")
        self.count += 1
        if self.count <= self._shown:
            logger.warning("skipped %s", description)
            if self.count == self._shown:
                logger.warning("more skipped documents are only counted")


def prepare(options: PreparationOptions) -> Summary:
    """Writes the corpus, unless it is there already and was made in the same way.

    Raises:
        UserError: the input, the tokenizer or an option cannot be used, or writing fails. Nothing
            half-written is left.
    """
    start = time.monotonic()
    files = find_text_files(options.input_path, options.file_suffix, options.exclude)
    tokenizer = _trained_or_loaded(options, files)
    if options.append_eos and tokenizer.eos_id is None:
        raise UserError(
            f"--append_eos: the files beside {tokenizer.file} name no eos_token; add one to "
            "tokenizer_config.json or leave out --append_eos"
        )
    fingerprint = _fingerprint(
        files,
        json_key=options.json_key,
        append_eos=options.append_eos and tokenizer.eos_id,
        shuffle_seed=options.shuffle_seed,
        on_error=options.on_error,
        tokenizer=hashlib.sha256(tokenizer.file.read_bytes()).hexdigest(),
        vocab_size=tokenizer.vocab_size,
    )
    previous = _previous_summary(options.output_prefix, fingerprint)
    if previous is not None:
        return previous
    problems = _Problems(options.on_error)
    documents = read_documents(files, options.json_key, problems)
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.int32)
    meta_file = Path(options.output_prefix + ".meta.json")
    with (
        _progress_bar("tokenizing", _known_size(files)) as bar,
        IndexedDatasetWriter(options.output_prefix, dtype) as writer,
    ):
        counts = _tokenize(documents, tokenizer, writer, bar, options)
        if writer.num_documents == 0:
            raise UserError(
                f"--input_path {options.input_path} gave no tokens: {len(files)} files, "
                f"{problems.count} skipped and {counts.empty} empty documents"
            )
        meta_file.unlink(missing_ok=True)
        writer.commit(_document_order(writer.num_documents, options.shuffle_seed))
    summary = Summary(
        documents=writer.num_documents,
        skipped=problems.count,
        empty=counts.empty,
        tokens=counts.tokens,
        text_bytes=counts.text_bytes,
        vocab_size=tokenizer.vocab_size,
        dtype=dtype.name,
        tokenizer=str(options.tokenizer_name_or_path),
        outputs=_output_sizes(options.output_prefix),
        seconds=round(time.monotonic() - start, 1),
        fingerprint=fingerprint,
    )
    contents = asdict(summary)
    del contents["reused"]
    write_file(meta_file, json.dumps(contents, indent=2).encode() + b"\n")
    return summary


def _trained_or_loaded(options: PreparationOptions, files: Sequence[TextFile]) -> Tokenizer:
    folder = options.tokenizer_name_or_path
    if options.train_tokenizer is not None:
        fingerprint = _fingerprint(
            files,
            json_key=options.json_key,
            vocab_size=options.train_tokenizer,
            train_bytes=options.tokenizer_train_bytes,
        )
        if not is_trained(folder, fingerprint):
            start = time.monotonic()
            problems = _Problems(options.on_error, shown=0)  # tokenizing shows them
            documents = read_documents(files, options.json_key, problems)
            total = sum(file.size for file in files)
            texts = _training_texts(documents, total, options.tokenizer_train_bytes)
            train_tokenizer(texts, options.train_tokenizer, folder, fingerprint)
            logger.info(
                "trained a tokenizer of %s entries in %.1f s: %s",
                options.train_tokenizer,
                time.monotonic() - start,
                folder,
            )
    return load_tokenizer(folder)


def _training_texts(
    documents: Iterable[Document], total_bytes: int, train_bytes: int
) -> Iterator[str]:
    """About ``train_bytes`` of text, from documents spread evenly over the ``total_bytes``."""
    share = min(1.0, train_bytes / max(total_bytes, 1))
    read = taken = 0
    with _progress_bar("training the tokenizer", min(total_bytes, train_bytes)) as bar:
        for document in documents:
            read += document.read_bytes
            if taken >= train_bytes:
                return
            if taken < share * read:
                taken += document.num_bytes
                bar.update(document.num_bytes)
                yield document.text


def _tokenize(
    documents: Iterator[Document],
    tokenizer: Tokenizer,
    writer: IndexedDatasetWriter,
    bar: tqdm,
    options: PreparationOptions,
) -> _Counts:
    """Writes the ids of all documents."""
    counts = _Counts()
    end = [tokenizer.eos_id] if options.append_eos else []
    next_log = options.log_interval
    for batch in prefetch(_batches(documents), depth=2):
        for ids in tokenizer.encode_batch([document.text for document in batch]):
            if not ids:
                counts.empty += 1
                continue
            writer.add_document(np.array(ids + end, writer.dtype))
            counts.tokens += len(ids) + len(end)
        counts.text_bytes += sum(document.num_bytes for document in batch)
        bar.update(sum(document.read_bytes for document in batch))
        if bar.disable and writer.num_documents >= next_log:
            next_log = writer.num_documents + options.log_interval
            logger.info(
                "%s documents, %s tokens", f"{writer.num_documents:,}", f"{counts.tokens:,}"
            )
    return counts


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    num_bytes = 0
    for document in documents:
        batch.append(document)
        num_bytes += document.num_bytes
        if num_bytes >= _BATCH_BYTES or len(batch) >= _BATCH_DOCUMENTS:
            yield batch
            batch, num_bytes = [], 0
    if batch:
        yield batch


def _document_order(num_documents: int, shuffle_seed: int | None) -> np.ndarray | None:
    if shuffle_seed is None:
        return None
    return np.random.RandomState(shuffle_seed).permutation(num_documents)


def _known_size(files: Sequence[TextFile]) -> int | None:
    """Bytes of all files, or None where some are compressed."""
    if any(file.is_compressed for file in files):
        return None
    return sum(file.size for file in files)


def _progress_bar(description: str, total_bytes: int | None) -> tqdm:
    return tqdm(
        total=total_bytes,
        desc=description,
        unit="B",
        unit_scale=True,
        dynamic_ncols=True,
        disable=not sys.stderr.isatty(),
    )


def _fingerprint(files: Sequence[TextFile], **settings: object) -> str:
    inputs = [(file.name, file.size, file.mtime_ns) for file in files]
    return hashlib.sha256(json.dumps([inputs, settings], sort_keys=True).encode()).hexdigest()


def _output_sizes(prefix: str) -> dict[str, int]:
    files = (Path(prefix + ".bin"), Path(prefix + ".idx"))
    return {file.name: file.stat().st_size for file in files}


def _previous_summary(prefix: str, fingerprint: str) -> Summary | None:
    """What an earlier run wrote, if the files are there and were made in the same way."""
    try:
        contents = json.loads(Path(prefix + ".meta.json").read_text())
        if contents["fingerprint"] != fingerprint or contents["outputs"] != _output_sizes(prefix):
            return None
        return Summary(**contents, reused=True)
    except (OSError, ValueError, KeyError, TypeError):  # not there, or not ours
        return None
