"""docs/scale.md shows what docs/scale.json and models give; scale_page.py renews it."""

from __future__ import annotations

import pytest
from scale_page import PAGE, QUANTITIES, RUNS, in_ring, renewed, units


def test_the_page_is_present():
    page = PAGE.read_text(encoding="utf-8")
    assert renewed(page) == page
    assert page.count("| save: total ") == 2  # the figures and their models


def test_every_unit_cost_says_how_it_was_found():
    for entry in units():
        assert set(entry) == {"name", "value", "unit", "how", "date", "machine"}
        assert entry["how"] and entry["machine"]


def test_bytes_of_a_checkpoint_and_of_stage_3():
    """By hand: 176,247 M parameters of 14 bytes; matrices are gathered twice and reduced once."""
    bloom, llama = RUNS[2], RUNS[1]
    assert bloom.checkpoint == pytest.approx(2.467e12, rel=1e-3)
    n = llama.parameters / 2  # tensor degree 2
    after, before = llama.sent()["sharding"], llama.sent(as_before=True)["sharding"]
    assert after == pytest.approx(16 * 3 * 2 * n * 31 / 32, rel=1e-3)
    assert before == pytest.approx(4 / 3 * after, rel=1e-3)


def test_ranks_hold_the_model_and_stage_3_draws_slices():
    for run in RUNS:
        degrees = run.layout.degrees
        assert degrees.world_size == run.gpus
        assert degrees.tensor * degrees.pipeline * run.largest == pytest.approx(
            run.parameters, rel=0.06
        )
    assert RUNS[1].drawn == RUNS[1].largest / 32
    assert len({quantity.name for quantity in QUANTITIES}) == len(QUANTITIES)


@pytest.mark.parametrize(
    "operation, expected", [("all_reduce", 1.5), ("all_gather", 3), ("reduce_scatter", 0.75)]
)
def test_a_ring_of_four(operation, expected):
    assert in_ring(operation, 4) == expected
