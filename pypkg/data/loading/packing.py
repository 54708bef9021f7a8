"""Keeping apart the documents that a sample holds."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pypkg.data.loading.objectives import IGNORED_LABEL, Batch


@dataclass(frozen=True)
class Packing:
    """What ends with a document inside a sample. The names are Megatron-LM's.

    A document is what the corpus file lists as a sequence, whatever tokens it ends with. A sample
    may begin in the middle of one; that counts as its beginning.

    Attributes:
        reset_attention_mask: tokens see only those of their own document.
        reset_position_ids: positions count from 0 in each document.
        eod_mask_loss: the first token of a document does not count as the one to predict after
            the last token of the document before.
    """

    reset_attention_mask: bool = False
    reset_position_ids: bool = False
    eod_mask_loss: bool = False

    def __bool__(self) -> bool:
        return self.reset_attention_mask or self.reset_position_ids or self.eod_mask_loss

    def __call__(self, batch: Batch, document_starts: np.ndarray) -> Batch:
        """
        Args:
            batch: input_ids and labels of the next-token objective, int64 [batch, seq_length].
            document_starts: int32 [batch, seq_length + 1], for each token of the samples, the
                place of the first token of its document.

        Returns:
            The batch, with document_starts int32 and position_ids int64 [batch, seq_length] where
            they are asked for.
        """
        starts = np.ascontiguousarray(document_starts[:, :-1])
        place = np.arange(document_starts.shape[1])
        packed = dict(batch)
        if self.reset_attention_mask:
            packed["document_starts"] = starts
        if self.reset_position_ids:
            packed["position_ids"] = place[:-1] - starts.astype(np.int64)
        if self.eod_mask_loss:
            begins = document_starts[:, 1:] == place[1:]
            packed["labels"] = np.where(begins, IGNORED_LABEL, batch["labels"])
        return packed
