"""Fixtures of the data tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from preprocess_testing import DOCUMENTS

from pypkg.console.logs import configure_logging
from pypkg.data import IndexedDatasetWriter
from pypkg.data.tokenizers.train_bpe import train_tokenizer


@pytest.fixture
def make_corpus(tmp_path: Path) -> Callable[..., str]:
    """Writes documents and returns their prefix."""

    def make(
        documents: Sequence[Sequence[int]], name: str = "corpus", dtype: type = np.uint16
    ) -> str:
        prefix = str(tmp_path / name)
        with IndexedDatasetWriter(prefix, dtype) as writer:
            for document in documents:
                writer.add_document(np.array(document, dtype))
            writer.commit()
        return prefix

    return make


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """The folder of a small byte-level tokenizer."""
    train_tokenizer(iter(DOCUMENTS.values()), 300, tmp_path / "tokenizer", "x")
    return tmp_path / "tokenizer"


@pytest.fixture
def logged(capsys: pytest.CaptureFixture[str]) -> Callable[[], str]:
    """What went to standard error since the last call, log lines included."""
    configure_logging()
    return lambda: capsys.readouterr().err
