"""The ledger of a run: its events, one JSON object a line. Lines are appended and never changed.

``output_dir/ledger.jsonl`` covers all attempts of a run, across restarts. A line is::

    {"time": "2026-01-31T12:00:00+00:00", "event": "rollback", "step": 70, ..., "digest": "..."}

``time`` is UTC, ``step`` the number of completed steps, or null where there is none, ``digest`` the
checksum of the rest of the line, and the other fields depend on the event. A line is on the disk
before ``record`` returns.
"""

from __future__ import annotations

import logging
from collections import Counter
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from pypkg.errors import UserError
from pypkg.files import append_line, read_lines
from pypkg.files.checksums import SealError, read_sealed_line, sealed_line

logger = logging.getLogger("pypkg")

LEDGER_FILE = "ledger.jsonl"
OVERWRITTEN = "overwritten"  # the event that a new run replaces the one in the folder

Event = dict[str, Any]


def record(output_dir: str | Path, event: str, *, step: int | None = None, **fields: Any) -> Event:
    """Appends an event. One rank of a run calls this; other programs may append at the same time.

    An incomplete last line, which a crash has left, is removed first.

    Args:
        output_dir: output folder of the run; created if it is missing.
        event: kind of the event, such as "rollback".
        step: number of completed steps, or None.
        fields: JSON values.

    Returns:
        The event as it was written.

    Raises:
        UserError: the file cannot be written.
        ValueError: a field is NaN or infinite, which JSON cannot hold.
    """
    file = Path(output_dir, LEDGER_FILE)
    time = datetime.now(timezone.utc).isoformat(timespec="seconds")
    row = {"time": time, "event": event, "step": step, **fields}
    line = sealed_line(row)
    try:
        append_line(file, line)
    except OSError as error:
        raise UserError(
            f"{file} cannot be written: {error.strerror}. Free some space, or set output_dir to a "
            "folder you may write."
        ) from error
    return row


def events(output_dir: str | Path) -> list[Event]:
    """All events of a run, oldest first.

    A last line that a crash has cut short is left out, with a warning.

    Raises:
        UserError: the file cannot be read, or a line does not match its digest.
    """
    file = Path(output_dir, LEDGER_FILE)
    lines, torn = read_lines(file, _ELSEWHERE)
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(read_sealed_line(line))
        except SealError as error:
            raise UserError(
                f"line {number} of {file} is not what was written, {error}: {line[:60]!r}. "
                f"{_ELSEWHERE}"
            ) from error
    if torn:
        logger.warning("the last line of %s is cut short and left out: %.60r", file, torn)
    return rows


def current_events(output_dir: str | Path) -> list[Event]:
    """The events since overwrite_output_dir last started the run anew."""
    found = events(output_dir)
    starts = [number for number, event in enumerate(found) if event["event"] == OVERWRITTEN]
    return found[starts[-1] + 1 :] if starts else found


def counts(output_dir: str | Path) -> dict[str, int]:
    """The number of ``current_events`` by kind, and of skipped samples.

    Raises:
        UserError: as for ``events``.
    """
    found = current_events(output_dir)
    total = Counter(event["event"] for event in found)
    for event in found:
        if event["event"] == "skipped":
            first, stop = event["samples"]
            total["skipped_samples"] += stop - first
    return dict(sorted(total.items()))


_ELSEWHERE = "Move it away, or set output_dir to another folder."
