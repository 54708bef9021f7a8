"""Batches of a dataset from any position on."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from pypkg.data.datasets import Dataset
from pypkg.data.objectives import Batch, Objective, causal
from pypkg.data.prefetch import prefetch
from pypkg.data.vocabulary import check_batch
from pypkg.errors import UserError

_BATCHES_AHEAD = 4


class BatchLoader:
    """Batches of one rank: a dict of arrays by the names of the arguments of a model's ``loss``.

    ``input_ids`` and ``labels`` are int64 [micro_batch_size, seq_length]; the objective makes them,
    and what else a batch holds. A global batch is the next ``micro_batch_size *
    data_parallel_size`` samples of the dataset; the rank takes its part of them. What remains at
    the end and does not fill a global batch is left out, for every rank alike.

    Iterating raises ``UserError`` where a token id lies outside of the vocabulary.
    """

    def __init__(
        self,
        dataset: Dataset,
        micro_batch_size: int,
        consumed_samples: int = 0,
        *,
        objective: Objective = causal,
        data_parallel_rank: int = 0,
        data_parallel_size: int = 1,
        vocab_size: int | None = None,
        prefetch: bool = True,
    ) -> None:
        """
        Args:
            consumed_samples: position in the dataset to begin at, counted over all ranks.
            objective: makes a batch of samples, from nothing but them and their numbers.
            vocab_size: when given, ids outside of 0 to ``vocab_size`` - 1 are an error.
            prefetch: make batches ahead in a thread.

        Raises:
            UserError: the position lies behind the end of the dataset.
        """
        if not 0 <= consumed_samples <= len(dataset):
            raise UserError(
                f"the data position, {consumed_samples} samples, is outside of the dataset of "
                f"{len(dataset)} samples; was the run that is resumed made with other data or a "
                "larger max_steps?"
            )
        self._dataset = dataset
        self._batch_size = micro_batch_size
        self._objective = objective
        self._vocab_size = vocab_size
        self._prefetch = prefetch
        self._starts = range(
            consumed_samples + data_parallel_rank * micro_batch_size,
            len(dataset) - (data_parallel_size - data_parallel_rank) * micro_batch_size + 1,
            micro_batch_size * data_parallel_size,
        )

    def __len__(self) -> int:
        """Number of batches."""
        return len(self._starts)

    def __iter__(self) -> Iterator[Batch]:
        batches = self._read()
        return prefetch(batches, _BATCHES_AHEAD) if self._prefetch else batches

    def _read(self) -> Iterator[Batch]:
        for start in self._starts:
            samples = np.arange(start, start + self._batch_size)
            text = self._dataset.read(samples)
            if self._vocab_size is not None:
                check_batch(self._dataset, samples, text, self._vocab_size)
            yield self._objective(samples, text)
