"""The real packages of the trackers, without a network: what is in their files afterwards.

`pip install ".[trackers]"` installs them; .ci/run does.
"""

from __future__ import annotations

import json
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pypkg.training.reporting.trackers import TrackedRun, TrackerReporter, make_reporters

pytestmark = pytest.mark.slow

FACTS = {"settings": {"seed": 3, "learning_rate": 3e-4}}
STEPS = {1: {"loss": 2.5, "loss/books": 1.0}, 3: {"loss": 2.0}}
EXPECTED = [{"global_step": step, **metrics} for step, metrics in STEPS.items()]


def train(name: str, folder: Path, caplog: pytest.LogCaptureFixture) -> Path:
    """Reports STEPS to a tracker and returns the folder of its files."""
    run = TrackedRun(folder / "runs", "a name", 0, FACTS)
    with caplog.at_level("WARNING"):
        for reporter in make_reporters([name], folder, run):
            for step, metrics in STEPS.items():
                reporter.report(step, metrics)
            reporter.close()
    assert [each.message for each in caplog.records if "report_to" in each.message] == []
    return run.folder


def only(folder: Path, pattern: str) -> Path:
    (found,) = folder.rglob(pattern)
    return found


def log_records(file: Path) -> Iterator[bytes]:
    """Records of a file of wandb or swanlab: LevelDB's log format after 7 bytes of their own.

    https://github.com/google/leveldb/blob/main/doc/log_format.md
    """
    data, position, record = file.read_bytes(), 7, b""
    while position + 7 <= len(data):
        left = 2**15 - position % 2**15
        if left < 7:  # a header does not cross the end of a block
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        position += 7 + length
        if position > len(data):  # it is being written
            return
        record += data[position - length : position]
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("SWANLAB_MODE", "offline")
    monkeypatch.setattr("pypkg.training.reporting.trackers.logger.propagate", True)
    for name in ("WANDB_RUN_ID", "SWANLAB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)


def test_visualdl(tmp_path, caplog):
    visualdl = pytest.importorskip("visualdl")
    file = only(train("visualdl", tmp_path, caplog), "vdlrecords.*.log")
    points = visualdl.LogReader(file_path=str(file)).get_data("scalar", "train/loss")
    assert [(point.id, point.value) for point in points] == [(1, 2.5), (3, 2.0)]


def test_tensorboard(tmp_path, caplog):
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    data = only(train("tensorboard", tmp_path, caplog), "events.out.*").read_bytes()
    found, position = [], 0
    while position < len(data):  # TFRecord: length, its sum, the event, its sum
        (length,) = struct.unpack_from("<Q", data, position)
        event = event_pb2.Event.FromString(data[position + 12 : position + 12 + length])
        position += length + 16
        found += [(event.step, each.tag, each.simple_value) for each in event.summary.value]
    assert found == [
        (1, "train/loss", 2.5), (1, "train/loss/books", 1.0), (3, "train/loss", 2.0)
    ]  # fmt: skip


def test_wandb(tmp_path, caplog):
    pytest.importorskip("wandb")
    file, deadline = only(train("wandb", tmp_path, caplog), "run-*.wandb"), time.monotonic() + 60
    while (found := wandb_contents(file))[0] != EXPECTED and time.monotonic() < deadline:
        time.sleep(0.1)  # another process of wandb writes the file, also after the end of the run
    rows, settings = found
    assert rows == EXPECTED
    assert json.loads(settings["settings"]) == FACTS["settings"]


def wandb_contents(file: Path) -> tuple[list[dict[str, float]], dict[str, str]]:
    """The rows of metrics, and the configuration as JSON by name."""
    from wandb.proto import wandb_internal_pb2

    rows, settings = [], {}
    for data in log_records(file):
        record = wandb_internal_pb2.Record.FromString(data)
        settings |= {each.key: each.value_json for each in record.run.config.update}
        items = {
            "/".join([item.key, *item.nested_key]).strip("/"): json.loads(item.value_json)
            for item in record.history.item
        }
        if items:
            rows.append({name: value for name, value in items.items() if name[0] != "_"})
    return rows, settings


def test_swanlab(tmp_path, caplog):
    pytest.importorskip("swanlab")
    from swanlab.proto.swanlab.record.v1 import record_pb2

    folder = train("swanlab", tmp_path, caplog)
    records = map(record_pb2.Record.FromString, log_records(only(folder, "run-*.swanlab")))
    found = [(each.scalar.key, each.scalar.step, each.scalar.value.number)
             for each in records if each.WhichOneof("record_type") == "scalar"]  # fmt: skip
    assert found == [("loss", 1, 2.5), ("loss/books", 1, 1.0), ("loss", 3, 2.0)]
    assert "learning_rate" in only(folder, "config.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("visualdl", "visualdl"), ("tensorboard", "tensorboardX"), ("wandb", "wandb"),
        ("swanlab", "swanlab"),
    ],
)  # fmt: skip
def test_each_package_takes_texts(tmp_path, caplog, name, package):
    pytest.importorskip(package)
    run = TrackedRun(tmp_path / "runs", "a name", 0, FACTS)
    with caplog.at_level("WARNING"):
        _, reporter = make_reporters([name], tmp_path, run)
        assert isinstance(reporter, TrackerReporter)
        reporter.report_texts(3, [("once", "upon a time")])
        reporter.close()
    assert [each.message for each in caplog.records if "report_to" in each.message] == []
    files = [file for file in run.folder.rglob("*") if file.is_file()]
    assert any(b"upon a time" in file.read_bytes() for file in files)


def test_wandb_that_does_not_start_warns_and_the_run_goes_on(tmp_path, caplog, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_API_KEY", "too short")  # refused before it tries to reach a server
    sys.modules["wandb"].teardown()  # it reads the environment once in a process
    run = TrackedRun(tmp_path / "runs", "a name", 0, FACTS)
    with caplog.at_level("WARNING", logger="pypkg"):
        for reporter in make_reporters(["wandb"], tmp_path, run):
            reporter.report(1, STEPS[1])
            reporter.close()
    assert any("report_to wandb fails" in each.message for each in caplog.records)
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"global_step": 1, **STEPS[1]}
