"""Time and traffic of each rank, measured by step, and a table of all ranks.

The time of a step covers fetching its micro batches, the forward and backward passes and the
update. It excludes logging, evaluation and checkpoints. It is divided into

- data: the wait for micro batches;
- stages: the wait for other pipeline stages (messages and the bubble) until the last of them has
  finished its backward pass;
- communication: every other collective, including the wait for other ranks of its group;
- compute: the rest.

A second table shows the host and device time of each phase (``phase_times.py``).
"""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import paddle
import paddle.distributed as dist
from paddle import Tensor

from pypkg.console.logs import show
from pypkg.data import Batch
from pypkg.parallel import mesh
from pypkg.parallel.comm.collective import is_first_rank
from pypkg.parallel.comm.traffic import GROUPS, Traffic
from pypkg.training.feed.data_source import DataSource
from pypkg.training.reporting.metrics import peak_memory_bytes
from pypkg.training.step.engine import Engine
from pypkg.training.step.phase_times import (
    FORWARD_BACKWARD,
    SAMPLES,
    UPDATE,
    PhaseTimes,
    finish,
)


@dataclass
class Times:
    """Sums over ``steps`` steps of one rank: seconds, tokens of all ranks, bytes sent by group."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    data: float = 0.0
    stages: float = 0.0
    communication: float = 0.0
    sent: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    phases: PhaseTimes = field(default_factory=PhaseTimes)
    peak_memory: int = 0  # bytes, at the end

    @property
    def compute(self) -> float:
        return self.seconds - self.data - self.stages - self.communication


class MeasuredEngine(Engine):
    """An Engine that measures its steps. Either all ranks of a run have one, or none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._traffic = Traffic()
        self._first, self._rest = Times(), Times()

    @property
    def _times(self) -> Times:
        return self._rest if self._first.steps else self._first

    @property
    def times(self) -> Times:
        """The sums of this rank, without the first step (a warm-up) if there are others."""
        times = self._rest if self._rest.steps else self._first
        times.peak_memory = peak_memory_bytes()
        return times

    def timed(self, data: DataSource) -> DataSource:
        """``data``, with the wait for training batches added to the time of the next step."""
        return _TimedData(data, self._add_wait)

    def _add_wait(self, seconds: float) -> None:
        self._times.data += seconds
        self._times.seconds += seconds
        self._times.phases.add(SAMPLES, seconds)

    def forward_backward(self, micro_batches: Sequence[Batch]) -> Tensor | None:
        with self._measuring(FORWARD_BACKWARD):
            loss = super().forward_backward(micro_batches)
        self._wait_for_stages()
        shards = mesh.current().sample_shards
        self._times.tokens += shards * sum(batch["input_ids"].size for batch in micro_batches)
        return loss

    def update(self, learning_rate: float) -> Tensor:
        with self._measuring(UPDATE):
            norm = super().update(learning_rate)
        self._times.steps += 1
        return norm

    def _wait_for_stages(self) -> None:
        """Waits until all stages have finished, so the wait does not count for the update."""
        group = mesh.current().pipeline
        if group is not None:
            start = time.perf_counter()
            dist.all_reduce(paddle.zeros([1]), group=group)
            finish()
            seconds = time.perf_counter() - start
            self._times.stages += seconds
            self._times.seconds += seconds

    @contextlib.contextmanager
    def _measuring(self, phase: str) -> Iterator[None]:
        """Adds the block's time and traffic."""
        times = self._times
        start = time.perf_counter()
        with self._traffic.counting(), times.phases.measuring(phase):
            yield
        times.seconds += time.perf_counter() - start
        stages = self._traffic.total("pipeline", "recv").seconds
        stages += self._traffic.total("pipeline", "broadcast").seconds  # of the loss
        times.stages += stages
        times.communication += self._traffic.total().seconds - stages
        for group in GROUPS:
            times.sent[group] += self._traffic.total(group).bytes
        self._traffic.clear()


class _TimedData:
    """A data source that reports the wait for each training batch."""

    def __init__(self, data: DataSource, waited: Callable[[float], None]) -> None:
        self._data, self._waited = data, waited
        self.sources = data.sources

    def train_batches(self, start: int) -> Iterator[Batch]:
        iterator = self._data.train_batches(start)
        while True:
            begin = time.perf_counter()
            batch = next(iterator, None)
            seconds = time.perf_counter() - begin
            if batch is None:
                return
            self._waited(seconds)
            yield batch

    def eval_batches(self, split: str = "valid") -> Iterator[Batch]:
        return self._data.eval_batches(split)


def print_rank_times(times: Times) -> None:
    """Prints the table of all ranks on rank 0. Every rank must call this, with its own times."""
    if not times.steps:
        return
    ranks = [times]
    if mesh.current().world_size > 1:
        ranks = []
        dist.all_gather_object(ranks, times)
    if is_first_rank():
        show(table(ranks))
        show(phase_table(ranks))


def table(ranks: Sequence[Times]) -> str:
    """A table with a line for each of ``ranks``; tokens/s are those of the run per rank.

    Columns for stages and groups without a value on any rank are omitted.
    """
    sent = [group for group in GROUPS if any(times.sent.get(group) for times in ranks)]
    parts = ["compute", "communication", "data"]
    if any(times.stages for times in ranks):
        parts.append("stages")
    rows = [["rank", "peak memory", "tokens/s", "step", *parts, *sent]]
    for rank, times in enumerate(ranks):
        steps = max(times.steps, 1)
        speed = times.tokens / len(ranks) / max(times.seconds, 1e-9)
        seconds = [getattr(times, part) / steps for part in ("seconds", *parts)]
        rows.append(
            [
                str(rank),
                f"{times.peak_memory / 2**30:.2f} GiB",
                f"{speed:,.0f}",
                *(f"{value:.4f} s" for value in seconds),
                *(_bytes(times.sent.get(group, 0) / steps) for group in sent),
            ]
        )
    title = f"ranks: seconds of a step, mean of {ranks[0].steps}"
    if sent:
        title += f", and what a rank sends in it to its group ({', '.join(sent)})"
    return _aligned(title, rows)


def phase_table(ranks: Sequence[Times]) -> str:
    """A table with a line for each of ``ranks``: seconds of each phase of a step, mean.

    Device times are shown on GPUs only.
    """
    phases = [name for name in (SAMPLES, FORWARD_BACKWARD, UPDATE) if name in ranks[0].phases.host]
    of_device = any(times.phases.device for times in ranks)
    head = ["rank"]
    for name in phases:
        is_timed = of_device and name in ranks[0].phases.device
        head += [f"{name}, host", f"{name}, device"] if is_timed else [name]
    rows = [head]
    for rank, times in enumerate(ranks):
        row = [str(rank)]
        for name in phases:
            found = [times.phases.host[name]]
            found += [times.phases.device[name]] if name in times.phases.device else []
            row += [f"{seconds / max(times.steps, 1):.4f} s" for seconds in found]
        rows.append(row)
    title = f"phases: seconds of a step, mean of {ranks[0].steps}"
    if of_device:
        title += "; host: until the calls return, device: between events on its stream"
    return _aligned(title, rows)


def _aligned(title: str, rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
             for row in rows]  # fmt: skip
    return "\n".join([title, *(f"  {line}" for line in lines)])


def _bytes(number: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.4g} {unit}"
        number /= 1024
    return f"{number:.4g} GiB"
