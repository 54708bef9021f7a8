"""``python -m pypkg.bench train-step --host-time``."""

from __future__ import annotations

import json

import pytest

from pypkg.bench.__main__ import main
from pypkg.bench.report.page import render
from pypkg.bench.train_step import host_time


def _times(milliseconds: float) -> dict:
    seconds = milliseconds / 1e3
    return {"median": seconds, "lower_quartile": seconds, "upper_quartile": seconds, "count": 3}


def test_the_table() -> None:
    result = {
        "date": "2030-01-02T03:04:05+00:00",
        "command": "python -m pypkg.bench train-step --host-time",
        "machine": {"cpu": "Some CPU", "cores": 4, "threads": 1, "memory_gib": 7.5},
        "versions": {"python": "3.11.7"},
        "commit": "abcdef123456",
        "kind": "host-time",
        "device": "cpu",
        "layers": 20,
        "workload": "a model",
        "notes": [],
        "rows": [
            {"baseline": "pypkg", "forward_backward": _times(30), "update": _times(5)},
            {"baseline": "torch", "forward_backward": _times(60), "update": _times(25)},
        ],
    }
    rows = [line.split("|")[1:-1] for line in render(result).splitlines() if "| torch" in line]
    cells = [cell.strip() for cell in rows[0]]
    assert cells == [
        *("torch", "60.0", "60.0 to 60.0", "0.50", "3.00"),
        *("25.0", "25.0 to 25.0", "0.20"),
    ]


@pytest.mark.parametrize("arguments", [["--config", "llama-1b"], ["--seq", "64"], ["--batch", "1"]])
def test_the_workload_is_its_own(capsys, arguments) -> None:
    assert main(["train-step", "--host-time", *arguments]) == 2
    assert "leave out --config, --batch and --seq" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(host_time, "_STEPS_PER_TURN", 2)
    output = tmp_path / "result.json"
    arguments = ["--baseline", "pypkg", "--steps", "1", "--threads", "2", "--json", str(output)]
    assert main(["train-step", "--host-time", *arguments]) == 0
    result = json.loads(output.read_text())
    (row,) = result["rows"]
    assert result["machine"]["threads"] == 1
    for part in ("forward_backward", "update"):
        assert row[part]["count"] == 2 and row[part]["median"] > 0
