"""``python -m pypkg.bench preprocess``, with a stand-in for PaddleNLP."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from pypkg.bench.__main__ import main
from pypkg.bench.data import preprocess_suite
from pypkg.bench.report.page import read_result, render

# Has the names that the rebuilt loop uses, on top of this project's writer.
PADDLENLP = {
    "__init__.py": "__version__ = 'stand-in'\n",
    "transformers.py": """
import tokenizers
class AutoTokenizer:
    eos_token_id = 2
    def from_pretrained(folder):
        self = AutoTokenizer()
        self.backend = tokenizers.Tokenizer.from_file(folder + "/tokenizer.json")
        return self
    def tokenize(self, text):
        return self.backend.encode(text, add_special_tokens=False).tokens
    def convert_tokens_to_ids(self, tokens):
        return [self.backend.token_to_id(token) for token in tokens]
""",
    "data.py": """
from types import SimpleNamespace
import numpy as np
from pypkg.data import IndexedDatasetWriter
class Builder:
    def __init__(self, path, implementation, dtype):
        self.writer = IndexedDatasetWriter(path.removesuffix(".bin"), dtype)
    def add_item(self, ids):
        self.writer.add_sequence(np.array(ids))
    def end_document(self):
        self.writer.end_document()
    def finalize(self, path):
        self.writer.commit()
indexed_dataset = SimpleNamespace(make_builder=Builder)
""",
}
ARGUMENTS = ["preprocess", "--megabytes", "1", "--vocab-size", "300", "--rounds", "1"]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """A tenth of the text that is asked for, and no pause between runs."""
    write, run = preprocess_suite._write_text, preprocess_suite.interleave
    monkeypatch.setattr(preprocess_suite, "_write_text", lambda file, size: write(file, size // 10))
    monkeypatch.setattr(
        preprocess_suite, "interleave", lambda runs, rounds, pause: run(runs, rounds, pause=0.0)
    )


@pytest.fixture
def runs(monkeypatch):
    """Functions in place of the processes; the baseline of ``change`` differs from ``ours``."""

    def make(**change: object) -> None:
        def ours(folder: Path, workers: int) -> tuple[dict, tuple[float, float]]:
            documents = len((folder / "text.jsonl").read_text().splitlines())
            write(folder, "ours", b"corpus")
            return {"tokens": 1000 + documents}, (1.0, 2.0)

        def baseline(python, kind: str, folder: Path, tokenizer, name: str, workers) -> dict:
            changed = change if kind == change.get("kind") else {}
            if kind == "paddlenlp":
                write(folder, name, changed.get("corpus", b"corpus"))
            tokens = changed.get("tokens", 1000)
            return {"tokens": tokens, "seconds": 1.0, "cpu_seconds": 2.0}

        def write(folder: Path, name: str, corpus: bytes) -> None:
            for suffix in (".bin", ".idx"):
                (folder / f"{name}{suffix}").write_bytes(corpus)

        monkeypatch.setattr(preprocess_suite, "_run_ours", ours)
        monkeypatch.setattr(preprocess_suite, "_run_baseline", baseline)

    return make


def test_from_end_to_end(tmp_path, monkeypatch, capsys):
    package = tmp_path / "site" / "paddlenlp"
    package.mkdir(parents=True)
    for name, source in PADDLENLP.items():
        (package / name).write_text(source)
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    file = tmp_path / "result.json"
    options = ["--paddlenlp", sys.executable, "--threads", "2", "--json", str(file)]
    assert main([*ARGUMENTS, *options]) == 0
    result = read_result(file)
    assert [row["baseline"] for row in result["rows"]] == [
        "pypkg",
        "tokenizers alone",
        "tokenizers alone, ids not taken out",
        "PaddleNLP, GPTTokenizer",
        "PaddleNLP, Qwen2TokenizerFast",
    ]
    assert all(row["text_bytes"] >= 100_000 and row["median"] > 0 for row in result["rows"])
    assert result["workers"] == 2
    assert "PaddleNLP, GPTTokenizer: version stand-in" in result["notes"]
    out = capsys.readouterr().out
    assert "## Text to tokens on CPU" in out and out.strip() == render(result).strip()


def test_another_corpus_is_refused(runs, capsys):
    runs()
    assert main([*ARGUMENTS, "--paddlenlp", sys.executable]) == 0
    runs(kind="paddlenlp", corpus=b"another")
    assert main([*ARGUMENTS, "--paddlenlp", sys.executable]) == 1
    assert "PaddleNLP, GPTTokenizer writes another .bin than pypkg" in capsys.readouterr().err


def test_another_number_of_tokens_is_refused(runs, capsys):
    runs(kind="tokenizers", tokens=1001)
    assert main(ARGUMENTS) == 1
    assert "tokenizers alone gives" in capsys.readouterr().err


def test_an_interpreter_that_is_not_there(capsys):
    assert main([*ARGUMENTS, "--paddlenlp", os.devnull]) == 2
    assert f"cannot run {os.devnull}" in capsys.readouterr().err


def test_results_without_paddlenlp_say_so(runs, tmp_path):
    runs()
    file = tmp_path / "result.json"
    assert main([*ARGUMENTS, "--json", str(file)]) == 0
    assert "PaddleNLP was left out" in " ".join(json.loads(file.read_text())["notes"])
