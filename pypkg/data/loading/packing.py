"""Separation of the documents within a sample."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pypkg.data.loading.objectives import IGNORED_LABEL, Batch


@dataclass(frozen=True)
class Packing:
    """What is reset at document boundaries in a sample. The names are those of Megatron-LM.

    A document is a sequence of the corpus file, regardless of its last token. The part of a
    document at the beginning of a sample counts as a document.

    Attributes:
        reset_attention_mask: tokens see only tokens of their own document.
        reset_position_ids: positions restart at 0 in each document.
        eod_mask_loss: the first token of a document is not a label for the last token of the
            document before it.
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
            document_starts: int32 [batch, seq_length + 1], position in the sample of the first
                token of each token's document.

        Returns:
            The batch; with ``reset_attention_mask`` it has document_starts, int32 [batch,
            seq_length], and with ``reset_position_ids`` position_ids, int64 [batch, seq_length].
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
