"""Files of a run outside its checkpoints, which a crash in a write spares."""

from __future__ import annotations

from pathlib import Path

import pytest
from disk_log import DiskLog

from pypkg.errors import UserError
from pypkg.training.ledger import counts, record
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


def test_a_full_disk_is_told(metrics):
    reporter = JsonLinesReporter(metrics, last_step=3)
    reporter.close()
    with open("/dev/full", "ab", buffering=0) as full:  # which it always is
        reporter._stream = full
        with pytest.raises(UserError, match=r"metrics\.jsonl cannot be written: the disk is full"):
            reporter.report(4, {"loss": 4.0})


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


def test_a_run_that_goes_back_drops_the_steps_after_its_checkpoint(metrics):
    reporter = JsonLinesReporter(metrics, last_step=2)
    reporter.report(3, {"loss": 3.0})
    reporter.rewind(1)
    reporter.report(2, {"loss": 7.0})
    assert [(r["global_step"], r["loss"]) for r in read_metrics(metrics)] == [(1, 1.0), (2, 7.0)]
    reporter.close()


def test_the_summary_counts_what_happened(tmp_path):
    record(tmp_path, "rollback", step=7)
    record(tmp_path, "overwritten", step=0)
    for _ in range(2):
        record(tmp_path, "rollback", step=7)
    record(tmp_path, "skipped", step=7, samples=[12, 16])
    record(tmp_path, "skipped", step=9, samples=[20, 24])
    outcome = Outcome(TrainerState(), 2.0, None, None, None, 0)
    summary = Summary(outcome, None, None, None, [], events=counts(tmp_path))
    assert summary.as_dict()["events"] == {"rollback": 2, "skipped": 2, "skipped_samples": 8}
    assert "2 rollback, 2 skipped, 8 skipped_samples" in summary.text()
    assert "events" not in Summary(outcome, None, None, None, []).text()
