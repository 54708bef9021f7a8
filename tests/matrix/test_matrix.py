"""A part of the capability matrix: every column and every model at least once, and combinations.

`make matrix` runs all of it.
"""

from __future__ import annotations

import json
from itertools import cycle, islice

import pytest
from matrix_cells import COLUMNS, LAYOUTS, MORE_ROWS, ROWS
from run_matrix import LIMITS, REPO, markdown, run_layout

_ALL_ROWS = [*ROWS, *MORE_ROWS]
# Of up to four processes; every such layout and every row is quick once.
_SMALL = [name for name, layout in LAYOUTS.items() if layout.degrees.world_size <= 4]
_LARGE = [name for name in LAYOUTS if name not in _SMALL]
_NUMBER = max(len(_SMALL), len(_ALL_ROWS))
QUICK = list(islice(zip(cycle(_SMALL), cycle(_ALL_ROWS)), _NUMBER))
# Each column with a second row, five rows further on.
SLOW = list(zip([*COLUMNS, *_LARGE], islice(cycle(_ALL_ROWS), 5, None)))
SAMPLE = [*QUICK, *(pytest.param(*cell, marks=pytest.mark.slow) for cell in SLOW)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("matrix")


@pytest.mark.parametrize(("layout", "row"), SAMPLE)
def test_same_as_one_process(folder, layout, row):
    cell = run_layout(layout, [row], folder)[row]
    assert cell["passed"], cell


def test_sample_has_every_row_and_column():
    assert {row for _, row in QUICK} == set(_ALL_ROWS)
    assert {name for name, _ in QUICK} == set(_SMALL)
    assert {name for name, _ in SLOW} == {*COLUMNS, *_LARGE}
    assert not set(QUICK) & set(SLOW)


def test_only_a_passing_run_gets_a_tick():
    passing = dict.fromkeys(LIMITS, 0.0) | {"passed": True}
    failing = dict.fromkeys(LIMITS, 1.0) | {"passed": False}
    cells = {"GPT3": {"data parallel": passing, "tensor parallel": failing}}
    page = markdown(
        {"cells": cells, "environment": "here", "date": "today", "minutes": 1.0}
    ).splitlines()
    row = next(line for line in page if line.startswith("| GPT3"))
    assert row.split(" | ")[1:4] == ["✓", "failed", "not run"]


def test_the_page_is_that_of_the_cells():
    """The committed page shows the committed cells, none typed by hand."""
    result = json.loads((REPO / "docs" / "capability_matrix.json").read_text())
    assert (REPO / "docs" / "capability_matrix.md").read_text() == markdown(result)
    for row in ROWS:
        for column in COLUMNS:
            cell = result["cells"][row][column]
            assert cell["passed"] == all(cell[key] < limit for key, limit in LIMITS.items())
