"""Recompute and dropout on CPU processes: same in both passes, with masks that fit the layout."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
from distributed_testing import run_ranks
from recompute_dropout_worker import LAYOUTS, PROBABILITY

WORKER = Path(__file__).with_name("recompute_dropout_worker.py")


@cache
def results(layout: str) -> list[dict[str, Any]]:
    """By rank."""
    return run_ranks(WORKER, LAYOUTS[layout].world_size, [layout], timeout=120)


@pytest.mark.parametrize("layout", ["one", "tensor", "sequence", "pipeline"])
def test_recompute_changes_nothing_bit_for_bit(layout):
    for result in results(layout):
        for family, of_family in result["models"].items():
            assert of_family["differing"] == [], family


@pytest.mark.parametrize("layout", ["tensor", "sequence", "pipeline"])
def test_without_dropout_losses_are_those_of_one_process(layout):
    for family, of_family in results("one")[0]["models"].items():
        for result in results(layout):
            loss = result["models"][family]["losses"]["0.0"]
            assert loss == pytest.approx(of_family["losses"]["0.0"], rel=1e-5)


def test_tensor_parallel_processes_drop_what_one_process_drops():
    for family, of_family in results("one")[0]["models"].items():
        alone = {kind: of_family[kind][str(PROBABILITY)] for kind in ("losses", "norms")}
        assert abs(alone["norms"] / of_family["norms"]["0.0"] - 1) > 5e-4  # it drops something
        for result in results("tensor"):
            for kind, value in alone.items():
                found = result["models"][family][kind][str(PROBABILITY)]
                assert found == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_masks_depend_on_seed_and_step_alone(layout):
    for result in results(layout):
        assert result["masks"] == result["again"]
        for kind, mask in result["masks"].items():
            assert 10 < mask.count("1") < 54
            assert mask not in (result["next"][kind], result["seed"][kind])


@pytest.mark.parametrize(
    ("layout", "kind", "agree"),
    [
        ("tensor", "whole", True),
        ("tensor", "split", True),  # nothing is split without sequence parallelism
        ("sequence", "whole", True),
        ("sequence", "split", False),
        ("data", "whole", False),
        ("sharding", "whole", False),
        ("context", "whole", False),
        ("pipeline", "whole", False),
    ],
)
def test_masks_agree_where_processes_hold_the_same(layout, kind, agree):
    first, second = (result["masks"][kind] for result in results(layout))
    assert (first == second) is agree
