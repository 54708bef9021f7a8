"""Where a trainer gets its batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

from pypkg.data import Batch


class DataSource(Protocol):
    """Micro batches of one rank: the arguments of the model's loss by name, as NumPy arrays.

    ``input_ids`` and ``labels`` are int64 [batch, sequence]; pypkg.data.loading says what else a
    batch may hold.
    """

    @property
    def sources(self) -> Mapping[str, Sequence[str]]:
        """Names of the corpora of each split ("train", "valid", "test").

        A split without documents is missing. The loss of each corpus is reported where there are
        several.
        """

    def train_batches(self, start: int) -> Iterator[Batch]:
        """Training batches from sample ``start`` of the run on, counted over all ranks."""

    def eval_batches(self, split: str = "valid") -> Iterator[Batch]:
        """The batches of ``split``, from its first sample on."""
