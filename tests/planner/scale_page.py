"""The tables of docs/scale.md, from the unit costs in docs/scale.json; as a script, renews them.

Each quantity of a large run is a count, which follows from the model and its layout, times a unit
cost, which is measured on a CPU machine or assumed. The tables of the page are made here.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO / "tests/distributed/testing"))

from traffic_formulas import Layout, expected  # noqa: E402  of the folder above

from pypkg.config import Settings  # noqa: E402
from pypkg.console.markdown import table  # noqa: E402
from pypkg.models.architecture.registry import load_config  # noqa: E402
from pypkg.planner.zero import owners  # noqa: E402
from pypkg.training.start.layout import degrees as degrees_of  # noqa: E402
from pypkg.training.start.start_up import load_run_settings  # noqa: E402

PAGE, UNITS = REPO / "docs/scale.md", REPO / "docs/scale.json"
CONFIG = "configs/pretrain/llama/pretrain-llama2_7b-tp2sd4_stage2.json"
GPUS_PER_MACHINE = 8
_WEIGHT, _STATE = 2, 12  # bytes of a parameter: bfloat16; float32 master weight and two moments

Units = Mapping[str, float]


@dataclass(frozen=True)
class Run:
    """A large run, and the counts that follow from it.

    Attributes:
        gpus: number of ranks.
        arguments: of ``pypkg pretrain`` beside ``CONFIG``.
    """

    name: str
    gpus: int
    arguments: str = ""

    @property
    def machines(self) -> int:
        return self.gpus // GPUS_PER_MACHINE

    @cached_property
    def settings(self) -> Settings:
        words = [str(REPO / CONFIG), *self.arguments.split(), "--continue_training", "false"]
        return load_run_settings(words, self.gpus, False)

    @cached_property
    def layout(self) -> Layout:
        settings = self.settings
        return Layout(
            degrees_of(settings, self.gpus),
            settings.sharding_stage,
            settings.reduces_once,
            settings.recompute,
            load_config(settings.model_name_or_path),
            settings.per_device_train_batch_size,
            settings.max_seq_length,
            _WEIGHT,
        )

    @property
    def micro_batches(self) -> int:
        return self.settings.gradient_accumulation_steps

    @property
    def parameters(self) -> int:
        """Of the model."""
        return self.layout.config.num_parameters()

    def held(self, stage: int = 0) -> int:
        """Parameters of a rank before ZeRO."""
        return sum(each.size for each in self.layout.parameters(stage))

    @cached_property
    def largest(self) -> int:
        """``held`` of the pipeline stage that holds most."""
        return max(map(self.held, range(self.layout.degrees.pipeline)))

    @property
    def layers(self) -> int:
        """Of the pipeline stage that has most."""
        stages = range(self.layout.degrees.pipeline)
        return max(len(self.layout.chunk(stage).layers) for stage in stages)

    @property
    def drawn(self) -> float:
        """Parameters that a rank draws at start."""
        is_sliced = self.layout.sharding_stage == 3
        return self.largest / (self.layout.degrees.sharding if is_sliced else 1)

    @property
    def checkpoint(self) -> int:
        """Bytes."""
        return self.parameters * (_WEIGHT + _STATE)

    @property
    def read(self) -> float:
        """Bytes that the ranks of a machine read on resumption: what they hold."""
        z = self.layout.degrees.sharding
        return GPUS_PER_MACHINE * (self.drawn * _WEIGHT + self.largest * _STATE / z)

    def sent(self, as_before: bool = False) -> dict[str, float]:
        """Bytes that a rank sends in a step, by group, on the pipeline stage that sends most."""
        stages = range(self.layout.degrees.pipeline)
        found = (self._sent_on(stage, as_before) for stage in stages)
        return max(found, key=lambda groups: sum(groups.values()))

    def _sent_on(self, stage: int, as_before: bool) -> dict[str, float]:
        layout = self.layout
        degrees, shapes = layout.degrees, layout.parameters(stage)
        owner = owners(shapes, degrees.sharding, layout.sharding_stage == 1)
        owned: list[list[int]] = [[] for _ in range(degrees.sharding)]
        for shape, rank in zip(shapes, owner, strict=True):
            owned[rank].append(shape.size)
        ranks = {
            "tensor": degrees.tensor, "pipeline": degrees.pipeline, "data": degrees.data,
            "sharding": degrees.sharding, "world": self.gpus,
        }  # fmt: skip
        found: dict[str, float] = {}
        sent = expected(layout, stage, 0, self.micro_batches, owned)
        for what, (_, _, size) in sent.items():
            group, operation = what.split()
            if as_before and operation == "reduce_scatter" and group == "sharding":
                operation = "all_reduce"
            found[group] = found.get(group, 0) + size * in_ring(operation, ranks[group])
        return found


def in_ring(operation: str, ranks: int) -> float:
    """Bytes that a rank sends for each byte that it hands over (docs/parallelism.md)."""
    k = ranks
    part = (k - 1) / k
    return {
        "all_reduce": 2 * part, "reduce": part, "broadcast": part, "reduce_scatter": part,
        "all_gather": k - 1, "send": 1, "recv": 0,
    }[operation]  # fmt: skip


RUNS = (
    Run("7B on 8", 8),
    Run(
        "70B on 64",
        64,
        "--model_name_or_path meta-llama/Llama-2-70b --sharding stage3 --sequence_parallel true "
        "--per_device_train_batch_size 1 --gradient_accumulation_steps 16",
    ),
    Run(
        "176B on 384",
        384,
        "--model_name_or_path bigscience/bloom --max_seq_length 2048 --tensor_parallel_degree 4 "
        "--sequence_parallel true --pipeline_parallel_degree 4 --sharding stage1 "
        "--per_device_train_batch_size 1 --gradient_accumulation_steps 128",
    ),
)


@dataclass(frozen=True)
class Quantity:
    """A row of the table.

    Attributes:
        model: how the unit cost is extended, in words.
        after, before: the value of a run; 0: there was no such step.
    """

    name: str
    unit: str
    model: str
    after: Callable[[Run, Units], float]
    before: Callable[[Run, Units], float]


QUANTITIES = (
    Quantity(
        "start: weights drawn", "s",
        "parameters that a rank draws x `draw`; before: those of the tensor-parallel group of its "
        "pipeline stage, on every rank",
        lambda run, cost: run.drawn / 1e8 * cost["draw"],
        lambda run, cost: run.largest * run.layout.degrees.tensor / 1e8 * cost["draw, before"],
    ),
    Quantity(
        "start: weights in memory", "GB a rank",
        "2 bytes for each parameter that a rank keeps; before: for each of the rank before ZeRO",
        lambda run, cost: run.drawn * _WEIGHT / 1e9,
        lambda run, cost: run.largest * _WEIGHT / 1e9,
    ),
    Quantity(
        "save: total", "s",
        "14 bytes for each parameter / `disk` / machines, as all ranks write at the disk's rate "
        "(`save`, at most 1); before: one writer",
        lambda run, cost: run.checkpoint / run.machines / (cost["disk"] * 1e9)
        / min(1.0, cost["save"]),
        lambda run, cost: run.checkpoint / (cost["disk"] * 1e9),
    ),
    Quantity(
        "save: training stands still", "s",
        "14 bytes for each parameter / machines x `stall`, with `use_async_save`; before: the "
        "whole save",
        lambda run, cost: run.checkpoint / run.machines / 1e9 * cost["stall"],
        lambda run, cost: run.checkpoint / (cost["disk"] * 1e9),
    ),
    Quantity(
        "resume: bytes read", "GB, all ranks",
        "what the ranks hold, x `read`; before: each rank reads the optimizer state of the model",
        lambda run, cost: run.machines * run.read * cost["read"] / 1e9,
        lambda run, cost: run.gpus * run.parameters * _STATE / 1e9,
    ),
    Quantity(
        "resume: reading", "s",
        "bytes that the ranks of a machine read / `load`, before and after",
        lambda run, cost: run.read * cost["read"] / 1e9 / cost["load"],
        lambda run, cost: GPUS_PER_MACHINE * run.parameters * _STATE / 1e9 / cost["load"],
    ),
    Quantity(
        "resume: comparing checksums", "s",
        "bytes of the checkpoint / ranks / `checksum`, or / machines / `disk` if that is longer; "
        "before: nothing was compared",
        lambda run, cost: (
            run.checkpoint
            / 1e9
            / min(run.gpus * cost["checksum"], run.machines * cost["disk"])
        ),
        lambda run, cost: 0.0,
    ),
    Quantity(
        "step: bytes sent", "GB a rank",
        "the formulas of docs/parallelism.md in a ring; before: stage 3 all-reduced gradients",
        lambda run, cost: sum(run.sent().values()) / 1e9,
        lambda run, cost: sum(run.sent(as_before=True).values()) / 1e9,
    ),
    Quantity(
        "step: host, forward and backward", "s",
        "layers of the largest stage x micro batches x `host`",
        lambda run, cost: run.layers * run.micro_batches * cost["host"] / 1e3,
        lambda run, cost: run.layers * run.micro_batches * cost["host, before"] / 1e3,
    ),
    Quantity(
        "step: host, update", "s",
        "layers of the largest stage x `update`",
        lambda run, cost: run.layers * cost["update"] / 1e3,
        lambda run, cost: run.layers * cost["update, before"] / 1e3,
    ),
)  # fmt: skip

_WHEN = ("before", "after")
_TABLE = re.compile(r"(<!-- (\w[\w ]*): begin -->\n).*?(<!-- \2: end -->)", re.S)


def units() -> list[dict[str, object]]:
    """The entries of docs/scale.json."""
    return json.loads(UNITS.read_text(encoding="utf-8"))


def renewed(page: str) -> str:
    """docs/scale.md with its tables as they should be."""
    entries = units()
    made = {
        "runs": _runs(),
        "figures": _figures({str(e["name"]): float(str(e["value"])) for e in entries}),
        "traffic": _traffic(),
        "unit costs": _unit_costs(entries),
        "models": _lines(["quantity", "model"], [[q.name, q.model] for q in QUANTITIES]),
    }
    return _TABLE.sub(lambda found: found[1] + made[found[2]] + "\n" + found[3], page)


def _lines(head: Sequence[str], rows: Sequence[Sequence[str]], text: int | None = None) -> str:
    return "\n".join(table(head, rows, text))


def _runs() -> str:
    rows = []
    for run in RUNS:
        degrees = run.layout.degrees
        layout = f"tensor {degrees.tensor}"
        if degrees.pipeline > 1:
            layout += f", pipeline {degrees.pipeline}"
        layout += f", sharding {degrees.sharding} (stage {run.layout.sharding_stage})"
        if degrees.sequence_parallel:
            layout += ", sequence parallel"
        rows.append([
            run.name, run.settings.model_name_or_path, f"{run.parameters / 1e6:,.0f}", layout,
            f"{run.micro_batches} x {run.layout.batch} x {run.layout.sequence}",
        ])  # fmt: skip
    head = ["run", "model", "M parameters", "layout", "micro batches of a rank"]
    return _lines(head, rows)


def _figures(cost: Units) -> str:
    head = ["quantity", "unit", *(f"{run.name}, {when}" for run in RUNS for when in _WHEN)]
    rows = []
    for quantity in QUANTITIES:
        values = [made(run, cost) for run in RUNS for made in (quantity.before, quantity.after)]
        rows.append([quantity.name, quantity.unit, *map(shown, values)])
    return _lines(head, rows, 2)


def shown(value: float) -> str:
    """With three digits, and a dash for nothing."""
    if value == 0:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _traffic() -> str:
    head = ["group", *(f"{run.name}, {when}" for run in RUNS for when in _WHEN)]
    sent = [run.sent(as_before) for run in RUNS for as_before in (True, False)]
    groups = [
        group for group in ("tensor", "pipeline", "sharding") if any(group in s for s in sent)
    ]
    rows = [[group, *(shown(each.get(group, 0) / 1e9) for each in sent)] for group in groups]
    return _lines(head, rows, 1)


def _unit_costs(entries: Sequence[Mapping[str, object]]) -> str:
    head = ["name", "value", "unit", "how", "date", "machine"]
    rows = [[f"`{each['name']}`", *(str(each[key]) for key in head[1:])] for each in entries]
    return _lines(head, rows)


def renew() -> None:
    """Rewrites the page."""
    PAGE.write_text(renewed(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    renew()
