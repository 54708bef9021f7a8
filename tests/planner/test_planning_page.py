"""docs/planning.md shows what its commands print; tests/planner/planning_page.py renews it."""

from __future__ import annotations

import pytest
from memory_table import with_table
from planning_page import PAGE, commands, renewed_table


def test_the_table_of_published_runs_is_present():
    page = PAGE.read_text(encoding="utf-8")
    assert renewed_table(page) == page
    assert page.count("| meta-llama/Llama-2-7b ") == 1


@pytest.mark.slow
def test_the_table_of_memory_is_present():
    page = PAGE.read_text(encoding="utf-8")
    assert with_table(page) == page


@pytest.mark.slow
def test_commands_print_what_the_page_shows():
    page = PAGE.read_text(encoding="utf-8")
    found = commands(page)
    assert len(found) == 6
    for arguments, output in found:
        assert output in page, arguments
