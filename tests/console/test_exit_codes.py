"""How commands end if standard output takes nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pypkg.console.command_line import exit_code

REPO = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(REPO)}
PLAN = ["plan", "--model_name_or_path", "llama-58m", "--gpus", "8", "--json"]


def run(arguments: list[str], output: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pypkg", *arguments],
        stdout=output, stderr=subprocess.PIPE, text=True, timeout=120, env=ENVIRONMENT,
    )  # fmt: skip


@pytest.mark.parametrize("arguments", [PLAN, ["config"], ["completion", "bash"]])
def test_a_reader_that_has_ended_is_no_error(arguments):
    """As of ``pypkg config | head``."""
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = run(arguments, writing)
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_output_that_does_not_fit_the_disk():
    with Path("/dev/full").open("w") as full:
        done = run(PLAN, full.fileno())
    assert done.returncode == 2
    assert done.stderr.startswith("error: standard output cannot be written: No space left")


def test_an_error_of_another_file_is_raised(capsys):
    def fails() -> int:
        raise OSError("of a socket")

    with pytest.raises(OSError, match="of a socket"):
        exit_code(fails, "interrupted")
    assert exit_code(lambda: 7, "interrupted") == 7
