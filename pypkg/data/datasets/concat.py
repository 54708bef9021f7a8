"""Concatenated datasets, and datasets that begin at a later sample."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pypkg.data.corpus.reader import IndexedDataset
from pypkg.data.datasets.base import BatchRows, Dataset


class ChainedDataset(Dataset):
    """The concatenation of ``parts``, which are sample orders of one corpus."""

    def __init__(self, parts: Sequence[Dataset]) -> None:
        self.parts = list(parts)
        self.seq_length = parts[0].seq_length
        self.corpora = parts[0].corpora
        self._ends = np.cumsum([len(part) for part in parts], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def samples_per_epoch(self) -> int:
        return self.parts[0].samples_per_epoch

    def read_into(self, samples: np.ndarray, out: BatchRows) -> None:
        which = self._part_of(samples)
        for number in np.unique(which):
            own = which == number
            self.parts[number].read_into(samples[own] - self._begin(number), out.select(own))

    def document_at(self, sample: int, offset: int) -> tuple[IndexedDataset, int]:
        number = int(self._part_of(np.array(sample)))
        return self.parts[number].document_at(sample - self._begin(number), offset)

    def documents(self, sample: int) -> tuple[IndexedDataset, list[int]]:
        number = int(self._part_of(np.array(sample)))
        return self.parts[number].documents(sample - self._begin(number))

    def _part_of(self, samples: np.ndarray) -> np.ndarray:
        return np.searchsorted(self._ends, samples, side="right")

    def _begin(self, part: int) -> int:
        return int(self._ends[part]) - len(self.parts[part])


class WholeSplit(ChainedDataset):
    """The concatenation of ``parts``, each of another corpus and each with every sample once."""

    def __init__(self, parts: Sequence[Dataset]) -> None:
        super().__init__(parts)
        self.corpora = [corpus for part in parts for corpus in part.corpora]

    @property
    def samples_per_epoch(self) -> int:
        return len(self)

    def sources(self, samples: np.ndarray) -> np.ndarray:
        return self._part_of(samples).astype(np.int64)

    def samples_consumed(self, count: int) -> list[int]:
        ends = self._ends.tolist()
        begins = [0, *ends[:-1]]
        return [min(max(count - begin, 0), end - begin) for begin, end in zip(begins, ends)]


class LaterDataset(Dataset):
    """Samples from ``start`` on: sample i is sample i - start + first of ``dataset``."""

    def __init__(self, dataset: Dataset, start: int, first: int) -> None:
        self.dataset = dataset
        self.seq_length = dataset.seq_length
        self.corpora = dataset.corpora
        self._start = start
        self._shift = first - start

    def __len__(self) -> int:
        return len(self.dataset) - self._shift

    @property
    def samples_per_epoch(self) -> int:
        return self.dataset.samples_per_epoch

    def read_into(self, samples: np.ndarray, out: BatchRows) -> None:
        if len(samples) and samples.min() < self._start:
            raise IndexError(f"sample {samples.min()}, where the first is {self._start}")
        self.dataset.read_into(samples + self._shift, out)

    def document_at(self, sample: int, offset: int) -> tuple[IndexedDataset, int]:
        return self.dataset.document_at(sample + self._shift, offset)

    def documents(self, sample: int) -> tuple[IndexedDataset, list[int]]:
        return self.dataset.documents(sample + self._shift)

    def sources(self, samples: np.ndarray) -> np.ndarray:
        return self.dataset.sources(samples + self._shift)

    def samples_consumed(self, count: int) -> list[int]:
        return self.dataset.samples_consumed(count + self._shift)
