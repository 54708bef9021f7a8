"""The ledger: what is recorded stays, and a line that a crash cut short harms no other."""

from __future__ import annotations

import json
import math
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from pypkg.errors import UserError
from pypkg.training.ledger import (
    LEDGER_FILE,
    OVERWRITTEN,
    counts,
    current_events,
    events,
    record,
)


def test_what_is_recorded_is_read(tmp_path: Path) -> None:
    assert events(tmp_path / "out") == []
    first = record(tmp_path / "out", "rollback", step=7, checkpoint="checkpoint-4")
    second = record(tmp_path / "out", "restart", exit_code=137)
    assert events(tmp_path / "out") == [first, second]
    assert first.items() >= {"event": "rollback", "step": 7, "checkpoint": "checkpoint-4"}.items()
    assert second["step"] is None
    time = datetime.fromisoformat(first["time"])
    assert time.utcoffset() == timedelta(0)
    assert abs(datetime.now(timezone.utc) - time) < timedelta(hours=1)


@pytest.mark.parametrize("torn", ['{"time": "2026-', "x" * 10_000])
def test_a_line_cut_short_is_left_out_and_then_removed(tmp_path: Path, torn: str) -> None:
    first = record(tmp_path, "rollback", step=1)
    file = tmp_path / LEDGER_FILE
    file.write_text(file.read_text() + torn)
    assert events(tmp_path) == [first]
    second = record(tmp_path, "rollback", step=2)
    assert events(tmp_path) == [first, second]
    written = [json.loads(line) for line in file.read_text().splitlines()]
    assert [{k: v for k, v in row.items() if k != "digest"} for row in written] == [first, second]


def test_a_file_of_one_torn_line_is_an_empty_ledger(tmp_path: Path) -> None:
    (tmp_path / LEDGER_FILE).write_text('{"event"')
    assert events(tmp_path) == []
    assert events(tmp_path) == [] and [record(tmp_path, "a")] == events(tmp_path)


@pytest.mark.parametrize("line", ["{", "[]", '{"step": 1}', '{"event": "a", "step": "1"}', ""])
def test_a_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    record(tmp_path, "rollback", step=1)
    file = tmp_path / LEDGER_FILE
    file.write_text(f"{file.read_text()}{line}\n{file.read_text()}")
    with pytest.raises(UserError, match=rf"line 2 of .*{LEDGER_FILE}"):
        events(tmp_path)


def test_every_flipped_bit_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A digit of a rollback's samples would make it another run."""
    record(tmp_path, "rollback", step=70, samples=[100, 200])
    file = tmp_path / LEDGER_FILE
    data = file.read_bytes()
    for bit in range(8 * len(data)):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        file.write_bytes(changed)
        caplog.clear()
        try:
            events(tmp_path)
            assert "is cut short and left out" in caplog.text, bit
        except UserError as error:
            assert "of " + str(file) in str(error)


def test_what_json_cannot_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        record(tmp_path, "rollback", loss=math.nan)
    assert events(tmp_path) == []


def test_a_ledger_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / LEDGER_FILE).mkdir()
    with pytest.raises(UserError, match="cannot be written"):
        record(tmp_path, "rollback")


def test_what_counts_came_after_the_last_new_start(tmp_path: Path) -> None:
    for step in (1, 2):
        record(tmp_path, "skipped", step=step, samples=[10 * step, 10 * step + 4])
        record(tmp_path, OVERWRITTEN)
    kept = [
        record(tmp_path, "skipped", step=step, samples=[10 * step, 10 * step + 4])
        for step in (3, 4)
    ]
    assert current_events(tmp_path) == kept
    assert counts(tmp_path) == {"skipped": 2, "skipped_samples": 8}
