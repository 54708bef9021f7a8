"""Tokenizes a unit of the corpus: reads, filters, encodes, writes a file shard."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from pypkg.data.loading.prefetch import prefetch
from pypkg.data.preprocess.filters import DUPLICATE, EMPTY, digest, text_filter
from pypkg.data.preprocess.input.documents import Document, Problem
from pypkg.data.preprocess.input.files import Unit
from pypkg.data.preprocess.input.readers import read_documents
from pypkg.data.preprocess.options import PreparationOptions
from pypkg.data.preprocess.segmentation import (
    WholeWords,
    sentence_splitter,
    word_segmenter,
    words_of,
)
from pypkg.data.preprocess.shards import FileShardFolder, FileShardWriter
from pypkg.data.tokenizers.load import Tokenizer

_BATCH_BYTES = 1 << 20  # bytes of text tokenized at a time
_BATCH_DOCUMENTS = 4096


@dataclass(frozen=True)
class Task:
    number: int
    unit: Unit


@dataclass(frozen=True)
class Progress:
    """The work done since the last report."""

    file_bytes: int
    documents: int
    tokens: int


def make_encoder(
    options: PreparationOptions, shards: FileShardFolder, threads: int, tokenizer: Tokenizer
) -> Callable[[Task], Iterator[Progress | Problem]]:
    """Creates the function that tokenizes a unit into a file shard and yields its progress.

    Args:
        shards: the folder of the file shards.
        threads: number of threads of the tokenizers library.
        tokenizer: the loaded tokenizer.

    Raises:
        UserError: a package that an option needs is missing.
    """
    # The tokenizers library reads these variables when it starts its threads, at the first batch.
    # One thread of the library is faster than none.
    os.environ["RAYON_NUM_THREADS"] = str(threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    encoder = _Encoder(options, tokenizer, shards.dtype)
    return partial(_encode_unit, encoder, options, shards)


def _encode_unit(
    encoder: _Encoder, options: PreparationOptions, shards: FileShardFolder, task: Task
) -> Iterator[Progress | Problem]:
    writer = FileShardWriter(shards.path, task.number, shards.dtype)
    reader = _Reader(task.unit, options)
    without_tokens: Counter[str] = Counter()
    try:
        for batch in prefetch(reader.batches(), depth=2):
            yield from batch.problems
            yield encoder.encode(batch, writer, without_tokens)
        if not reader.lost_a_file:  # a unit with an unreadable file is not finished
            writer.finish(reader.dropped + without_tokens, reader.mended)
    finally:
        writer.discard()


@dataclass
class _Batch:
    """The texts of some documents, and the problems found while they were read."""

    sentences: list[str] = field(default_factory=list)
    documents: list[int] = field(default_factory=list)  # number of sentences of each
    text_bytes: list[int] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    file_bytes: int = 0


class _Reader:
    """Reads batches of documents that pass the filters, and counts the other documents."""

    def __init__(self, unit: Unit, options: PreparationOptions) -> None:
        self.dropped: Counter[str] = Counter()
        self.mended = 0
        self.lost_a_file = False
        self._unit = unit
        self._options = options
        self._filter = text_filter(options.strip, options.max_repeated_len, options.min_doc_length)
        self._split = sentence_splitter(options.chinese) if options.split_sentences else None
        self._seen: set[bytes] = set()
        self._batch = _Batch()

    def batches(self) -> Iterator[_Batch]:
        options, unfinished = self._options, 0
        for span in self._unit:
            for document in read_documents(
                span,
                options.json_key,
                options.doc_spliter,
                self._problem,
                replace=options.on_error == "replace",
            ):
                unfinished += self._add(document)
                batch = self._batch
                if unfinished >= _BATCH_BYTES or len(batch.sentences) >= _BATCH_DOCUMENTS:
                    yield batch
                    self._batch, unfinished = _Batch(), 0
        yield self._batch

    def _problem(self, problem: Problem) -> None:
        if problem.file_lost:
            self.lost_a_file = True
        elif problem.mended:
            self.mended += 1
        else:
            self.dropped[problem.reason] += 1
        self._batch.problems.append(problem)

    def _add(self, document: Document) -> int:
        """Adds a document to the batch; returns the number of added bytes."""
        batch = self._batch
        batch.file_bytes += document.file_bytes
        text, reason = self._filter(document.text)
        if reason is None and self._options.deduplicate:
            key = digest(text)
            if key in self._seen:
                reason = DUPLICATE
            else:
                self._seen.add(key)
                batch.digests.append(key)
        if reason is not None:
            self.dropped[reason] += 1
            return 0
        sentences = [text]
        if self._split is not None:
            sentences = [s for s in map(str.strip, self._split(text)) if s]
        num_bytes = len(text) if text.isascii() else len(text.encode())
        batch.sentences += sentences
        batch.documents.append(len(sentences))
        batch.text_bytes.append(num_bytes)
        return num_bytes


class _Encoder:
    """Turns batches of texts into tokens."""

    def __init__(self, options: PreparationOptions, tokenizer: Tokenizer, dtype: np.dtype) -> None:
        self._encode: Callable[[Sequence[str]], list[list[int]]] = tokenizer.encode_batch
        if options.cn_whole_word_segment:
            segment = (
                words_of(options.cn_split_dimer)
                if options.cn_splited
                else word_segmenter(options.cn_seg_func)
            )
            self._encode = WholeWords(tokenizer, segment).encode_batch
        end = tokenizer.eos_id if options.append_eos else None
        self._end = [] if end is None else [end]
        self._dtype = dtype

    def encode(self, batch: _Batch, writer: FileShardWriter, dropped: Counter[str]) -> Progress:
        """Writes the documents that have tokens, and counts the others as empty."""
        rows = iter(self._encode(batch.sentences))
        kept: list[list[int]] = []
        sequences, text_bytes, digests = [], [], []
        for number, count in enumerate(batch.documents):
            sentences = [row for row in itertools.islice(rows, count) if row]
            if not sentences:
                dropped[EMPTY] += 1
                continue
            sentences[-1] += self._end
            kept += sentences
            sequences.append(len(sentences))
            text_bytes.append(batch.text_bytes[number])
            digests += batch.digests[number : number + 1]
        sizes = [len(row) for row in kept]
        tokens = np.fromiter(itertools.chain.from_iterable(kept), self._dtype, sum(sizes))
        writer.add(tokens, sizes, sequences, text_bytes, digests)
        return Progress(batch.file_bytes, len(sequences), len(tokens))
