"""What the page of a run shows, as one typed document.

The page receives it as JSON. A number that is NaN or infinite is None there, since JSON has no such
numbers.
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
        name: of the metric in metrics.jsonl, such as "loss" or "eval_loss/books".
        chart: title of the chart that shows it.
        unit: of the values; empty for plain numbers.
        steps, tokens, values: of each point; tokens are those consumed up to the step, None where
            the run does not tell.
        points: number of points in metrics.jsonl, of which ``values`` may be a part.
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
        kind: of the event, such as "rollback"; "checkpoint" for a checkpoint.
        step, tokens: None where the event belongs to no step.
        time: in UTC, ISO 8601; empty where it is not known.
        text: the other fields of the event, for a person.
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
        num_bytes: of all files that its manifest lists; None without a manifest.
        saved: UTC, ISO 8601.
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
        hosts: of each rank, by rank; empty for one process.
    """

    text: str
    world_size: int
    replicas: list[str]
    stages: list[Stage]
    hosts: list[str]


@dataclass(frozen=True)
class Run:
    """A run as its output_dir tells it.

    Attributes:
        name: unique among the runs of a document.
        step: completed steps, of ``max_steps``, which is None where no settings were saved.
        ended: whether the run wrote a summary of its last step.
        updated: when metrics.jsonl was last written, UTC, ISO 8601.
        figures: the headline: name to text.
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
    """Everything on a page. ``is_live``: a server gives newer documents."""

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
