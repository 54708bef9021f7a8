"""``python -m pypkg.bench preprocess``, with a stand-in for PaddleNLP."""

from __future__ import annotations

import json
import os
import sys

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
        self.writer.add_sequence(np.array(ids[{skip}:]))
    def end_document(self):
        self.writer.end_document()
    def finalize(self, path):
        self.writer.commit()
indexed_dataset = SimpleNamespace(make_builder=Builder)
""",
}
ARGUMENTS = ["preprocess", "--megabytes", "1", "--vocab-size", "300", "--rounds", "1"]


@pytest.fixture
def paddlenlp(tmp_path, monkeypatch):
    """Makes the stand-in; ``skip`` tokens of each document are lost."""

    def make(skip: int) -> list[str]:
        folder = tmp_path / "site" / "paddlenlp"
        folder.mkdir(parents=True)
        for name, source in PADDLENLP.items():
            (folder / name).write_text(source.replace("{skip}", str(skip)))
        monkeypatch.setenv("PYTHONPATH", str(folder.parent))
        return ["--paddlenlp", sys.executable]

    return make


def test_from_end_to_end(tmp_path, paddlenlp, capsys):
    file = tmp_path / "result.json"
    assert main([*ARGUMENTS, *paddlenlp(0), "--threads", "2", "--json", str(file)]) == 0
    result = read_result(file)
    assert [row["baseline"] for row in result["rows"]] == [
        "pypkg",
        "tokenizers alone",
        "tokenizers alone, ids not taken out",
        "PaddleNLP, GPTTokenizer",
        "PaddleNLP, Qwen2TokenizerFast",
    ]
    assert all(row["text_bytes"] >= 1_000_000 and row["median"] > 0 for row in result["rows"])
    assert result["workers"] == 2
    assert "PaddleNLP, GPTTokenizer: version stand-in" in result["notes"]
    out = capsys.readouterr().out
    assert "## Text to tokens on CPU" in out and out.strip() == render(result).strip()


def test_another_corpus_is_refused(paddlenlp, capsys):
    assert main([*ARGUMENTS, *paddlenlp(1)]) == 1
    assert "PaddleNLP, GPTTokenizer writes another .bin than pypkg" in capsys.readouterr().err


def test_another_number_of_tokens_is_refused(monkeypatch, capsys):
    original = preprocess_suite._run_baseline

    def one_more(*arguments):
        result = original(*arguments)
        return {**result, "tokens": result["tokens"] + 1}

    monkeypatch.setattr(preprocess_suite, "_run_baseline", one_more)
    assert main(ARGUMENTS) == 1
    assert "tokenizers alone gives" in capsys.readouterr().err


def test_an_interpreter_that_is_not_there(capsys):
    assert main([*ARGUMENTS, "--paddlenlp", os.devnull]) == 2
    assert f"cannot run {os.devnull}" in capsys.readouterr().err


def test_results_without_paddlenlp_say_so(tmp_path):
    file = tmp_path / "result.json"
    assert main([*ARGUMENTS, "--json", str(file)]) == 0
    assert "PaddleNLP was left out" in " ".join(json.loads(file.read_text())["notes"])
