"""docs/architecture.md names files that exist, and the rooms of the import rules."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from test_import_rules import ROOMS

REPO = Path(__file__).resolve().parents[2]
PAGE = (REPO / "docs" / "architecture.md").read_text(encoding="utf-8")
# Entry points and pages of a package, which are no rooms of their own in the table.
_LEFT_OUT = {"__main__", "docs_page"}


def test_every_file_that_the_page_names_is_there():
    named = set(re.findall(r"`((?:\w+/)*\w+\.py)`", PAGE))
    files = {"/" + file.relative_to(REPO).as_posix() for file in REPO.glob("pypkg/**/*.py")}
    files |= {"/" + file.relative_to(REPO).as_posix() for file in REPO.glob("tests/**/*.py")}
    files |= {"/" + file.relative_to(REPO).as_posix() for file in REPO.glob("tools/*.py")}
    assert len(named) > 40
    assert [each for each in named if not any(file.endswith("/" + each) for file in files)] == []


@pytest.mark.parametrize("package", sorted(ROOMS))
def test_the_rooms_of_the_page_are_those_of_the_rules(package):
    name = package.removeprefix("pypkg.")
    row = re.search(rf"^\| `{name}` \| (.+) \|$", PAGE.partition("## Rooms")[2], re.MULTILINE)
    assert row is not None, f"docs/architecture.md has no row of {name}"
    shown = re.findall(r"`(\w+)`", row.group(1))
    rooms = [room for room in ROOMS[package] if room not in _LEFT_OUT]
    if "the other operators" in row.group(1):
        rooms = [room for room in rooms if room in shown]
    assert shown == rooms
