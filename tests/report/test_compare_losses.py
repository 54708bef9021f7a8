"""``pypkg compare-losses``: the first step at which two runs differ, and what may explain it."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
from run_testing import metrics, write_run

from pypkg.errors import UserError
from pypkg.report.compare_losses import main
from pypkg.report.comparison import Comparison, Difference, MetricComparison, compare
from pypkg.training.ledger import LEDGER_FILE, record
from pypkg.training.reporting.reporters import METRICS_FILE, JsonLinesReporter


def write_rows(folder: Path, rows: dict[int, dict[str, float]]) -> Path:
    """A run that has logged ``rows``, by step."""
    folder.mkdir(exist_ok=True)
    reporter = JsonLinesReporter(folder / METRICS_FILE, last_step=0)
    for step, row in rows.items():
        reporter.report(step, row)
    reporter.close()
    return folder


def logged(steps: range, **changes: float) -> dict[int, dict[str, float]]:
    return {step: metrics(step, 0.05) | changes for step in steps}


def metric(found: Comparison, name: str) -> MetricComparison:
    (one,) = (each for each in found.metrics if each.name == name)
    return one


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "one")


def test_equal_runs(run, tmp_path, capsys):
    other = shutil.copytree(run, tmp_path / "copy")
    assert main([str(run), str(other)]) == 0
    out = capsys.readouterr().out
    assert "A: one, up to step 60\nB: copy, up to step 60\n" in out
    assert "The runs are equal within a relative difference of 0." in out
    assert "| rollback " in out and "what differs" not in out
    assert metric(compare(run, other), "loss") == MetricComparison("loss", 30, None, None)


def test_the_first_and_the_largest_difference(tmp_path, capsys):
    a = write_rows(tmp_path / "a", {1: {"loss": 4.0}, 2: {"loss": 3.0}, 3: {"loss": 2.0}})
    b = write_rows(tmp_path / "b", {1: {"loss": 4.0}, 2: {"loss": 3.3}, 3: {"loss": 2.5}})
    found = metric(compare(a, b), "loss")
    assert (found.first.step, found.first.a, found.first.b) == (2, 3.0, 3.3)
    assert found.first.relative == pytest.approx(0.3 / 3.3)
    assert found.largest == Difference(3, 2.0, 2.5, 0.2)
    assert compare(a, b, tolerance=0.1).first_step == 3
    assert main([str(a), str(b)]) == 1
    assert "Step 2 is the first that differs, in loss." in capsys.readouterr().out
    assert main([str(a), str(b), "--tolerance", "0.2"]) == 0
    assert compare(a, b, tolerance=0.2).metrics[0].largest == Difference(3, 2.0, 2.5, 0.2)


@pytest.mark.parametrize("name", ["eval_loss", "grad_norm", "learning_rate", "consumed_tokens"])
def test_each_metric_counts(tmp_path, name):
    a = write_rows(tmp_path / "a", {1: {"loss": 4.0}, 2: {"loss": 3.0, name: 8.0}})
    b = write_rows(tmp_path / "b", {1: {"loss": 4.0}, 2: {"loss": 3.0, name: 8.1}})
    found = compare(a, b)
    assert found.first_step == 2
    assert [each.name for each in found.metrics if each.first] == [name]


def test_speed_and_memory_do_not_count(tmp_path):
    a = write_rows(tmp_path / "a", logged(range(1, 4)))
    b = write_rows(tmp_path / "b", logged(range(1, 4), mfu=0.1, peak_memory_gib=9.0))
    assert compare(a, b).first_step is None


def test_parts_are_shown_where_they_differ(tmp_path):
    a = write_rows(tmp_path / "a", logged(range(1, 4)))
    b = write_rows(tmp_path / "b", logged(range(1, 4), **{"loss/code": 7.0}))
    names = [each.name for each in compare(a, b).metrics]
    assert "loss/code" in names and "loss/books" not in names


@pytest.mark.parametrize(
    ("values", "relative"),
    [((math.nan, math.nan), None), ((math.nan, 3.0), math.inf), ((3.0, math.inf), math.inf)],
)
def test_values_that_are_not_finite(tmp_path, values, relative, capsys):
    a, b = (
        write_rows(tmp_path / name, {1: {"loss": 4.0}, 2: {"loss": value}})
        for name, value in zip("ab", values)
    )
    first = metric(compare(a, b, tolerance=1.0), "loss").first
    assert (first.relative if first else None) == relative
    assert main([str(a), str(b), "--json"]) == (0 if relative is None else 1)
    assert "NaN" not in capsys.readouterr().out  # which strict JSON has not


def test_means_over_other_steps_are_not_compared(tmp_path):
    """A logs every step and B every second one; gradient norms are of a single step."""
    a = write_rows(tmp_path / "a", {n: {"loss": 9.0 - n, "grad_norm": 1.0} for n in range(1, 5)})
    b = write_rows(tmp_path / "b", {n: {"loss": 9.5 - n, "grad_norm": 1.0} for n in (2, 4)})
    found = compare(a, b)
    assert found.first_step is None
    assert (metric(found, "loss").compared, metric(found, "grad_norm").compared) == (0, 2)


def test_a_shorter_run_is_compared_as_far_as_it_goes(tmp_path):
    a = write_rows(tmp_path / "a", logged(range(1, 9)))
    b = write_rows(tmp_path / "b", logged(range(1, 5)))
    found = compare(a, b)
    assert found.last_steps == (8, 4) and found.first_step is None
    assert metric(found, "loss").compared == 4


def test_settings_and_environment_that_differ(run, tmp_path):
    other = write_run(tmp_path / "two", learning_rate=3e-4)
    assert [each.name for each in compare(run, other).settings] == ["learning_rate"]
    info = json.loads((other / "run_info.json").read_text(encoding="utf-8"))
    info["environment"]["Paddle"] = "3.4.0"
    (other / "run_info.json").write_text(json.dumps(info), encoding="utf-8")
    (version,) = (each for each in compare(run, other).settings if "Paddle" in each.name)
    assert (version.name, version.a, version.b) == ("environment: Paddle", "3.3.1", "3.4.0")


def test_events_up_to_the_first_difference(tmp_path):
    """A rollback to step 3 explains a difference at step 3; an event of step 5 does not."""
    a = write_rows(tmp_path / "a", logged(range(1, 9)))
    rows = logged(range(1, 9))
    rows[3]["loss"] += 1.0
    b = write_rows(tmp_path / "b", rows)
    record(a, "resumed", step=2, checkpoint="checkpoint-2")
    record(b, "rollback", step=9, to_step=3, reason="a spike")
    record(b, "global_batch_changed", step=5, before=8, after=16)
    record(b, "restart", step=None, exit_code=137)
    found = [(each.run, each.step, each.event) for each in compare(a, b).events]
    assert found == [("b", None, "restart"), ("a", 2, "resumed"), ("b", 3, "rollback")]


def test_json(run, tmp_path, capsys):
    other = write_run(tmp_path / "two", rate=0.04, learning_rate=3e-4)
    assert main([str(run), str(other), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["names"] == ["one", "two"] and found["first_step"] == 2
    loss = found["metrics"][0]
    assert loss["name"] == "loss" and loss["first"]["step"] == 2
    assert loss["first"]["a"] == metrics(2, 0.05)["loss"]
    assert found["settings"][0]["name"] == "learning_rate" and found["settings"][0]["b"] == 3e-4


def test_folders_that_cannot_be_compared(run, tmp_path, capsys):
    short = write_rows(tmp_path / "short", {1: {"loss": 4.0}})
    with pytest.raises(UserError, match=r"have no step of metrics\.jsonl in common: their last"):
        compare(run, short)
    assert main([str(run), str(tmp_path / "none")]) == 2
    assert f"error: {tmp_path / 'none'} is no folder" in capsys.readouterr().err
    assert main([str(run), str(run), "--tolerance", "nan"]) == 2
    assert "--tolerance is nan; expected 0 or more" in capsys.readouterr().err
    damaged = shutil.copytree(run, tmp_path / "damaged")
    (damaged / LEDGER_FILE).write_text('{"event": "rollback"}\n', encoding="utf-8")
    assert main([str(run), str(damaged)]) == 2
    assert "ledger.jsonl is not what was written" in capsys.readouterr().err
