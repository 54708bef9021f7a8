"""What every dataset of samples offers."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np

from pypkg.data.corpus.reader import IndexedDataset


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
    def read_into(
        self,
        samples: np.ndarray,
        out: np.ndarray,
        rows: np.ndarray,
        document_starts: np.ndarray | None = None,
        loss_mask: np.ndarray | None = None,
    ) -> None:
        """Copies samples into rows of ``out``.

        Args:
            samples: int64 [n], their numbers.
            out: int64 [batch, seq_length + 1].
            rows: int64 [n], the row of each.
            document_starts: int32, the shape of ``out``, filled alike: for each token, the place
                in its row of the first token of its document.
            loss_mask: int64, the shape of ``out``, filled alike: 0 for each token that does not
                count for the loss, see :attr:`has_loss_mask`.
        """

    @abstractmethod
    def document_at(self, sample: int, offset: int) -> tuple[IndexedDataset, int]:
        """The corpus, and in it the document, that token ``offset`` of a sample comes from."""

    def sources(self, samples: np.ndarray) -> np.ndarray:
        """int64 [n]: for each of the samples, which of ``corpora`` it comes from."""
        return np.zeros(len(samples), np.int64)

    def samples_consumed(self, count: int) -> list[int]:
        """How many samples each of ``corpora`` has given when the first ``count`` were consumed."""
        return [count]

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
        out = np.empty((len(samples), self.seq_length + 1), np.int64)
        self.read_into(samples, out, np.arange(len(samples)), document_starts, loss_mask)
        return out

    def __getitem__(self, sample: int) -> dict[str, np.ndarray]:
        """``text``: int64 [seq_length + 1].

        Raises:
            IndexError: there is no such sample.
        """
        if not 0 <= sample < len(self):
            raise IndexError(f"sample {sample} of {len(self)}")
        return {"text": self.read(np.array([sample]))[0]}
