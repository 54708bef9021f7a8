"""Samples of seq_length + 1 tokens, drawn from documents that follow one another."""

from __future__ import annotations

import logging

import numpy as np

from pypkg import _native
from pypkg.data.index import build_index_maps
from pypkg.data.indexed_dataset import IndexedDataset
from pypkg.errors import UserError

logger = logging.getLogger("pypkg")


class GPTDataset:
    """Samples of one split of one corpus, for causal language modelling.

    ``dataset[i]["text"]`` is int64 [seq_length + 1]: inputs without the last token, labels without
    the first. There are at least ``num_samples`` of them, usually more: whole epochs.

    Attributes:
        name: train, valid or test, for messages.
        corpus: the files.
        doc_idx, sample_idx, shuffle_idx: the index maps, see :class:`pypkg.data.index.IndexMaps`.
    """

    def __init__(
        self,
        name: str,
        corpus: IndexedDataset,
        first: int,
        end: int,
        num_samples: int,
        seq_length: int,
        seed: int,
    ) -> None:
        """Builds the index maps over sequences ``first`` to ``end``, which hold some token.

        Raises:
            UserError: samples of the train split are asked for and it has fewer tokens than one.
        """
        self.name = name
        self.corpus = corpus
        self.seq_length = seq_length
        tokens = int(corpus.sizes[first:end].sum(dtype=np.int64))
        if num_samples and tokens <= seq_length:
            message = (
                f"the {name} split of {corpus.prefix} has {tokens} tokens in {end - first} "
                f"documents (the whole corpus: {corpus.num_tokens} tokens); one sample needs "
                f"{seq_length + 1}, max_seq_length and one more"
            )
            if name == "train":
                raise UserError(
                    f"{message}. Give more text, a smaller max_seq_length, or a split with a "
                    f"larger share for {name}"
                )
            logger.warning("%s; its documents are repeated within a sample", message)
        maps = build_index_maps(corpus.sizes, first, end, num_samples, seq_length, seed)
        self.doc_idx = maps.document_index
        self.sample_idx = maps.sample_index
        self.shuffle_idx = maps.shuffle_index
        logger.info(
            "%s: %s, %s documents, %s tokens, %s samples of %s tokens in %s epoch(s)",
            name,
            corpus.prefix,
            f"{end - first:,}",
            f"{tokens:,}",
            f"{len(self):,}",
            seq_length,
            maps.epochs,
        )

    @property
    def corpora(self) -> list[IndexedDataset]:
        return [self.corpus]

    def __len__(self) -> int:
        return len(self.shuffle_idx)

    def __getitem__(self, sample: int) -> dict[str, np.ndarray]:
        if not 0 <= sample < len(self):
            raise IndexError(f"sample {sample} of {len(self)}")
        return {"text": self.read(np.array([sample]))[0]}

    def read(self, samples: np.ndarray) -> np.ndarray:
        """int64 [batch, seq_length + 1], the samples with the numbers ``samples`` [batch]."""
        out = np.empty((len(samples), self.seq_length + 1), np.int64)
        _native.gather_samples(
            self.corpus.tokens,
            self.corpus.pointers,
            self.corpus.sizes,
            self.doc_idx,
            self.sample_idx,
            self.shuffle_idx[samples].astype(np.int64),
            out,
        )
        return out

    def document_at(self, sample: int, offset: int) -> tuple[IndexedDataset, int]:
        """The corpus, and in it the document, that token ``offset`` of a sample comes from."""
        position, begin = self.sample_idx[self.shuffle_idx[sample]].tolist()
        offset += begin
        while offset >= self.corpus.sizes[self.doc_idx[position]]:
            offset -= int(self.corpus.sizes[self.doc_idx[position]])
            position += 1
        return self.corpus, self.corpus.document_of(int(self.doc_idx[position]))
