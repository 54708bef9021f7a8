"""Planned memory against what CPU processes allocate, under each layout."""

from __future__ import annotations

import json
import sys
from itertools import cycle
from pathlib import Path

import pytest
from distributed_testing import REPO, run_ranks

sys.path.insert(0, str(REPO / "tests" / "planner"))
sys.path.insert(0, str(REPO / "tests" / "models"))
from planned_memory import GRANULARITIES, LAYOUTS, SIZES, TOLERANCE, case_of, error, peaks
from tiny_configs import KEYS

WORKER = Path(__file__).with_name("memory_worker.py")


@pytest.mark.slow
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "1"])
def test_the_plan_is_what_the_ranks_allocate(layout: str) -> None:
    """Each family under one granularity at one size. tests/planner compares all of them with the
    bytes that memory_table.py has measured."""
    choices = zip(KEYS, cycle(GRANULARITIES), cycle(SIZES), strict=False)
    cases = [case_of(family, layout, granularity, size) for family, granularity, size in choices]
    nproc = LAYOUTS[layout].degrees.world_size
    ranks = run_ranks(WORKER, nproc, [json.dumps(cases)], timeout=300)
    found = [(case, error(case, peaks(ranks, number))) for number, case in enumerate(cases)]
    assert not [(case, off) for case, off in found if abs(off) > TOLERANCE]
