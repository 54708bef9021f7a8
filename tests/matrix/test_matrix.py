"""A part of the capability matrix: every column and every model at least once, and combinations.

`make matrix` runs all of it.
"""

from __future__ import annotations

import json
from itertools import cycle

import pytest
from matrix_cells import COLUMNS, COMBINATIONS, LAYOUTS, MORE_ROWS, ROWS
from run_matrix import LIMITS, REPO, markdown, run_layout

# Rows and columns in turn: 12 columns for 19 models, then the combinations go on with the models.
_ALL_ROWS = [*ROWS, *MORE_ROWS]
_TURNS = cycle(_ALL_ROWS)
SAMPLE = {name: [next(_TURNS), next(_TURNS)] for name in COLUMNS}
SAMPLE |= {name: [next(_TURNS)] for name in COMBINATIONS}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("matrix")


def by_tier(layout: str):
    """Layouts of eight processes are slow."""
    is_slow = LAYOUTS[layout].degrees.world_size > 4
    return pytest.param(layout, marks=pytest.mark.slow if is_slow else ())


@pytest.mark.parametrize("layout", [by_tier(name) for name in LAYOUTS])
def test_same_as_one_process(folder, layout):
    for row, cell in run_layout(layout, SAMPLE[layout], folder).items():
        assert cell["passed"], (row, cell)


def test_sample_has_every_row_and_column():
    assert set(SAMPLE) == set(LAYOUTS)
    assert {row for name in COLUMNS for row in SAMPLE[name]} == set(_ALL_ROWS)


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
