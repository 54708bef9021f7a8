"""Measures the memory of processes and rewrites the table of docs/planning.md.

python tests/planner/memory_table.py [LAYOUT:SIZE ...]; by default every layout at every size. One
launch measures all cells of a layout and size, or with ``--family`` those of one family: the groups
of ranks are made once, and a model serves all granularities of its family. ``--table`` measures
nothing. Measured bytes are in measured_memory.json, with which tests compare the plans of the
present code.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
sys.path.insert(0, str(Path(__file__).parents[1] / "distributed" / "testing"))
from distributed_testing import REPO, run_ranks
from planned_memory import LAYOUTS, RECORD, SIZES, error, grid, key_of, peaks
from tiny_configs import KEYS

from pypkg.console.markdown import table

PAGE = REPO / "docs" / "planning.md"
WORKER = REPO / "tests" / "distributed" / "layouts" / "memory_worker.py"
START, END = "<!-- memory table -->\n", "<!-- end of the memory table -->\n"


def measure(layout: str, size: str, family: str = "") -> None:
    """Adds the cells of a layout at one size to the record, of all families or of one."""
    cases = [case for case in grid([layout], [size]) if family in ("", case["family"])]
    nproc = LAYOUTS[layout].degrees.world_size
    ranks = run_ranks(WORKER, nproc, [json.dumps(cases)], timeout=3600)
    record = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}
    record |= {key_of(case): peaks(ranks, number) for number, case in enumerate(cases)}
    lines = [f"{json.dumps(key)}: {json.dumps(record[key])}" for key in sorted(record)]
    RECORD.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def with_table(page: str) -> str:
    """The page with the table as it should be."""
    before, rest = page.split(START)
    after = rest.split(END)[1]
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    rows = [[layout, *(_cell(layout, size, record) for size in SIZES)] for layout in LAYOUTS]
    lines = table(["layout", *SIZES], rows)
    return f"{before}{START}\n" + "\n".join(lines) + f"\n\n{END}{after}"


def _cell(layout: str, size: str, record: dict[str, dict[str, int]]) -> str:
    """The largest error of all families under all granularities, in per cent."""
    cases = grid([layout], [size])
    found = [(error(case, record[key_of(case)]), case) for case in cases if key_of(case) in record]
    if not found:
        return "not measured"
    largest, case = max(found, key=lambda each: abs(each[0]))
    shown = f"{100 * largest:+.2f} ({case['family']}, {case['granularity'] or 'none'})"
    return shown if len(found) == len(cases) else f"{shown}, {len(found)} of {len(cases)}"


def main() -> None:
    every = [":".join(pair) for pair in product(LAYOUTS, SIZES)]
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("cells", nargs="*", default=every, metavar="LAYOUT:SIZE")
    parser.add_argument("--family", default="", choices=list(KEYS), help="only this one")
    parser.add_argument("--table", action="store_true", help="measure nothing")
    options = parser.parse_args()
    if not options.table:
        for each in options.cells:
            start = time.monotonic()
            measure(*each.split(":"), options.family)
            print(f"{each}: {time.monotonic() - start:.0f} s", flush=True)
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
