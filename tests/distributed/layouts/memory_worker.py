"""One rank of test_planned_memory.py: the peak of allocated bytes in a step under a layout.

Arguments: JSON of a list of cases (see planner/planned_memory.py).
"""

from __future__ import annotations

import json
import sys
from itertools import groupby
from typing import Any

from distributed_testing import REPO, report
from paddle.distributed.fleet.base import topology

sys.path.insert(0, str(REPO / "tests" / "planner"))
sys.path.insert(0, str(REPO / "tests" / "models"))
from measured_memory import measure
from planned_memory import layout_of

from pypkg.parallel import mesh


def start(case: dict[str, Any]) -> None:
    degrees = layout_of(case).degrees
    if mesh.current().degrees != degrees:
        topology._HYBRID_PARALLEL_GROUP = None  # lets fleet make the groups of another mesh
        mesh.initialize(degrees)


def main(cases: list[dict[str, Any]]) -> None:
    results = []
    for _, alike in groupby(cases, key=lambda case: {**case, "granularity": ""}):
        group = list(alike)
        start(group[0])
        results += measure(group)
    current = mesh.current()
    report({"place": [current.pipeline_rank, current.tensor_rank], "results": results})


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
