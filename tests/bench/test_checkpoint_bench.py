"""``python -m pypkg.bench checkpoint``, with a tiny model."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import pytest
from test_train_step import _TINY

from pypkg.bench.__main__ import main
from pypkg.bench.checkpoint import suite
from pypkg.bench.checkpoint.suite import summary
from pypkg.bench.ops.case import BenchmarkError
from pypkg.bench.report.sections import checkpoint


@pytest.fixture
def model(tmp_path) -> str:
    """The folder of a tiny model."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(_TINY))
    return str(folder)


def one_round(seconds: float) -> dict[str, Any]:
    saved = {"stall": seconds / 4, "total": seconds, "host_bytes": 3 << 20, "largest_share": 1.02}
    loaded = {"total": 1.5, "read_bytes": 10, "read_per_held": 1.04}
    return {
        "bytes": 2 * 10**9,
        "sync": saved,
        "async": saved,
        "load": loaded,
        "dd": 0.9,
        "direct_dd": 0.6,
    }


def test_a_row_and_its_line() -> None:
    row = summary("alone", [one_round(1.0), one_round(2.0), one_round(3.0)])
    assert row["sync_total"]["median"] == 2.0 and row["async_stall"]["median"] == 0.625
    assert row["first_async_stall"] == 0.25
    assert row["of_dd"]["median"] == pytest.approx(0.45)
    assert row["of_direct_dd"]["median"] == pytest.approx(0.3)
    twice = summary("tp2", [one_round(4.0)])
    lines = checkpoint.render({"workload": "a model", "rows": [row, twice]})
    assert lines[0] == "- a model; 2.00 GB"
    cells = [cell.strip() for cell in lines[-1].split("|")[1:-1]]
    assert cells == ["tp2", "4.00", "4.00-4.00", "0.50", "0.23", "0.15", "2.00", "1.00", "0.25",
                     "1.00", "4.00", "1.50", "1.02", "1.04", "3"]  # fmt: skip


def test_a_row_without_asynchronous_saves() -> None:
    saved = {key: value for key, value in one_round(1.0).items() if key != "async"}
    lines = checkpoint.render({"workload": "a model", "rows": [summary("alone", [saved])]})
    cells = [cell.strip() for cell in lines[-1].split("|")[1:-1]]
    assert cells == ["alone", "1.00", "1.00-1.00", "2.00", "0.90", "0.60", "1.00", "", "", "", "",
                     "1.50", "1.02", "1.04", "3"]  # fmt: skip


def test_an_unknown_layout_is_named(capsys: pytest.CaptureFixture) -> None:
    assert main(["checkpoint", "--layout", "tp3"]) == 2
    assert "'tp3' is none of 'alone', 'tp2'" in capsys.readouterr().err


def test_a_killed_process_is_named() -> None:
    codes = ["import os; os.kill(os.getpid(), 9)", "raise SystemExit(1)"]
    processes = [suite._start([sys.executable, "-c", code], {}) for code in reversed(codes)]
    with pytest.raises(BenchmarkError, match="tp2: a process was ended by SIGKILL"):
        suite._results("tp2", processes)


@pytest.mark.slow
def test_from_end_to_end(tmp_path, model: str, capsys: pytest.CaptureFixture) -> None:
    output = tmp_path / "result.json"
    words = ["--config", model, "--rounds", "1", "--json", str(output)]
    layouts = ["--layout", "alone", "--layout", "sharding2 stage 3", "--folder", str(tmp_path)]
    assert main(["checkpoint", *words, *layouts]) == 0
    described = json.loads(output.read_text())
    assert described["device"] == "cpu, model"  # a page holds a table for each model
    rows = {row["layout"]: row for row in described["rows"]}
    assert rows["alone"]["largest_share"] == 1.0
    assert rows["sharding2 stage 3"]["largest_share"] < 1.1
    assert "sharding2 stage 3" in capsys.readouterr().out
    assert "async_stall" in rows["alone"]
    capsys.readouterr()
    assert main(["checkpoint", *words, "--layout", "alone", "--synchronous"]) == 0
    assert "async_stall" not in json.loads(output.read_text())["rows"][0]
    assert "synchronous saves alone" in capsys.readouterr().out


@pytest.mark.slow
def test_a_rank_waits_for_a_slow_disk(tmp_path, model: str, monkeypatch) -> None:
    """Rank 0 waits for its ``dd`` for longer than a collective over gloo may take (30 s)."""
    slow = tmp_path / "bin" / "dd"
    slow.parent.mkdir()
    first = tmp_path / "first"
    slow.write_text(f"#!/bin/sh\n[ -e {first} ] || {{ touch {first}; sleep 33; }}\n")
    slow.chmod(0o755)
    monkeypatch.setenv("PATH", f"{slow.parent}{os.pathsep}{os.environ['PATH']}")
    words = ["--config", model, "--rounds", "1", "--synchronous"]
    assert main(["checkpoint", *words, "--layout", "tp2", "--folder", str(tmp_path)]) == 0
    assert first.exists()
