"""Reads the output_dir of runs into a ``Document``.

The run may still be in progress, and parts of an older or a damaged run may be missing. What cannot
be read is listed in ``Run.problems``; the rest is shown.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeVar

from pypkg import __version__
from pypkg.errors import UserError
from pypkg.files.json_files import read_json
from pypkg.report import parts
from pypkg.report.curves import TokensOfSteps, curves
from pypkg.report.document import CheckpointRow, Document, Run, Sample
from pypkg.report.layout import layout_of
from pypkg.report.settings import setting_rows
from pypkg.training.checkpoint.folders import SETTINGS_FILE, checkpoints
from pypkg.training.ledger import LEDGER_FILE, Event, current_events
from pypkg.training.reporting.reporters import METRICS_FILE, SUMMARY_FILE, read_metrics
from pypkg.training.reporting.run_info import RUN_INFO_FILE, RunInfo, read_run_info

_T = TypeVar("_T")
_FIGURES = {
    "loss": ("training loss", "{:.4f}"),
    "eval_loss": ("validation loss", "{:.4f}"),
    "tokens_per_second_per_device": ("tokens/s per rank", "{:,.0f}"),
    "mfu": ("MFU", "{:.1%}"),
    "peak_memory_gib": ("peak memory, GiB", "{:.2f}"),
    "consumed_tokens": ("tokens", "{:,.0f}"),
}


def collect(
    folders: Sequence[Path], *, points: int, checks: str = "sizes", is_live: bool = False
) -> Document:
    """The document of the runs in ``folders``, in this order.

    Args:
        points: maximum number of points of a curve.
        checks: how checkpoints are verified: "checksums" reads all files, "sizes" only compares
            their sizes.
        is_live: whether the page polls a server for newer documents.

    Raises:
        UserError: a folder holds no run.
    """
    names = unique_names(folders)
    runs = [_run(folder, name, points, checks) for folder, name in zip(folders, names)]
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return Document(__version__, now, is_live, runs)


def unique_names(folders: Sequence[Path]) -> list[str]:
    """The shortest suffixes of the paths that differ; equal paths are numbered."""
    paths = [folder.absolute().parts for folder in folders]
    for length in range(1, max(map(len, paths), default=0) + 1):
        names = ["/".join(path[-length:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{'/'.join(path)} ({number})" for number, path in enumerate(paths, start=1)]


def _run(folder: Path, name: str, points: int, checks: str) -> Run:
    check_is_run(folder)
    problems: list[str] = []

    def read(part: Callable[[], _T], otherwise: _T) -> _T:
        try:
            return part()
        except (UserError, OSError) as error:
            problems.append(str(error))
            return otherwise

    info = read(lambda: read_run_info(folder), None)
    rows: list[dict[str, float]] = read(lambda: read_metrics(folder / METRICS_FILE), [])
    tokens_at = TokensOfSteps(rows)
    found: list[CheckpointRow] = read(lambda: parts.checkpoint_rows(folder, checks), [])
    events: list[Event] = read(lambda: current_events(folder), [])
    settings: Mapping[str, Any] = read(lambda: saved_settings(folder, info), {})
    summary: Mapping[str, Any] = read(lambda: _summary(folder), {})
    samples: list[Sample] = read(lambda: parts.samples(folder), [])
    layers = info.model.get("num_hidden_layers") if info else None
    step = max((int(row["global_step"]) for row in rows), default=0)
    metrics = folder / METRICS_FILE
    max_steps = settings.get("max_steps")
    return Run(
        name=name,
        folder=str(folder),
        step=step,
        max_steps=max_steps if isinstance(max_steps, int) else None,
        ended=bool(summary) and summary.get("global_step", -1) >= step,
        updated=parts.time_text(metrics.stat().st_mtime) if metrics.exists() else "",
        figures=_figures(rows),
        curves=curves(rows, points),
        marks=parts.marks(events, found, tokens_at),
        settings=setting_rows(settings),
        environment=_environment(info),
        layout=layout_of(info.layout, layers, info.hosts) if info else None,
        checkpoints=found,
        samples=[*samples, *parts.last_sample(summary, settings.get("sample_prompt"))],
        plan=parts.plan_rows(info.plan if info else None, rows),
        problems=problems,
    )


def check_is_run(folder: Path) -> None:
    """
    Raises:
        UserError: ``folder`` is no output_dir of a run.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; give the output_dir of a run")
    files = (METRICS_FILE, RUN_INFO_FILE, LEDGER_FILE)
    if not any((folder / each).is_file() for each in files) and not checkpoints(folder):
        raise UserError(
            f"{folder} holds no run: none of {', '.join(files)} and no checkpoint. Give the "
            "output_dir of a run."
        )


def saved_settings(folder: Path, info: RunInfo | None) -> Mapping[str, Any]:
    """The settings of the last start, or else of the newest checkpoint."""
    if info is not None:
        return info.settings
    found = [path / SETTINGS_FILE for _, path in checkpoints(folder)]
    files = [file for file in found if file.is_file()]
    return read_json(files[-1]) if files else {}


def _summary(folder: Path) -> Mapping[str, Any]:
    """The summary that the run wrote at its end; empty if it is in progress or was restarted."""
    file, start = folder / SUMMARY_FILE, folder / RUN_INFO_FILE
    if not file.is_file() or (start.is_file() and start.stat().st_mtime > file.stat().st_mtime):
        return {}
    return read_json(file)


def _environment(info: RunInfo | None) -> dict[str, str]:
    if info is None:
        return {}
    model = {f"model: {name}": _text(value) for name, value in info.model.items()}
    return {"started": info.started, **info.environment, **model}


def _text(value: Any) -> str:
    if type(value) is int:
        return f"{value:,}"
    return value if isinstance(value, str) else json.dumps(value)


def _figures(rows: Sequence[Mapping[str, float]]) -> dict[str, str]:
    """The last value of each headline metric, as text, by title."""
    found = {}
    for name, (title, form) in _FIGURES.items():
        values = [row[name] for row in rows if name in row]
        if values:
            found[title] = form.format(values[-1])
    return found
