"""Files of a run outside its checkpoints: a crash in the middle of a write loses nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from disk_log import DiskLog

from pypkg.training.reporting.outcome import Outcome
from pypkg.training.reporting.reporters import JsonLinesReporter, read_metrics
from pypkg.training.reporting.summary import Summary, draw_loss_curve
from pypkg.training.state import TrainerState


@pytest.fixture
def disk(monkeypatch) -> DiskLog:
    return DiskLog(monkeypatch)


@pytest.fixture
def metrics(tmp_path) -> Path:
    """Three steps, as a run leaves them that was killed while it wrote the third."""
    file = tmp_path / "metrics.jsonl"
    reporter = JsonLinesReporter(file, last_step=0)
    for step in (1, 2, 3):
        reporter.report(step, {"loss": float(step)})
    reporter.close()
    file.write_text(file.read_text()[:-4])
    return file


def test_a_resumed_run_drops_the_steps_after_its_checkpoint(metrics):
    reporter = JsonLinesReporter(metrics, last_step=1)
    assert read_metrics(metrics) == [{"global_step": 1, "loss": 1.0}]
    reporter.report(2, {"loss": 7.0})
    assert [row["loss"] for row in read_metrics(metrics)] == [1.0, 7.0]
    reporter.close()


def test_a_crash_on_resuming_leaves_the_metrics(metrics, disk):
    before = metrics.read_bytes()
    disk.crash_before("rename metrics.jsonl.tmp metrics.jsonl")
    with pytest.raises(KeyboardInterrupt):
        JsonLinesReporter(metrics, last_step=1)
    assert metrics.read_bytes() == before


def test_the_summary_is_replaced_in_one_step(tmp_path, disk):
    outcome = Outcome(TrainerState(), 2.0, None, None, None, 0)
    Summary(outcome, None, None, None, []).write(tmp_path / "summary.json")
    assert disk.events[:2] == ["fsync summary.json.tmp", "rename summary.json.tmp summary.json"]
    disk.check()


def test_the_loss_curve_is_replaced_in_one_step(metrics, disk):
    pytest.importorskip("matplotlib")
    picture = draw_loss_curve(metrics, metrics.with_name("loss_curve.png"))
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "rename loss_curve.png.tmp loss_curve.png" in disk.events
    disk.check()
