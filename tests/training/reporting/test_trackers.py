"""What trackers receive of a run, and that none of their failures stops it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pypkg.errors import UserError
from pypkg.training.reporting.trackers import TrackedRun, make_reporters

METRICS = {"loss": 2.5, "eval_loss": 1.5}
FACTS = {"settings": {"seed": 3}}
TRACKERS = ("visualdl", "tensorboard", "wandb", "swanlab")
PACKAGES = {"tensorboard": "tensorboardX"}  # where they have another name


class Fake:
    """Stands for the package of any of the trackers; notes what it is called with."""

    def __init__(self, fails_at: str = "") -> None:
        self.calls: list[tuple[str, Any]] = []
        self._fails_at = fails_at
        self.LogWriter = self.SummaryWriter = self.init
        self.finish = self.close

    def _note(self, name: str, given: Any) -> None:
        if name == self._fails_at:
            raise ConnectionError("no network")
        self.calls.append((name, given))

    def init(self, **given: Any) -> Fake:
        self._note("init", given)
        return self

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self._note("log", (tag, value, step))

    def log(self, metrics: dict[str, float], step: int | None = None) -> None:
        self._note("log", metrics if step is None else (metrics, step))

    def define_metric(self, name: str, **given: str) -> None:
        self._note("define_metric", (name, given))

    def close(self) -> None:
        self._note("close", None)

    def given(self, name: str) -> list[Any]:
        return [given for called, given in self.calls if called == name]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Fake]:
    for name in ("WANDB_PROJECT", "WANDB_RUN_ID", "SWANLAB_PROJECT", "SWANLAB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)

    def put(tracker: str, fails_at: str = "") -> Fake:
        fake = Fake(fails_at)
        monkeypatch.setitem(sys.modules, PACKAGES.get(tracker, tracker), fake)
        return fake

    return put


def tracked(folder: Path, last_step: int = 0) -> TrackedRun:
    return TrackedRun(folder / "runs", "a name", last_step, FACTS)


def train(name: str, folder: Path, last_step: int = 0) -> None:
    reporters = make_reporters([name], folder, tracked(folder, last_step))
    for reporter in reporters:
        reporter.report(3, METRICS)
        reporter.rewind(2)
        reporter.report(3, METRICS)
        reporter.close()


def rows(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("name", "logged"),
    [
        ("visualdl", [("train/loss", 2.5, 3), ("train/eval_loss", 1.5, 3)]),
        ("tensorboard", [("train/loss", 2.5, 3), ("train/eval_loss", 1.5, 3)]),
        ("wandb", [{"global_step": 3, **METRICS}]),
        ("swanlab", [(METRICS, 3)]),
    ],
)
def test_every_metric_comes_to_each_tracker(tmp_path, install, name, logged):
    fake = install(name)
    train(name, tmp_path)
    assert fake.given("log") == logged * 2  # once more after the run has gone back
    assert fake.calls[-1] == ("close", None)
    assert rows(tmp_path) == [{"global_step": 3, **METRICS}]
    (start,) = fake.given("init")
    places = [str(tmp_path / "runs"), str(tmp_path / "runs" / "swanlog")]
    assert next(start[key] for key in ("logdir", "log_dir", "dir") if key in start) in places
    if name in ("wandb", "swanlab"):
        assert start["config"] == FACTS and start["project"] == "pypkg"
        assert start["name"] == "a name"


def test_wandb_has_an_axis_on_which_a_run_may_go_back(tmp_path, install):
    fake = install("wandb")
    train("wandb", tmp_path)
    assert ("*", {"step_metric": "global_step"}) in fake.given("define_metric")


@pytest.mark.parametrize("name", ["wandb", "swanlab"])
def test_a_run_stays_the_same_one_over_its_starts(tmp_path, install, name):
    fake = install(name)
    for last_step in (0, 5, 5, 0):  # the last one starts anew
        train(name, tmp_path, last_step)
    first, second, third, anew = (given["id"] for given in fake.given("init"))
    assert first == second == third != anew


@pytest.mark.parametrize("name", TRACKERS)
@pytest.mark.parametrize("moment", ["init", "log", "close"])
def test_a_tracker_that_fails_warns_once_and_the_run_goes_on(
    tmp_path, install, caplog, monkeypatch, name, moment
):
    monkeypatch.setattr("pypkg.training.reporting.trackers.logger.propagate", True)
    fake = install(name, fails_at=moment)
    with caplog.at_level("WARNING", logger="pypkg"):
        train(name, tmp_path)
    (record,) = caplog.records
    assert f"report_to {name} fails" in record.message
    assert "ConnectionError: no network" in record.message
    assert rows(tmp_path) == [{"global_step": 3, **METRICS}]
    assert bool(fake.given("log")) is (moment == "close")


@pytest.mark.parametrize("name", TRACKERS)
def test_a_package_that_is_missing_is_an_error(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, PACKAGES.get(name, name), None)
    with pytest.raises(UserError, match=rf'report_to is .{name}., .*\n?.*pip install "\.\[{name}'):
        make_reporters([name], tmp_path, tracked(tmp_path))


def test_keyboard_interrupt_is_no_failure_of_a_tracker(tmp_path, install):
    fake = install("swanlab")
    _, reporter = make_reporters(["swanlab"], tmp_path, tracked(tmp_path))

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    fake.log = interrupted
    with pytest.raises(KeyboardInterrupt):
        reporter.report(1, METRICS)


def test_the_extras_install_each_tracker():
    text = Path(__file__).resolve().parents[3].joinpath("pyproject.toml").read_text("utf-8")
    for name in TRACKERS:
        assert f'\n{name} = ["{PACKAGES.get(name, name)}>=' in text
