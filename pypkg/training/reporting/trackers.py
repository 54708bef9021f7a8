"""Programs that track runs: VisualDL, TensorBoard, Weights & Biases, SwanLab.

Each is a ``Tracker``. One that fails, at its start or later, is left out with a warning, and the
run goes on. A new one is a class and a line in ``_TRACKERS``.
"""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from pypkg.errors import UserError
from pypkg.files import write_file
from pypkg.training.reporting.reporters import METRICS_FILE, JsonLinesReporter, Reporter

logger = logging.getLogger("pypkg")

_PROJECT = "pypkg"  # where WANDB_PROJECT or SWANLAB_PROJECT names none


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is told of a run.

    Attributes:
        folder: of the tracker's files.
        name: of the run, for people.
        last_step: completed steps of the run that goes on; 0 for a new one.
        facts: settings, model, layout and environment, for JSON.
    """

    folder: Path
    name: str
    last_step: int
    facts: dict[str, Any]


class Tracker(Protocol):
    """A program that shows metrics. Its methods may raise anything."""

    def add(self, step: int, metrics: dict[str, float]) -> None:
        """The metrics of a step, which comes again after a rollback."""

    def close(self) -> None:
        """Writes what is not written yet."""


class ScalarWriter:
    """VisualDL and TensorBoard, whose writers share ``add_scalar(tag, value, step)``."""

    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def add(self, step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(f"train/{name}", value, step)

    def close(self) -> None:
        self._writer.close()


def _visualdl(run: TrackedRun) -> Tracker:
    from visualdl import LogWriter

    return ScalarWriter(LogWriter(logdir=str(run.folder)))


def _tensorboard(run: TrackedRun) -> Tracker:
    from tensorboardX import SummaryWriter

    return ScalarWriter(SummaryWriter(logdir=str(run.folder)))


class WeightsAndBiases:
    """wandb. Its own variables decide where the run goes: WANDB_MODE, WANDB_PROJECT and others."""

    def __init__(self, run: TrackedRun) -> None:
        import wandb

        run.folder.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            dir=str(run.folder),
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            name=run.name,
            id=os.environ.get("WANDB_RUN_ID") or _lasting_id(run, "wandb"),
            resume="allow",
            config=run.facts,
        )
        # wandb's own step only grows. With an axis of ours a run may go back.
        self._run.define_metric("global_step")
        self._run.define_metric("*", step_metric="global_step")

    def add(self, step: int, metrics: dict[str, float]) -> None:
        self._run.log({"global_step": step, **metrics})

    def close(self) -> None:
        self._run.finish()


class SwanLab:
    """swanlab. Its own variables decide where the run goes: SWANLAB_MODE, SWANLAB_PROJECT.

    It keeps the first value of a step that comes again.
    """

    def __init__(self, run: TrackedRun) -> None:
        import swanlab

        self._module = swanlab
        run.folder.mkdir(parents=True, exist_ok=True)
        swanlab.init(
            log_dir=str(run.folder / "swanlog"),
            project=os.environ.get("SWANLAB_PROJECT", _PROJECT),
            name=run.name,
            id=os.environ.get("SWANLAB_RUN_ID") or _lasting_id(run, "swanlab"),
            resume="allow",
            config=run.facts,
        )

    def add(self, step: int, metrics: dict[str, float]) -> None:
        self._module.log(metrics, step=step)

    def close(self) -> None:
        self._module.finish()


_TRACKERS: dict[str, Callable[[TrackedRun], Tracker]] = {
    "visualdl": _visualdl,
    "tensorboard": _tensorboard,
    "wandb": WeightsAndBiases,
    "swanlab": SwanLab,
}


def _lasting_id(run: TrackedRun, tracker: str) -> str:
    """The same id for all starts of a run in its folder; a new one where a run starts anew."""
    file = run.folder / f"{tracker}_run_id"
    if run.last_step > 0 and file.is_file():
        return file.read_text(encoding="utf-8").strip()
    name = secrets.token_hex(8)
    write_file(file, f"{name}\n".encode())
    return name


class TrackerReporter:
    """A tracker as a reporter: its first failure is a warning, and it receives nothing after it."""

    def __init__(self, name: str, start: Callable[[], Tracker]) -> None:
        """
        Raises:
            UserError: the tracker's package is not installed.
        """
        self._name = name
        self._tracker: Tracker | None = None
        try:
            self._tracker = start()
        except ImportError as error:
            raise UserError(
                f"report_to is {name!r}, but its package is not installed ({error}). Type: "
                f'pip install ".[{name}]", or set report_to to "none".'
            ) from error
        except Exception as error:
            self._fail(error)

    def report(self, step: int, metrics: dict[str, float]) -> None:
        self._call(lambda tracker: tracker.add(step, metrics))

    def rewind(self, step: int) -> None:
        """Nothing: trackers only grow."""

    def close(self) -> None:
        self._call(lambda tracker: tracker.close())
        self._tracker = None

    def _call(self, of: Callable[[Tracker], None]) -> None:
        if self._tracker is None:
            return
        try:
            of(self._tracker)
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        self._tracker = None
        logger.warning(
            "report_to %s fails and receives nothing from here on: %s: %s. The run goes on, and %s "
            "has all metrics",
            *(self._name, type(error).__name__, error, METRICS_FILE),
        )


def make_reporters(report_to: Sequence[str], output_dir: Path, run: TrackedRun) -> list[Reporter]:
    """metrics.jsonl in ``output_dir``, and the trackers named in ``report_to``.

    Raises:
        UserError: a tracker's package is not installed, or metrics.jsonl cannot be written.
        ValueError: ``report_to`` names an unknown tracker.
    """
    if unknown := set(report_to) - _TRACKERS.keys():
        raise ValueError(f"report_to {unknown} has no tracker")
    reporters: list[Reporter] = [JsonLinesReporter(output_dir / METRICS_FILE, run.last_step)]
    for name in report_to:
        reporters.append(TrackerReporter(name, partial(_TRACKERS[name], run)))
    return reporters
