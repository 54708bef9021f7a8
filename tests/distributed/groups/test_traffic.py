"""What a step sends is what docs/parallelism.md says, to the last element.

An operation that nobody asked for would fail this, as would one that sends more than it has to.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from distributed_testing import run_ranks
from traffic_formulas import LAYOUTS, expected

WORKER = Path(__file__).with_name("traffic_worker.py")


SLOW = {"stage 2, once"}  # tests/parallel/test_gradient_reducer.py counts its reductions as well


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in LAYOUTS],
)
def test_as_the_formulas_say(name):
    layout = LAYOUTS[name]
    for result in run_ranks(WORKER, layout.degrees.world_size, [name], timeout=120):
        ranks = result["pipeline_rank"], result["sharding_rank"]
        for count, found in result["counts"].items():
            assert found == expected(layout, *ranks, int(count), result["owned"])
