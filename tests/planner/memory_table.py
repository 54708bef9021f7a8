"""Compares planned memory with processes and rewrites the table of docs/planning.md.

python tests/planner/memory_table.py [LAYOUT ...]; by default all layouts, a minute each.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
sys.path.insert(0, str(Path(__file__).parents[1] / "distributed" / "testing"))
from distributed_testing import REPO, run_ranks
from planned_memory import GRANULARITIES, LAYOUTS, SIZES, case_of, errors, world_size
from tiny_configs import KEYS

from pypkg.console.markdown import table

PAGE = REPO / "docs" / "planning.md"
WORKER = REPO / "tests" / "distributed" / "layouts" / "memory_worker.py"
START, END = "<!-- memory table -->\n", "<!-- end of the memory table -->\n"


def cases_of(layout: str) -> list[dict]:
    """Every family under every granularity, at the sizes in turn."""
    sizes = list(SIZES)
    return [
        case_of(family, layout, granularity, sizes[(number + place) % len(sizes)])
        for number, family in enumerate(KEYS)
        for place, granularity in enumerate(GRANULARITIES)
    ]


def row(layout: str) -> list[str]:
    """The largest error under a layout for each granularity, in per cent."""
    cases = cases_of(layout)
    ranks = run_ranks(WORKER, world_size(layout), [json.dumps(cases)], timeout=600)
    found = list(zip(errors(cases, ranks), cases, strict=True))
    cells = [layout]
    for granularity in GRANULARITIES:
        under = [each for each in found if each[1]["granularity"] == granularity]
        error, case = max(under, key=lambda each: abs(each[0]))
        cells.append(f"{100 * error:+.2f} ({case['family']}, {case['size']})")
    return cells


def main(layouts: list[str]) -> None:
    measured = {layout: row(layout) for layout in layouts}
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(START)
    inside, after = rest.split(END)
    known = [[cell.strip() for cell in line.strip("| ").split("|")]
             for line in inside.splitlines() if line.startswith("|")]  # fmt: skip
    rows = {cells[0]: cells for cells in known} | measured
    head = ["layout", *(granularity or "none" for granularity in GRANULARITIES)]
    lines = table(head, [rows[layout] for layout in LAYOUTS if layout in rows])
    PAGE.write_text(f"{before}{START}\n" + "\n".join(lines) + f"\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:] or list(LAYOUTS))
