"""What every dataset of samples offers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import numpy as np

from pypkg.data.corpus.reader import IndexedDataset


@dataclass(frozen=True)
class BatchRows:
    """Rows of a batch that samples are read into.

    Attributes:
        text: int64 [batch, seq_length + 1], the tokens.
        rows: int64 [n], the row of each sample.
        document_starts: int32, the shape of ``text``, or None: for each token, the place in its
            row of the first token of its document.
        loss_mask: int64, the shape of ``text``, or None: 0 for each token that does not count for
            the loss, see :attr:`Dataset.has_loss_mask`.
    """

    text: np.ndarray
    rows: np.ndarray
    document_starts: np.ndarray | None = None
    loss_mask: np.ndarray | None = None

    def select(self, chosen: np.ndarray) -> BatchRows:
        """The rows where ``chosen``, bool [n], is true, of the same batch."""
        return replace(self, rows=self.rows[chosen])


class Dataset(ABC):
    """Samples of seq_length + 1 tokens: inputs without the last, labels without the first.

    Attributes:
        seq_length: tokens that the model sees.
        corpora: the files that samples come from.
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
            samples: int64 [n], their numbers.
            out: where they go; sample i to row ``out.rows[i]``.
        """

    @abstractmethod
    def document_at(self, sample: int, offset: int) -> tuple[IndexedDataset, int]:
        """The corpus, and in it the document, that token ``offset`` of a sample comes from."""

    @abstractmethod
    def documents(self, sample: int) -> tuple[IndexedDataset, list[int]]:
        """The corpus of a sample, and in it the documents that its tokens come from, in order."""

    def sources(self, samples: np.ndarray) -> np.ndarray:
        """int64 [n]: for each of the samples, which of ``corpora`` it comes from."""
        return np.zeros(len(samples), np.int64)

    def samples_consumed(self, count: int) -> list[int]:
        """How many samples each of ``corpora`` has given when the first ``count`` were consumed."""
        return [count]

    @property
    @abstractmethod
    def samples_per_epoch(self) -> int:
        """Number of samples that hold the tokens of the split once, of all its corpora."""

    @property
    def has_loss_mask(self) -> bool:
        """Whether a corpus tells which tokens count for the loss; in others all do."""
        return any(corpus.loss_mask is not None for corpus in self.corpora)

    def read(
        self,
        samples: np.ndarray,
        document_starts: np.ndarray | None = None,
        loss_mask: np.ndarray | None = None,
    ) -> np.ndarray:
        """int64 [n, seq_length + 1], the samples with the numbers ``samples`` int64 [n]."""
        text = np.empty((len(samples), self.seq_length + 1), np.int64)
        rows = np.arange(len(samples))
        self.read_into(samples, BatchRows(text, rows, document_starts, loss_mask))
        return text

    def __getitem__(self, sample: int) -> dict[str, np.ndarray]:
        """``text``: int64 [seq_length + 1].

        Raises:
            IndexError: there is no such sample.
        """
        if not 0 <= sample < len(self):
            raise IndexError(f"sample {sample} of {len(self)}")
        return {"text": self.read(np.array([sample]))[0]}
