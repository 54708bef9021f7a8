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
from planned_memory import GRANULARITIES, LAYOUTS, SIZES, TOLERANCE, case_of, errors, world_size
from tiny_configs import KEYS

WORKER = Path(__file__).with_name("memory_worker.py")


@pytest.mark.slow
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "1"])
def test_the_plan_is_what_the_ranks_allocate(layout: str) -> None:
    """Each family under one granularity; python tests/planner/memory_table.py runs all of them."""
    choices = zip(KEYS, cycle(GRANULARITIES), cycle(SIZES), strict=False)
    cases = [case_of(family, layout, granularity, size) for family, granularity, size in choices]
    found = errors(cases, run_ranks(WORKER, world_size(layout), [json.dumps(cases)], timeout=300))
    pairs = zip(cases, found, strict=True)
    assert not [(case, error) for case, error in pairs if abs(error) > TOLERANCE]
