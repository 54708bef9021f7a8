"""Damage to the files of a corpus, and reading of what is left."""

from __future__ import annotations

from pathlib import Path

from hypothesis import strategies as st

from pypkg.data import IndexedDataset
from pypkg.errors import UserError

Flips = list[tuple[int, int]]  # places and new bytes
changes = st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=4)


def damage(file: Path, flips: Flips, cut: int = 0, tail: bytes = b"") -> None:
    """Takes the last ``cut`` bytes off a file, changes others, and adds ``tail``."""
    data = file.read_bytes()
    damaged = bytearray(data[: len(data) - cut] if cut else data)
    for position, value in flips:
        if damaged:
            damaged[position % len(damaged)] = value
    file.write_bytes(bytes(damaged) + tail)


def read_everything(prefix: str) -> None:
    """Opens and reads a corpus, which either agrees with itself or raises UserError."""
    try:
        corpus = IndexedDataset(prefix)
    except UserError as error:
        assert prefix in str(error)
        return
    for sequence in range(len(corpus)):
        ids, mask = corpus[sequence], corpus.loss_mask_of(sequence)
        assert len(ids) == corpus.sizes[sequence]
        assert mask is None or len(mask) == len(ids)
        assert 0 <= corpus.document_of(sequence) < len(corpus.document_indices)
        float(ids.sum())  # touches every byte
    assert corpus.num_tokens == corpus.sizes.sum() == corpus.document_sizes().sum() > 0
