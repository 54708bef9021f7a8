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
from planned_memory import (
    GRANULARITIES,
    LAYOUTS,
    LENGTHS,
    SIZES,
    TOLERANCE,
    case_of,
    error,
    peaks,
)
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


@pytest.mark.slow
@pytest.mark.parametrize("granularity", ["", "full"])
def test_memory_of_a_token_is_the_same_at_every_context_degree(granularity: str) -> None:
    """docs/parallelism.md, "Memory": the tokens of a rank count, not those of the sample."""
    found = {}
    for layout in ("1", "sep2", "ring2", "ring4"):
        degrees = LAYOUTS[layout].degrees
        cases = [case_of("llama", layout, granularity, f"{tokens} tokens") for tokens in LENGTHS]
        ranks = run_ranks(WORKER, degrees.world_size, [json.dumps(cases)], timeout=300)
        measured = [peaks(ranks, number) for number in range(len(cases))]
        assert all(
            abs(error(case, each)) < TOLERANCE for case, each in zip(cases, measured, strict=True)
        )
        shorter, longer = (max(each.values()) for each in measured[-2:])
        found[layout] = (longer - shorter) / (LENGTHS[-1] - LENGTHS[-2]) * degrees.context
    print(found)
    alone = found["1"]
    # Without a context axis norm and attention are one operator, which does not keep the norm.
    assert found["ring2"] == pytest.approx(alone, rel=0.06)
    assert found["ring4"] == pytest.approx(found["ring2"], rel=0.02)
    assert found["sep2"] == pytest.approx(alone, rel=0.1)  # it keeps what it has exchanged
