"""The parts of a run that are neither curves nor settings: checkpoints, events, samples, plan."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from pypkg.errors import UserError
from pypkg.files import read_lines
from pypkg.report.curves import TokensOfSteps
from pypkg.report.document import CheckpointRow, Mark, PlanRow, Sample
from pypkg.report.layout import layout_text
from pypkg.training.checkpoint.folders import DAMAGED_PREFIX, checkpoints, step_in_name
from pypkg.training.checkpoint.manifest import MANIFEST_FILE
from pypkg.training.checkpoint.verify import verify
from pypkg.training.ledger import Event
from pypkg.training.reporting.reporters import SAMPLES_FILE

_GIB = 2**30
_NOT_IN_TEXT = {"event", "step", "time", "digest"}  # shown separately, or of no use to a reader


def time_text(seconds: float) -> str:
    """A file time, in seconds since the epoch, as UTC in ISO 8601."""
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat(timespec="seconds")


def checkpoint_rows(output_dir: Path, checks: str) -> list[CheckpointRow]:
    """The checkpoints of a run, oldest first, then the damaged ones that it set aside.

    Args:
        checks: "checksums" reads every file, "sizes" only compares sizes.
    """
    folders = [folder for _, folder in checkpoints(output_dir)]
    folders += sorted(output_dir.glob(f"{DAMAGED_PREFIX}checkpoint-*"))
    return [row for folder in folders if (row := _checkpoint_row(folder, checks)) is not None]


def _checkpoint_row(folder: Path, checks: str) -> CheckpointRow | None:
    """The row of a checkpoint; None if the run removes the checkpoint meanwhile."""
    name, step = folder.name, step_in_name(folder)
    try:
        report = verify(folder, checks)
        marker = folder / MANIFEST_FILE
        saved = time_text((marker if marker.is_file() else folder).stat().st_mtime)
    except UserError as error:
        return CheckpointRow(name, step, None, None, "", "", "of a later version", [str(error)])
    except OSError:
        return None
    if not folder.exists():
        return None
    manifest = report.manifest
    if manifest is None:
        verdict = "damaged" if report.damage else "no manifest, cannot be verified"
        return CheckpointRow(name, step, None, None, saved, "", verdict, list(report.damage))
    verdict = "a whole part" if manifest.elsewhere else "whole"
    return CheckpointRow(
        name,
        manifest.step,
        manifest.consumed_tokens,
        sum(record.size for record in manifest.files.values()),
        saved,
        layout_text(manifest.layout),
        "damaged" if report.damage else verdict,
        list(report.damage),
    )


def marks(
    events: Sequence[Event], rows: Sequence[CheckpointRow], tokens_at: TokensOfSteps
) -> list[Mark]:
    """The events of the ledger and the checkpoints, in chronological order."""
    found = [
        _mark(event["event"], event["step"], event["time"], event_text(event), tokens_at)
        for event in events
    ]
    found += [
        _mark("checkpoint", row.step, row.saved, f"{row.name}, {row.verdict}", tokens_at)
        for row in rows
        if row.step is not None
    ]
    return sorted(found, key=lambda mark: mark.time)


def _mark(kind: str, step: int | None, time: str, text: str, tokens_at: TokensOfSteps) -> Mark:
    tokens = None if step is None else tokens_at([step])[0]
    return Mark(kind, step, tokens, time, text)


def event_text(event: Event) -> str:
    """The fields of an event as text; of two layouts, only the axes that differ."""
    fields = {name: value for name, value in event.items() if name not in _NOT_IN_TEXT}
    if isinstance(fields.get("layout"), dict):
        fields["layout"] = layout_text(fields["layout"])
    before, after = fields.get("before"), fields.get("after")
    if isinstance(before, dict) and isinstance(after, dict):
        fields["before"] = {key: each for key, each in before.items() if each != after.get(key)}
        fields["after"] = {key: each for key, each in after.items() if each != before.get(key)}
    return ", ".join(f"{name} {_value_text(value)}" for name, value in fields.items())


def _value_text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_value_text(each)}" for key, each in value.items()) or "the same"
    return value if isinstance(value, str) else json.dumps(value)


def last_sample(summary: Mapping[str, Any], prompt: object) -> list[Sample]:
    """The text that the model wrote at the end of the run (sample_tokens), if it did."""
    text, step = summary.get("sample"), summary.get("global_step")
    if not isinstance(text, str) or not isinstance(step, int):
        return []
    start = prompt if isinstance(prompt, str) and text.startswith(prompt) else ""
    return [Sample(step, start, text.removeprefix(start))]


def samples(output_dir: Path) -> list[Sample]:
    """The texts that the model wrote during training (samples.jsonl), oldest first.

    Raises:
        UserError: the file cannot be read, or a line is not a sample.
    """
    file = output_dir / SAMPLES_FILE
    lines, _ = read_lines(file, "Move it away.")
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            found.append(Sample(int(row["step"]), str(row["prompt"]), str(row["text"])))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(
                f"line {number} of {file} is not a sample: {line[:60]!r}; expected an object with "
                "step, prompt and text. Move the file away."
            ) from error
    return found


def plan_rows(plan: Mapping[str, Any] | None, rows: Sequence[Mapping[str, float]]) -> list[PlanRow]:
    """The planned memory and speed of the first rank beside those of ``rows`` of metrics.jsonl.

    The measured speed is the median over the log lines; the first is left out as a warm-up.
    """
    if plan is None:
        return []
    memory = [row["peak_memory_gib"] for row in rows if "peak_memory_gib" in row]
    speed = [each["tokens_per_second_per_device"] for each in rows
             if "tokens_per_second_per_device" in each]  # fmt: skip
    terms = {name: size / _GIB for name, size in _largest_first(plan["memory_terms"]).items()}
    measured = max(memory, default=None)
    found = [PlanRow("peak memory", "GiB", plan["peak_bytes"] / _GIB, measured, terms, "GiB")]
    if "tokens_per_second_per_device" in plan:
        found.append(
            PlanRow(
                "speed",
                "tokens/s per rank",
                plan["tokens_per_second_per_device"],
                statistics.median(speed[1:] or speed) if speed else None,
                _largest_first(plan["step_terms"]),
                "s",
            )
        )
    return found


def _largest_first(terms: Mapping[str, float]) -> dict[str, float]:
    return dict(sorted(terms.items(), key=lambda term: -term[1]))
