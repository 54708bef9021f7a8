"""Measures planned memory in all cases and rewrites the table of docs/planning.md.

python tests/planner/memory_table.py; takes minutes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
sys.path.insert(0, str(Path(__file__).parents[1] / "distributed" / "testing"))
from distributed_testing import REPO, run_ranks
from planned_memory import GRANULARITIES, LAYOUTS, SIZES, case_of, errors, world_size
from pypkg.markdown import table
from tiny_configs import KEYS

PAGE = REPO / "docs" / "planning.md"
WORKER = REPO / "tests" / "distributed" / "layouts" / "memory_worker.py"
START, END = "<!-- memory table -->\n", "<!-- end of the memory table -->\n"


def row(layout: str) -> list[str]:
    """The largest error under a layout for each granularity, in per cent, and the cases' number."""
    cells = [layout]
    for granularity in GRANULARITIES:
        cases = [case_of(family, layout, granularity, size) for family in KEYS for size in SIZES]
        ranks = run_ranks(WORKER, world_size(layout), [json.dumps(cases)], timeout=600)
        found = zip(errors(cases, ranks), cases, strict=True)
        error, case = max(found, key=lambda each: abs(each[0]))
        cells.append(f"{100 * error:+.2f} ({case['family']}, {case['size']})")
        print(layout, granularity or "none", cells[-1], flush=True)
    return cells


def main() -> None:
    head = ["layout", *(granularity or "none" for granularity in GRANULARITIES)]
    lines = table(head, [row(layout) for layout in LAYOUTS])
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(START)
    after = rest.split(END)[1]
    PAGE.write_text(f"{before}{START}\n" + "\n".join(lines) + f"\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
