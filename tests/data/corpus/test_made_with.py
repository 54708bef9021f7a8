"""Whether the tokenizer of a run is the one that made a corpus."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest

from pypkg.data.corpus.made_with import ids_digest, warn_of_other_tokenizers
from pypkg.data.tokenizers.base import Tokenizer
from pypkg.errors import UserError


@dataclass
class Bytes:
    """Gives each byte an id, one of ``vocab_size`` from ``first`` on."""

    vocab_size: int
    first: int = 0

    def encode(self, text: str) -> list[int]:
        return [(self.first + byte) % self.vocab_size for byte in text.encode()]


class Narrow(Bytes):
    def encode(self, text: str) -> list[int]:
        raise UserError("no id for 'é'")


def said(caplog: pytest.LogCaptureFixture, prefixes: list[str], tokenizer: Any) -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.WARNING, "pypkg"):
        warn_of_other_tokenizers(prefixes, cast(Tokenizer, tokenizer), "mine")
    return [record.getMessage() for record in caplog.records]


def summarize(prefix: str, **fields: Any) -> None:
    Path(f"{prefix}.meta.json").write_text(json.dumps({"tokenizer": "t", **fields}))


def test_a_corpus_of_another_tokenizer_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    for prefix, size in ((first, 6000), (second, 300)):
        summarize(prefix, vocab_size=size)
    (warning,) = said(caplog, [first, second], Bytes(6000))
    assert warning.startswith(f"{second} was made with the tokenizer t of 300 entries, but that")
    assert "of the run, mine, has 6,000" in warning
    assert "tokenizer_name_or_path" in warning
    assert len(said(caplog, [first, second], Bytes(5999))) == 2


def test_a_tokenizer_of_the_same_size_with_other_ids(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prefix = str(tmp_path / "corpus")
    summarize(prefix, vocab_size=300, ids_digest=ids_digest(cast(Tokenizer, Bytes(300))))
    assert said(caplog, [prefix], Bytes(300)) == []
    (warning,) = said(caplog, [prefix], Bytes(300, first=1))
    assert "but that of the run, mine, gives the same text other ids" in warning
    assert said(caplog, [prefix], Narrow(300)) == []  # nothing can be said
    summarize(prefix, vocab_size=300, ids_digest=ids_digest(cast(Tokenizer, Narrow(300))))
    assert said(caplog, [prefix], Bytes(300)) == []


@pytest.mark.parametrize("summary", [None, "{", "[]", "{}", '{"tokenizer": "t", "vocab_size": []}'])
def test_without_a_summary_nothing_is_known(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, summary: str | None
) -> None:
    if summary is not None:
        (tmp_path / "corpus.meta.json").write_text(summary)
    assert said(caplog, [str(tmp_path / "corpus")], Bytes(6000)) == []
