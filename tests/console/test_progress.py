"""Times of the phases of a start, and what long loops tell."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from pypkg.console import progress


class Clock:
    """Time that passes where a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    yield clock
    progress.end_start()
    progress.listen(None)


def test_phases_add_up_to_the_start(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "pypkg")
    progress.begin_start()
    clock.now += 1
    with progress.phase("outer"):
        clock.now += 2
        with progress.phase("inner"):
            clock.now += 4
        clock.now += 8
    with pytest.raises(OSError), progress.phase("inner"):
        clock.now += 16
        raise OSError
    assert progress.end_start() == {"inner": 20.0, "outer": 10.0, "other": 1.0}
    line = "start, 31.00 s to the end of the first step: inner 20.00 | outer 10.00 | other 1.00"
    assert caplog.messages == [line]
    assert progress.end_start() == {}  # it has ended
    with progress.phase("later"):
        clock.now += 1
    assert progress.end_start() == {} and len(caplog.messages) == 1


def test_a_long_loop_reports_each_item_and_logs_now_and_then(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "pypkg")
    reports: list[str] = []
    progress.listen(reports.append)
    passed = []
    for _, item in progress.through([(f"p{i}", i) for i in range(5)], "drawing"):
        passed.append(item)
        clock.now += 6
    assert passed == list(range(5)) and reports == [f"drawing p{i}" for i in range(5)]
    assert caplog.messages == [
        "drawing p1: 2 of 5 parameters",
        "drawing p3: 4 of 5 parameters",
    ]
