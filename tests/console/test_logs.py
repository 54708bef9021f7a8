"""Which ranks write which log lines, and that none of them ends a run."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest

from pypkg.console.logs import configure_logging


@pytest.fixture
def logger(monkeypatch: pytest.MonkeyPatch) -> logging.Logger:
    """The package's logger as a new process has it; restored after the test."""
    logger = logging.getLogger("pypkg")
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(logger, "propagate", logger.propagate)
    level = logger.level
    yield logger
    logger.setLevel(level)


@pytest.mark.parametrize(
    ("rank", "all_ranks", "expected"),
    [
        (0, None, ["information", "a warning"]),
        (1, None, ["a warning"]),
        (1, "0", ["a warning"]),
        (1, "1", ["information", "a warning"]),
    ],
)
def test_ranks_other_than_0_write_warnings_only(
    logger, monkeypatch, capsys, rank, all_ranks, expected
):
    if all_ranks is None:
        monkeypatch.delenv("PYPKG_LOG_ALL_RANKS", raising=False)
    else:
        monkeypatch.setenv("PYPKG_LOG_ALL_RANKS", all_ranks)
    configure_logging(rank)
    configure_logging(rank)  # a second call adds no second handler
    logger.info("information")
    logger.warning("a warning")
    written = capsys.readouterr().err.splitlines()
    assert [line.partition("] ")[2] for line in written] == expected


@pytest.mark.parametrize("output", ["full disk", "closed pipe"])
def test_lines_that_cannot_be_written_are_lost_and_nothing_else(output):
    script = (
        "import logging, sys; from pypkg.console.logs import configure_logging, say, show;"
        "configure_logging(); logging.getLogger('pypkg').info('a'); say('b'); show('c');"
        "logging.getLogger('pypkg').info('d'); sys.exit(143)"
    )
    if output == "full disk":
        writing = os.open("/dev/full", os.O_WRONLY)
    else:
        reading, writing = os.pipe()
        os.close(reading)
    done = subprocess.run([sys.executable, "-c", script], stdout=writing, stderr=writing)
    os.close(writing)
    assert done.returncode == 143
