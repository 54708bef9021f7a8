"""The interface of all datasets."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import numpy as np

from pypkg.data.corpus.reader import IndexedDataset


@dataclass(frozen=True)
class BatchRows:
    """The arrays of a batch, and the rows that a read fills.

    Attributes:
        text: int64 [batch, seq_length + 1], the tokens.
        rows: int64 [n], the row of each sample.
        document_starts: int32 [batch, seq_length + 1], position in the row of the first token of
            each token's document; None: not needed.
        loss_mask: int64 [batch, seq_length + 1], 0 for tokens that do not count for the loss (see
            :attr:`Dataset.has_loss_mask`); None: not needed.
    """

    text: np.ndarray
    rows: np.ndarray
    document_starts: np.ndarray | None = None
    loss_mask: np.ndarray | None = None

    def select(self, chosen: np.ndarray) -> BatchRows:
        """The same batch with those of ``rows`` for which ``chosen``, bool [n], is true."""
        return replace(self, rows=self.rows[chosen])


class Dataset(ABC):
    """Samples of seq_length + 1 tokens.

    The inputs of the model are a sample without its last token, the labels without its first.

    Attributes:
        seq_length: number of tokens that the model sees.
        corpora: the corpora that samples come from.
    """

    seq_length: int
    corpora: list[IndexedDataset]

    @abstractmethod
    def __len__(self) -> int:
        """Number of samples."""

    @abstractmethod
    def read_into(self, samples: np.ndarray, out: BatchRows) -> None:
        """Copies samples into a batch.

        Args:
            samples: int64 [n], sample numbers.
            out: the destination; ``samples[i]`` goes to row ``out.rows[i]``.
        """

    @abstractmethod
    def document_at(self, sample: int, offset: int) -> tuple[IndexedDataset, int]:
        """The corpus, and the document number in it, of token ``offset`` of a sample."""

    @abstractmethod
    def documents(self, sample: int) -> tuple[IndexedDataset, list[int]]:
        """The corpus of a sample, and in it the documents that its tokens come from, in order."""

    def sources(self, samples: np.ndarray) -> np.ndarray:
        """The index in ``corpora`` of the corpus of each sample, int64 [n]."""
        return np.zeros(len(samples), np.int64)

    def samples_consumed(self, count: int) -> list[int]:
        """For each of ``corpora``, the number of its samples among the first ``count`` samples."""
        return [count]

    @property
    @abstractmethod
    def samples_per_epoch(self) -> int:
        """Number of samples in one pass over the tokens of the split, summed over all corpora."""

    @property
    def has_loss_mask(self) -> bool:
        """Whether a corpus has a loss mask. In a corpus without one, all tokens count."""
        return any(corpus.loss_mask is not None for corpus in self.corpora)

    def read(
        self,
        samples: np.ndarray,
        document_starts: np.ndarray | None = None,
        loss_mask: np.ndarray | None = None,
    ) -> np.ndarray:
        """Reads samples into a new array.

        Args:
            samples: int64 [n], sample numbers.
            document_starts, loss_mask: arrays to fill, as in :class:`BatchRows`, or None.

        Returns:
            int64 [n, seq_length + 1].
        """
        text = np.empty((len(samples), self.seq_length + 1), np.int64)
        rows = np.arange(len(samples))
        self.read_into(samples, BatchRows(text, rows, document_starts, loss_mask))
        return text

    def __getitem__(self, sample: int) -> dict[str, np.ndarray]:
        """One sample as a dict with ``text``: int64 [seq_length + 1].

        Raises:
            IndexError: there is no such sample.
        """
        if not 0 <= sample < len(self):
            raise IndexError(f"sample {sample} of {len(self)}")
        return {"text": self.read(np.array([sample]))[0]}
