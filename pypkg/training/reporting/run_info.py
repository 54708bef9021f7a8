"""run_info.json in output_dir: the last start of a run, for programs that describe the run.

The first rank writes it before the first step. Checkpoints
hold the settings as well, but a run has none of them at first.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from pypkg.errors import UserError
from pypkg.files import write_file
from pypkg.files.json_files import read_json

RUN_INFO_FILE = "run_info.json"
_FORMAT = 1


@dataclass(frozen=True)
class RunInfo:
    """A start of a run.

    Attributes:
        settings: all of them, by name.
        model: type, sizes and number of parameters, by name.
        layout: ``mesh.Degrees`` by name.
        hosts: of each rank; empty for a single process.
        environment: versions, host, device, by name.
        plan: of the first rank: peak_bytes, memory_terms (bytes), and where the time is planned
            tokens_per_second_per_device and step_terms (seconds); None without a plan.
        started: UTC, ISO 8601.
    """

    settings: dict[str, Any]
    model: dict[str, Any]
    layout: dict[str, Any]
    hosts: list[str]
    environment: dict[str, str]
    plan: dict[str, Any] | None
    started: str = ""


def write_run_info(output_dir: Path, info: RunInfo) -> None:
    """Replaces run_info.json in one step; the time is now.

    Raises:
        UserError: the file cannot be written.
    """
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    content = {"format": _FORMAT, **dataclasses.asdict(dataclasses.replace(info, started=now))}
    write_file(output_dir / RUN_INFO_FILE, (json.dumps(content, indent=2) + "\n").encode())


def read_run_info(output_dir: Path) -> RunInfo | None:
    """The last start of the run; None where an earlier version has run.

    Raises:
        UserError: the file cannot be read, or another version has written it.
    """
    path = output_dir / RUN_INFO_FILE
    if not path.exists():
        return None
    content = read_json(path)
    if content.pop("format", None) != _FORMAT:
        raise UserError(
            f"{path} is not of format {_FORMAT}; use the version of pypkg that wrote it"
        )
    try:
        info = RunInfo(**content)
    except TypeError as error:
        raise UserError(f"{path} is not what this version writes: {error}") from error
    for field in dataclasses.fields(RunInfo):
        value, kind = getattr(info, field.name), _KINDS[field.name]
        if not isinstance(value, kind):
            raise UserError(f"{path} has {field.name} {value!r:.40}, which no run writes")
    return info


_KINDS: dict[str, Any] = {
    "settings": dict,
    "model": dict,
    "layout": dict,
    "hosts": list,
    "environment": dict,
    "plan": (dict, type(None)),
    "started": str,
}
