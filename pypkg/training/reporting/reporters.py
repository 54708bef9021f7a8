"""What receives the metrics of a run; metrics.jsonl, which every run writes."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any, Protocol

from pypkg.errors import UserError
from pypkg.files import read_lines, write_file

METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples.jsonl"
SUMMARY_FILE = "summary.json"


class Reporter(Protocol):
    """Receives what a run logs, in the order of its steps."""

    def report(self, step: int, metrics: dict[str, float]) -> None:
        """The metrics of a logged step: floats by name; losses in nats per token."""

    def rewind(self, step: int) -> None:
        """The run has gone back to ``step``."""

    def close(self) -> None: ...


class JsonLinesReporter:
    """One JSON object a line: {"global_step": n, "loss": ..., ...}.

    Rows after ``last_step`` are dropped on opening: they belong to steps that a killed run took
    after its last checkpoint and that will be taken again. The file is replaced in one step, so a
    crash on opening loses no row.
    """

    def __init__(self, file: Path, last_step: int) -> None:
        self._open(file, last_step)

    def _open(self, file: Path, last_step: int) -> None:
        self._file = file
        rows = [row for row in read_metrics(file) if row["global_step"] <= last_step]
        try:
            write_file(file, "".join(map(_line, rows)).encode())
            self._stream = file.open("ab", buffering=0)
        except OSError as error:
            raise UserError(f"{file} cannot be written: {error.strerror}. {_ELSEWHERE}") from error

    def report(self, step: int, metrics: dict[str, float]) -> None:
        """
        Raises:
            UserError: the disk is full, or the file cannot be written.
        """
        line = _line({"global_step": step, **metrics}).encode()
        try:
            if self._stream.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            reason = "the disk is full" if error.errno == errno.ENOSPC else error.strerror
            raise UserError(
                f"{self._file} cannot be written: {reason}. Checkpoints are untouched. Free some "
                "space, then start the same command again."
            ) from error

    def rewind(self, step: int) -> None:
        self._stream.close()
        self._open(self._file, step)

    def close(self) -> None:
        self._stream.close()


def _line(row: dict[str, float]) -> str:
    return json.dumps(row) + "\n"


def read_metrics(file: Path) -> list[dict[str, float]]:
    """Rows of a metrics.jsonl; a last line cut short by a kill is left out.

    Raises:
        UserError: it cannot be read, or holds something else.
    """
    lines, _ = read_lines(file, _ELSEWHERE)
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not _is_row(row):
            raise UserError(
                f"line {number} of {file} is not one that this program writes: {line[:60]!r}; "
                f'expected an object of numbers with "global_step". {_ELSEWHERE}'
            )
        rows.append(row)
    return rows


_ELSEWHERE = "Move it away, or set output_dir to another folder."


def _is_row(row: Any) -> bool:
    return (
        isinstance(row, dict)
        and type(row.get("global_step")) is int
        and all(type(value) in (int, float) for value in row.values())
    )
