"""Reads the tokens of a corpus to evaluate: text files, or a ``.bin/.idx`` pair."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path

import numpy as np

from pypkg.data.corpus.reader import IndexedDataset
from pypkg.data.preprocess.input.documents import Problem
from pypkg.data.preprocess.input.files import find_text_files, plan_units
from pypkg.data.preprocess.input.readers import read_documents
from pypkg.data.tokenizers.base import Tokenizer
from pypkg.errors import UserError

logger = logging.getLogger("pypkg")

_SUFFIXES = (".txt",)
_DOCUMENTS = 256  # tokenized at a time


@dataclass(frozen=True)
class Corpus:
    """A corpus whose tokens the model predicts.

    Attributes:
        name: as it was given.
        texts: token ids, one array int [tokens] per document, or one array of all documents.
        documents: number of documents.
        text_bytes: size of all documents in UTF-8, without end tokens; None if unknown.
    """

    name: str
    texts: tuple[np.ndarray, ...]
    documents: int
    text_bytes: int | None

    @property
    def num_tokens(self) -> int:
        """Number of tokens."""
        return sum(text.size for text in self.texts)


@dataclass(frozen=True)
class Reader:
    """Reads corpora.

    Attributes:
        tokenizer: if None, only .bin/.idx can be read, and ``text_bytes`` is unknown.
        vocab_size: vocabulary size of the model.
        by_document: whether each document is a text of its own.
        json_key: field of a JSON line, or column of a Parquet file, that holds the text.
    """

    tokenizer: Tokenizer | None
    vocab_size: int
    by_document: bool = False
    json_key: str = "text"

    def read(self, name: str) -> Corpus:
        """The corpus ``name``: a prefix of .bin/.idx, a file of text, or a folder of such files.

        Each document of a text file ends with the tokenizer's eos_token, if it has one.

        Raises:
            UserError: it cannot be read, has no token, or has one that the model lacks.
        """
        prefix = name.removesuffix(".bin").removesuffix(".idx")
        is_indexed = Path(f"{prefix}.idx").is_file()
        corpus = self._read_indexed(name, prefix) if is_indexed else self._read_text(name)
        largest = max((int(text.max()) for text in corpus.texts if text.size), default=None)
        if largest is None:
            raise UserError(f"--data {name} has no token; give files with text")
        if largest >= self.vocab_size:
            raise UserError(
                f"--data {name} has the token {largest}, but vocab_size of the model is "
                f"{self.vocab_size}; give the tokenizer of the model, or data made with it"
            )
        return corpus

    def _read_indexed(self, name: str, prefix: str) -> Corpus:
        data = IndexedDataset(prefix)
        if data.loss_mask is not None:
            logger.warning("%s.lsm is not read: every token of %s counts", prefix, name)
        bounds = np.concatenate([[0], np.cumsum(data.sizes, dtype=np.int64)])
        bounds = bounds[data.document_indices]
        tokens = data.tokens
        if not np.array_equal(
            data.pointers, (np.cumsum(data.sizes) - data.sizes) * tokens.itemsize
        ):
            tokens = np.concatenate([data[each] for each in range(len(data))])
        documents = [tokens[first:stop] for first, stop in pairwise(bounds)]
        text_bytes = None
        if self.tokenizer is not None:
            decode = self.tokenizer.decode
            text_bytes = sum(len(decode(each.tolist()).encode()) for each in documents)
        texts = documents if self.by_document else [tokens[bounds[0] : bounds[-1]]]
        return Corpus(name, tuple(texts), len(documents), text_bytes)

    def _read_text(self, name: str) -> Corpus:
        if self.tokenizer is None:
            raise UserError(
                f"--data {name} is no prefix of .bin/.idx, and text needs a tokenizer; the "
                "checkpoint has none. Give one with --tokenizer FOLDER"
            )
        end = [] if self.tokenizer.eos_id is None else [self.tokenizer.eos_id]
        documents, text_bytes = [], 0
        texts = _texts_of(Path(name), self.json_key)
        while batch := list(islice(texts, _DOCUMENTS)):
            text_bytes += sum(len(text.encode()) for text in batch)
            documents += [
                np.asarray(ids + end, dtype=np.int32) for ids in self.tokenizer.encode_batch(batch)
            ]
        if not text_bytes:
            raise UserError(f"--data {name} has no text; give files with text")
        whole: Sequence[np.ndarray] = documents
        if not self.by_document:
            whole = [np.concatenate(documents)]
        return Corpus(name, tuple(whole), len(documents), text_bytes)


def _texts_of(path: Path, json_key: str) -> Iterator[str]:
    """The texts of the documents of a file, or of the files below a folder.

    Raises:
        UserError: a file or a document cannot be read.
    """

    def refuse(problem: Problem) -> None:
        raise UserError(f"{problem.describe()}; mend it, or take it out of --data")

    if not path.exists():
        raise UserError(f"--data {path} is not there; give text files, or a prefix of .bin/.idx")
    for unit in plan_units(find_text_files(path, _SUFFIXES, ()).files, None):
        for span in unit:
            for document in read_documents(span, json_key, None, refuse):
                yield document.text
