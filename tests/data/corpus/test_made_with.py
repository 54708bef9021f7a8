"""Whether the tokenizer of a run is the one that made a corpus."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from pypkg.data.corpus.made_with import warn_of_other_tokenizers


def said(caplog: pytest.LogCaptureFixture, prefixes: list[str], entries: int) -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.WARNING, "pypkg"):
        warn_of_other_tokenizers(prefixes, entries, "mine")
    return [record.getMessage() for record in caplog.records]


def test_a_corpus_of_another_tokenizer_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    for prefix, size in ((first, 6000), (second, 300)):
        Path(f"{prefix}.meta.json").write_text(json.dumps({"tokenizer": "t", "vocab_size": size}))
    (warning,) = said(caplog, [first, second], 6000)
    assert warning.startswith(f"{second} was made with the tokenizer t of 300 entries, but that")
    assert "of the run, mine, has 6,000" in warning
    assert "tokenizer_name_or_path" in warning
    assert len(said(caplog, [first, second], 5999)) == 2


@pytest.mark.parametrize("summary", [None, "{", "[]", "{}", '{"tokenizer": "t", "vocab_size": []}'])
def test_without_a_summary_nothing_is_known(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, summary: str | None
) -> None:
    if summary is not None:
        (tmp_path / "corpus.meta.json").write_text(summary)
    assert said(caplog, [str(tmp_path / "corpus")], 6000) == []
