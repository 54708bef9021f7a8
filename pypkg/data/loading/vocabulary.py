"""Detects token ids outside the vocabulary of the model."""

from __future__ import annotations

import numpy as np

from pypkg.data.corpus.reader import IndexedDataset
from pypkg.data.datasets.base import Dataset
from pypkg.errors import UserError

_SCANNED_TOKENS = 1 << 24


def check_vocabulary(dataset: Dataset, vocab_size: int) -> None:
    """Checks the token ids in the first 16 million tokens of each corpus.

    The check detects the tokenizer of another model at start. :func:`check_batch` checks the other
    tokens batch by batch.

    Raises:
        UserError: an id is negative or not below ``vocab_size``.
    """
    for corpus in dataset.corpora:
        tokens = corpus.tokens[:_SCANNED_TOKENS]
        bad = ~((tokens >= 0) & (tokens < vocab_size))
        if bad.any():
            token = int(np.argmax(bad))
            byte = token * tokens.itemsize
            sequence = int(np.searchsorted(corpus.pointers, byte, side="right")) - 1
            document = corpus.document_of(sequence)
            raise _outside(corpus, document, tokens[token].item(), vocab_size)


def check_batch(dataset: Dataset, samples: np.ndarray, text: np.ndarray, vocab_size: int) -> None:
    """Checks the token ids of a batch.

    Args:
        dataset: the dataset of the batch, for the message.
        samples: int64 [batch], sample numbers.
        text: int64 [batch, tokens], their tokens.

    Raises:
        UserError: an id is negative or not below ``vocab_size``.
    """
    if text.min() >= 0 and text.max() < vocab_size:
        return
    row, offset = np.argwhere((text < 0) | (text >= vocab_size))[0].tolist()
    corpus, document = dataset.document_at(int(samples[row]), offset)
    raise _outside(corpus, document, int(text[row, offset]), vocab_size)


def _outside(corpus: IndexedDataset, document: int, token_id: float, vocab_size: int) -> UserError:
    return UserError(
        f"{corpus.token_file}: document {document} holds the token id {token_id}; the model's "
        f"vocab_size is {vocab_size}, so ids from 0 to {vocab_size - 1} are possible. Was the "
        "corpus made with another tokenizer?"
    )
