"""Runs the capability matrix and writes docs/capability_matrix.{json,md}: make matrix

A cell that was not run, or did not pass, cannot show a tick.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed" / "testing"))
sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
from distributed_testing import REPO, run_ranks
from matrix_cells import COLUMNS, COMBINATIONS, CONTEXT, LAYOUTS, MORE_ROWS, ROWS

from pypkg.console.markdown import table

WORKER = Path(__file__).with_name("matrix_worker.py")
ALL_ROWS = [*ROWS, *MORE_ROWS]
LIMITS = {"loss_diff": 1e-5, "grad_norm_diff": 1e-4, "parameter_diff": 1e-5}
SECONDS_PER_ROW = 60  # and rank, at most

Cell = dict[str, Any]
Cells = dict[str, dict[str, Cell]]


@dataclass(frozen=True)
class Conditions:
    """Where cells run and what they have to meet."""

    dtype: str = "float32"
    limits: Mapping[str, float] = field(default_factory=lambda: LIMITS)
    environment: Callable[[int], Mapping[str, str]] = lambda rank: {}  # of each rank
    fork: bool = True  # the ranks; not where they use GPUs


def run_layout(
    name: str, rows: list[str], folder: Path, conditions: Conditions = Conditions()
) -> dict[str, Cell]:
    """The cells of one column: every row's differences and whether it passed."""
    arguments = [folder, f"reference:{name}", conditions.dtype, *rows]
    timeout = 60 + SECONDS_PER_ROW * len(rows)
    run_ranks(WORKER, 1, arguments, timeout, conditions.environment, conditions.fork)
    try:
        return _launch(name, rows, folder, conditions)
    except AssertionError as error:
        if len(rows) == 1:
            return {rows[0]: {"passed": False, "error": str(error)[-2000:]}}
    # One row took the others with it: each by itself.
    return {row: _launch_alone(name, row, folder, conditions) for row in rows}


def _launch_alone(name: str, row: str, folder: Path, conditions: Conditions) -> Cell:
    try:
        return _launch(name, [row], folder, conditions)[row]
    except AssertionError as error:
        return {"passed": False, "error": str(error)[-2000:]}


def _launch(name: str, rows: list[str], folder: Path, conditions: Conditions) -> dict[str, Cell]:
    processes = LAYOUTS[name].degrees.world_size
    arguments = [folder, name, conditions.dtype, *rows]
    timeout = 60 + SECONDS_PER_ROW * len(rows) * processes / 4
    first, *_ = run_ranks(
        WORKER, processes, arguments, timeout, conditions.environment, conditions.fork
    )
    limits = conditions.limits.items()
    return {
        row: {"passed": all(cell[key] < limit for key, limit in limits), **cell}
        for row, cell in first.items()
    }


def markdown(result: dict[str, Any]) -> str:
    """The page: a table of ticks, one of the largest differences, and what it cannot prove."""
    cells = result["cells"]
    lines = [
        "# Capability matrix",
        "",
        "Every tick is a run: five optimizer steps of a tiny model of the row's kind, on CPU",
        "processes that talk over gloo, from the same weights and the same global batch as one",
        "process, with clipping at work. The samples differ in their number of labels, from none",
        "to all, so a layout has to divide by the global number. It is given where losses agree",
        f"within {LIMITS['loss_diff']:g} (relative), gradient norms within",
        f"{LIMITS['grad_norm_diff']:g}",
        f"and final parameters, gathered, within {LIMITS['parameter_diff']:g} of the largest",
        "element of each. Written by `make matrix`; the differences of each cell are in",
        "[capability_matrix.json](capability_matrix.json).",
        "",
        f"{result['environment']}, {result['date']}, {result['minutes']:.0f} minutes.",
        "",
        *_table(cells, ALL_ROWS, list(COLUMNS)),
        "",
        "## Combinations",
        "",
        *_table(cells, ALL_ROWS, list(COMBINATIONS)),
        "",
        "## Context axis",
        "",
        *_table(cells, ALL_ROWS, list(CONTEXT)),
        "",
        "## Largest differences of each column",
        "",
        *_worst(cells),
        "",
        _NOT_PROVEN,
    ]
    return "\n".join(lines)


_NOT_PROVEN = """## What CPU processes cannot prove
- The 16-bit arithmetic of GPUs. These cells are in float32.
  `tests/distributed/optimizer/test_half.py` trains in bfloat16 and float16 with operators that
  compute in float32: master weights, main gradients and loss scaling beside 16-bit parameters.
- The CUDA kernels inside Paddle, and fleet's own GPU operators for tensor parallelism, in whose
  place the gloo adapter puts CPU ones (`pypkg/parallel/gloo/mpu.py`).
- The order and overlap of NCCL's operations: messages over gloo are buffered, which can hide a
  deadlock.
- Several machines.

`make gpu-smoke` runs the same cells on the GPUs of a machine with paddlepaddle-gpu, in bfloat16
and with wider limits, and writes a report. No GPU has run it yet.
"""


def _table(cells: Cells, rows: list[str], columns: list[str]) -> list[str]:
    marks = [[row, *(_mark(cells.get(row, {}).get(each)) for each in columns)] for row in rows]
    return table(["model", *columns], marks, padded=False)


def _worst(cells: Cells) -> list[str]:
    rows = []
    for name, layout in LAYOUTS.items():
        found = [row[name] for row in cells.values() if "loss_diff" in row.get(name, {})]
        if found:
            worst = (f"{max(cell[key] for cell in found):.1e}" for key in LIMITS)
            rows.append([name, str(layout.degrees.world_size), *worst])
    head = ["column", "processes", "loss", "gradient norm", "parameter"]
    return table(head, rows, text_columns=1, padded=False)


def _mark(cell: dict[str, Any] | None) -> str:
    return "not run" if cell is None else "✓" if cell["passed"] else "failed"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", nargs="+", default=ALL_ROWS, metavar="ROW")
    parser.add_argument("--columns", nargs="+", default=list(LAYOUTS), metavar="COLUMN")
    parser.add_argument("--output", type=Path, default=REPO / "docs", help="folder of the pages")
    parser.add_argument(
        "--add", action="store_true", help="keep the other cells of the pages, and their minutes"
    )
    options = parser.parse_args()
    start, cells = time.time(), {}
    with tempfile.TemporaryDirectory() as folder:
        for name in options.columns:
            for row, cell in run_layout(name, options.rows, Path(folder)).items():
                cells.setdefault(row, {})[name] = cell
                if not cell["passed"]:
                    print(f"failed: {row}, {name}: {json.dumps(cell, indent=2)}", flush=True)
            passed = sum(cells[row][name]["passed"] for row in options.rows)
            minutes = (time.time() - start) / 60
            print(f"{minutes:5.1f} min  {name}: {passed} of {len(options.rows)}", flush=True)
    file, minutes = options.output / "capability_matrix.json", (time.time() - start) / 60
    if options.add:
        earlier = json.loads(file.read_text())
        minutes += earlier["minutes"]
        cells = {row: earlier["cells"].get(row, {}) | cells.get(row, {}) for row in ALL_ROWS}
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "minutes": minutes,
        "environment": _environment(),
        "limits": LIMITS,
        "cells": cells,
    }
    file.write_text(json.dumps(result, indent=2) + "\n")
    (options.output / "capability_matrix.md").write_text(markdown(result), encoding="utf-8")
    return 0 if all(cell["passed"] for row in cells.values() for cell in row.values()) else 1


def _environment() -> str:
    import paddle

    return f"Paddle {paddle.__version__}, Python {platform.python_version()}"


if __name__ == "__main__":
    sys.exit(main())
