"""``python -m pypkg.bench generate``."""

from __future__ import annotations

import json

import pytest

from pypkg.bench.__main__ import main
from pypkg.bench.generate import check_tokens
from pypkg.bench.ops.case import BenchmarkError
from pypkg.bench.report.page import render
from pypkg.bench.report.result import result_name


def _times(seconds: float) -> dict:
    return {"median": seconds, "lower_quartile": seconds, "upper_quartile": seconds, "count": 3}


def _row(baseline: str, first: float, later: float) -> dict:
    return {
        "baseline": baseline,
        "first_token": _times(first),
        "later_tokens": _times(later),
        "peak_rss_bytes": 2**31,
    }


def test_the_table() -> None:
    result = {
        "date": "2030-01-02T03:04:05+00:00",
        "command": "python -m pypkg.bench generate",
        "machine": {"cpu": "Some CPU", "cores": 4, "threads": 1, "memory_gib": 7.5},
        "versions": {"python": "3.11.7"},
        "commit": "abcdef123456",
        "kind": "generate",
        "device": "cpu",
        "workload": "a model",
        "tokens_per_run": 300,
        "notes": ["a note"],
        "rows": [_row("pypkg", 0.05, 2.0), _row("torch", 0.1, 3.0)],
    }
    text = render(result)
    rows = [line.split("|")[1:-1] for line in text.splitlines() if "| torch" in line]
    cells = [cell.strip() for cell in rows[0]]
    assert cells == ["torch", "100.0", "3.00", "3.00-3.00", "100.0", "1.50", "2.00"]
    assert "a note" in text


def test_other_tokens_are_no_result() -> None:
    check_tokens({"pypkg": 5.0, "torch": 5.0})
    with pytest.raises(BenchmarkError, match="different tokens"):
        check_tokens({"pypkg": 5.0, "torch": 6.0})


def test_too_many_tokens(capsys) -> None:
    assert main(["generate", "--prompt", "2000", "--new", "100"]) == 2
    assert "max_position_embeddings (2048)" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run(tmp_path) -> None:
    """Beside transformers where it is installed."""
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128,
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 64,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    output = tmp_path / "result.json"
    arguments = ["--config", str(tmp_path), "--prompt", "5", "--new", "4", "--rounds", "2"]
    arguments += ["--batch", "2"]
    assert main(["generate", *arguments, "--json", str(output)]) == 0
    result = json.loads(output.read_text())
    assert result["tokens_per_run"] == 6
    assert result_name(result) == "generate-cpu-batch-2"
    row = result["rows"][0]
    assert row["baseline"] == "pypkg"
    assert row["first_token"]["median"] > 0 and row["later_tokens"]["count"] == 2
