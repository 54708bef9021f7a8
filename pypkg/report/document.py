"""What the page of a run shows, as one typed document.

The page receives it as JSON, where None stands for NaN and infinite numbers.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Curve:
    """A metric over the steps of a run.

    Attributes:
        name: name of the metric in metrics.jsonl, such as "loss" or "eval_loss/books".
        chart: title of the chart that shows it.
        unit: unit of the values; empty for plain numbers.
        steps, tokens, values: one entry per point. Tokens are those consumed up to the step, None
            if the run did not log them.
        points: number of points in metrics.jsonl; ``values`` may have fewer.
    """

    name: str
    chart: str
    unit: str
    steps: list[int]
    tokens: list[float | None]
    values: list[float]
    points: int


@dataclass(frozen=True)
class Mark:
    """An event of the ledger, or a checkpoint, at its place on the curves.

    Attributes:
        kind: kind of the event, such as "rollback"; "checkpoint" for a checkpoint.
        step, tokens: None if the event belongs to no step.
        time: UTC, ISO 8601; empty if unknown.
        text: the other fields of the event, as readable text.
    """

    kind: str
    step: int | None
    tokens: float | None
    time: str
    text: str


@dataclass(frozen=True)
class SettingRow:
    """A setting as the run had it, as text, and its default."""

    name: str
    value: str
    default: str
    is_changed: bool


@dataclass(frozen=True)
class CheckpointRow:
    """A checkpoint folder.

    Attributes:
        num_bytes: size of all files that its manifest lists; None without a manifest.
        saved: time of writing, UTC, ISO 8601.
        verdict: "whole", "damaged", "a whole part", or why it cannot be verified.
        damage: one sentence for each fault.
    """

    name: str
    step: int | None
    tokens: int | None
    num_bytes: int | None
    saved: str
    layout: str
    verdict: str
    damage: list[str]


@dataclass(frozen=True)
class Sample:
    """What the model wrote after ``prompt`` when it had trained ``step`` steps."""

    step: int
    prompt: str
    text: str


@dataclass(frozen=True)
class PlanRow:
    """A planned quantity of the first rank beside the measured one.

    Attributes:
        terms: parts of the plan, largest first, in ``terms_unit``.
    """

    quantity: str
    unit: str
    planned: float
    measured: float | None
    terms: dict[str, float]
    terms_unit: str


@dataclass(frozen=True)
class Stage:
    """A pipeline stage: its layers as text, and its ranks by replica and tensor-parallel shard."""

    title: str
    replicas: list[list[int]]


@dataclass(frozen=True)
class Layout:
    """How the ranks of a run divide the work.

    Attributes:
        text: the axes with more than one rank.
        replicas: title of each row of ranks: the data-parallel and sharding coordinates.
        hosts: host of each rank; empty for one process.
    """

    text: str
    world_size: int
    replicas: list[str]
    stages: list[Stage]
    hosts: list[str]


@dataclass(frozen=True)
class Run:
    """A run, as read from its output_dir.

    Attributes:
        name: unique among the runs of a document.
        step: number of completed steps.
        max_steps: None if the run saved no settings.
        ended: whether the run wrote a summary of its last step.
        updated: when metrics.jsonl was last written, UTC, ISO 8601.
        figures: headline figures as text, by title.
        problems: what could not be read, one sentence each.
    """

    name: str
    folder: str
    step: int
    max_steps: int | None
    ended: bool
    updated: str
    figures: dict[str, str]
    curves: list[Curve]
    marks: list[Mark]
    settings: list[SettingRow]
    environment: dict[str, str]
    layout: Layout | None
    checkpoints: list[CheckpointRow]
    samples: list[Sample]
    plan: list[PlanRow]
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Document:
    """Everything on a page. ``is_live``: the page polls a server for newer documents."""

    version: str
    created: str
    is_live: bool
    runs: list[Run]

    def to_json(self) -> str:
        """The document as strict JSON."""
        return json.dumps(finite(dataclasses.asdict(self)), allow_nan=False)


def finite(value: Any) -> Any:
    """``value`` of dicts, lists and scalars, with None for each number that is not finite."""
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, list):
        return [finite(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
