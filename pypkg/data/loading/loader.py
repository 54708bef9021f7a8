"""Batches of a dataset from any position on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from pypkg.data.datasets.base import Dataset
from pypkg.data.loading.objectives import IGNORED_LABEL, Batch, Objective, causal
from pypkg.data.loading.packing import Packing
from pypkg.data.loading.prefetch import prefetch_in_turn
from pypkg.data.loading.vocabulary import check_batch
from pypkg.errors import UserError

_BATCHES_AHEAD = 4
SOURCES = "sources"


class BatchLoader:
    """Batches of one rank: a dict of arrays by the names of the arguments of a model's ``loss``.

    ``input_ids`` and ``labels`` are int64 [micro_batch_size, seq_length]; the objective makes them,
    and what else a batch holds. A global batch is the next ``micro_batch_size *
    data_parallel_size`` samples of the dataset; the rank takes its part of them. What remains at
    the end and does not fill a global batch is left out, for every rank alike, or with
    ``every_sample`` filled up with rows that have no label, so that each sample counts once. Then a
    mean over labels, not over batches, is that of the dataset, and a rank's last batch may have no
    label at all.

    Iterating raises ``UserError`` where a token id lies outside of the vocabulary.
    """

    def __init__(
        self,
        dataset: Dataset,
        micro_batch_size: int,
        consumed_samples: int = 0,
        *,
        objective: Objective = causal,
        packing: Packing | None = None,
        with_sources: bool = False,
        data_parallel_rank: int = 0,
        data_parallel_size: int = 1,
        vocab_size: int | None = None,
        threads: int = 1,
        every_sample: bool = False,
    ) -> None:
        """
        Args:
            consumed_samples: position in the dataset to begin at, counted over all ranks.
            objective: makes a batch of samples, from nothing but them and their numbers.
            vocab_size: when given, ids outside of 0 to ``vocab_size`` - 1 are an error.
            packing: what a sample's documents do not share; needs the ``causal`` objective.
            with_sources: batches hold ``sources`` as well, int64 [micro_batch_size]: for each
                sample, the number of its corpus among the dataset's. The loss does not take it.
            threads: that make batches ahead; 0 makes them where they are asked for.
            every_sample: the last global batch may be a part of one, for evaluation.

        Raises:
            UserError: the position lies behind the end of the dataset, or there is a loss mask that
                the objective cannot use.
        """
        if not 0 <= consumed_samples <= len(dataset):
            raise UserError(
                f"the data position, {consumed_samples} samples, is outside of the dataset of "
                f"{len(dataset)} samples; was the run that is resumed made with other data or a "
                "larger max_steps?"
            )
        if dataset.has_loss_mask and objective is not causal:
            raise UserError(
                "there is a loss mask (.lsm) beside the data; it says which next tokens count, and "
                "this model learns to fill in blanks. Remove the file, or choose another model"
            )
        self._dataset = dataset
        self._batch_size = micro_batch_size
        self._objective = objective
        self._vocab_size = vocab_size
        self._packing = packing or None
        self._with_sources = with_sources
        self._threads = threads
        step = micro_batch_size * data_parallel_size
        left = len(dataset) - consumed_samples
        batches = -(-left // step) if every_sample else left // step
        first = consumed_samples + data_parallel_rank * micro_batch_size
        self._starts = range(first, first + batches * step, step)

    def __len__(self) -> int:
        """Number of batches."""
        return len(self._starts)

    def __iter__(self) -> Iterator[Batch]:
        threads = min(self._threads, len(self))
        if threads == 0:
            return self._read(self._starts)
        # Thread k makes every threads-th batch, from the k-th on.
        turns = [self._read(self._starts[k::threads]) for k in range(threads)]
        return prefetch_in_turn(turns, max(_BATCHES_AHEAD, threads))

    def _read(self, starts: Sequence[int]) -> Iterator[Batch]:
        shape = (self._batch_size, self._dataset.seq_length + 1)
        for start in starts:
            numbers = np.arange(start, start + self._batch_size)
            beyond = numbers >= len(self._dataset)  # filled up with the last sample, unlabelled
            samples = np.where(beyond, len(self._dataset) - 1, numbers)
            document_starts = None if self._packing is None else np.empty(shape, np.int32)
            loss_mask = np.empty(shape, np.int64) if self._dataset.has_loss_mask else None
            text = self._dataset.read(samples, document_starts, loss_mask)
            if self._vocab_size is not None:
                check_batch(self._dataset, samples, text, self._vocab_size)
            batch = self._objective(samples, text)
            if loss_mask is not None:
                batch["labels"][loss_mask[:, 1:] == 0] = IGNORED_LABEL
            if self._packing is not None and document_starts is not None:
                batch = self._packing(batch, document_starts)
            if beyond.any():
                batch["labels"][beyond] = IGNORED_LABEL
            if self._with_sources:
                batch[SOURCES] = self._dataset.sources(samples)
            yield batch
