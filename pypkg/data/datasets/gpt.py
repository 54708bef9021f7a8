"""Samples of seq_length + 1 tokens, cut from a sequence of documents."""

from __future__ import annotations

import logging
import resource
import time
from pathlib import Path

import numpy as np

from pypkg import _native
from pypkg.data.corpus.reader import IndexedDataset
from pypkg.data.datasets.base import BatchRows, Dataset
from pypkg.data.index.cache import IndexCache
from pypkg.data.index.maps import build_index_maps, plan_index_maps
from pypkg.errors import UserError

logger = logging.getLogger("pypkg")


class GPTDataset(Dataset):
    """Samples of one split of one corpus, for causal language modelling.

    ``dataset[i]["text"]`` is int64 [seq_length + 1]. The dataset has all samples of the smallest
    number of whole epochs with at least ``num_samples`` samples.

    Attributes:
        name: train, valid or test, for messages.
        corpus: the corpus.
        doc_idx, sample_idx, shuffle_idx: the index maps, see ``pypkg.data.index.maps.IndexMaps``.
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
        *,
        cache: IndexCache | None = None,
        splits_string: str = "",
    ) -> None:
        """Builds the dataset of the sequences ``first`` to ``end`` - 1.

        Args:
            first, end: sequences with at least one token in total.
            num_samples: the least number of samples.
            seq_length: number of tokens that the model sees.
            seed: seed of the order of documents and samples.
            cache: reads and stores index maps; None builds them in memory.
            splits_string: the setting ``split``, by which PaddleNLP names its index maps.

        Raises:
            UserError: the train split has fewer tokens than one sample.
        """
        self.name = name
        self.corpus = corpus
        self.corpora = [corpus]
        self.seq_length = seq_length
        tokens = int(corpus.sizes[first:end].sum(dtype=np.int64))
        self._samples_per_epoch = (tokens - 1) // seq_length
        if num_samples and tokens <= seq_length:
            self._say_too_small(tokens, end - first)
        plan = plan_index_maps(corpus.sizes, first, end, num_samples, seq_length, seed)
        start = time.perf_counter()
        if cache is None:
            maps = build_index_maps(corpus.sizes, plan)
        else:
            maps = cache.index_maps(
                corpus, plan, name=name, num_samples=num_samples, splits_string=splits_string
            )
        seconds = time.perf_counter() - start
        self.doc_idx, self.sample_idx, self.shuffle_idx = maps.arrays()
        self._reader = self._sample_reader(corpus.token_file, corpus.tokens, corpus.pointers)
        self._mask_reader = None
        if corpus.loss_mask is not None:
            pointers = corpus.pointers // corpus.tokens.itemsize
            self._mask_reader = self._sample_reader(
                f"{corpus.prefix}.lsm", corpus.loss_mask, pointers
            )
        logger.info(
            "%s: %s, %s documents, %s tokens, %s samples of %s tokens in %s epoch(s); index maps: "
            "%s in %.2f s, peak memory of the process %s",
            name,
            corpus.prefix,
            f"{end - first:,}",
            f"{tokens:,}",
            f"{len(self):,}",
            seq_length,
            plan.epochs,
            _mebibytes(maps.nbytes),
            seconds,
            _mebibytes(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024),
        )

    def _say_too_small(self, tokens: int, documents: int) -> None:
        message = (
            f"the {self.name} split of {self.corpus.prefix} has {tokens} tokens in {documents} "
            f"documents (the whole corpus: {self.corpus.num_tokens} tokens); one sample needs "
            f"{self.seq_length + 1}, max_seq_length and one more"
        )
        if self.name == "train":
            raise UserError(
                f"{message}. Give more text, a smaller max_seq_length, or a split with a larger "
                f"share for {self.name}"
            )
        logger.warning("%s; its documents are repeated within a sample", message)

    def _sample_reader(
        self, file: str | Path, values: np.ndarray, pointers: np.ndarray
    ) -> _native.SampleReader:
        """A reader of samples of ``values``, an array with one value per token."""
        return _native.SampleReader(
            str(file),
            values,
            pointers,
            self.corpus.sizes,
            self.doc_idx,
            self.sample_idx,
            self.shuffle_idx,
        )

    def __len__(self) -> int:
        return len(self.shuffle_idx)

    @property
    def samples_per_epoch(self) -> int:
        return self._samples_per_epoch

    def read_into(self, samples: np.ndarray, out: BatchRows) -> None:
        self._reader.read(samples, out.text, out.rows, out.document_starts)
        if out.loss_mask is not None and self._mask_reader is not None:
            self._mask_reader.read(samples, out.loss_mask, out.rows, None)
        elif out.loss_mask is not None:
            out.loss_mask[out.rows] = 1

    def document_at(self, sample: int, offset: int) -> tuple[IndexedDataset, int]:
        position, begin = self.sample_idx[self.shuffle_idx[sample]].tolist()
        offset += begin
        while offset >= self.corpus.sizes[self.doc_idx[position]]:
            offset -= int(self.corpus.sizes[self.doc_idx[position]])
            position += 1
        return self.corpus, self.corpus.document_of(int(self.doc_idx[position]))

    def documents(self, sample: int) -> tuple[IndexedDataset, list[int]]:
        position, begin = self.sample_idx[self.shuffle_idx[sample]].tolist()
        left = begin + self.seq_length + 1
        found: dict[int, None] = {}  # documents in order
        while left > 0:
            sequence = int(self.doc_idx[position])
            size = int(self.corpus.sizes[sequence])
            if size > 0:
                found[self.corpus.document_of(sequence)] = None
            left -= size
            position += 1
        return self.corpus, list(found)


def _mebibytes(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.1f} MiB"
