"""Iterates over batches of a dataset, from any position."""

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
    """The micro batches of one rank.

    A batch is a dict of arrays whose keys are argument names of ``Decoder.loss``:

    - ``input_ids``, ``labels``: int64 [micro_batch_size, seq_length];
    - ``position_ids``: int64 [micro_batch_size, seq_length] or [micro_batch_size, 2, seq_length],
      with ``Packing.reset_position_ids`` or the objective ``BlankInfilling``;
    - ``prefix_lengths``: int32 [micro_batch_size], with the objective ``BlankInfilling``;
    - ``document_starts``: int32 [micro_batch_size, seq_length], with
      ``Packing.reset_attention_mask``;
    - ``sources``: int64 [micro_batch_size], with ``with_sources``; not an argument of the loss.

    The ranks together consume ``micro_batch_size * data_parallel_size`` samples of the dataset per
    batch, and each rank takes its part. By default, samples at the end that do not fill a batch of
    all ranks are dropped. With ``every_sample``, rows without labels fill the last batch, so that
    each sample counts once. The mean over labels is then that of the dataset, and the last batch of
    a rank may have no label.

    Iteration raises ``UserError`` if a token id is outside the vocabulary.
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
            dataset: the samples.
            micro_batch_size: samples of a batch of one rank.
            consumed_samples: number of samples, of all ranks, to skip at the beginning.
            objective: creates a batch from samples and their numbers.
            packing: separation of the documents in a sample; needs the ``causal`` objective.
            with_sources: add ``sources``, the index of each sample's corpus in
                ``dataset.corpora``, to the batches.
            data_parallel_rank, data_parallel_size: rank among the processes that read different
                samples, and their number.
            vocab_size: token ids must be in [0, vocab_size); None: not checked.
            threads: number of threads that create batches ahead; 0 creates them on demand.
            every_sample: also yield an incomplete last batch, for evaluation.

        Raises:
            UserError: ``consumed_samples`` exceeds the dataset, or a corpus has a loss mask and the
                objective does not support it.
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
        # Thread k creates the batches k, k + threads, k + 2 threads, ...
        turns = [self._read(self._starts[k::threads]) for k in range(threads)]
        return prefetch_in_turn(turns, max(_BATCHES_AHEAD, threads))

    def _read(self, starts: Sequence[int]) -> Iterator[Batch]:
        shape = (self._batch_size, self._dataset.seq_length + 1)
        for start in starts:
            numbers = np.arange(start, start + self._batch_size)
            beyond = numbers >= len(self._dataset)  # these rows hold the last sample without labels
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
