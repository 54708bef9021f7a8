"""Pages of the root that the site shows (tools/site_pages.py) link only to pages of the site."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
_LINK = re.compile(r"\]\((?!https?:|#|mailto:)([^)#]+)")


def root_pages() -> list[str]:
    """The pages that ``make site`` adds, read without MkDocs, which tests do not need."""
    text = (REPO / "tools" / "site_pages.py").read_text(encoding="utf-8")
    return re.findall(r'^    "(\S+\.md)": ', text, re.MULTILINE)


def test_the_pages_are_found() -> None:
    assert {"README.md", "CONTRIBUTING.md"} <= set(root_pages())


@pytest.mark.parametrize("page", root_pages())
def test_links_of_a_root_page(page: str) -> None:
    links = _LINK.findall((REPO / page).read_text(encoding="utf-8"))
    strangers = [
        each for each in links if not each.startswith("docs/") and each not in root_pages()
    ]
    assert [each for each in strangers if each.endswith(".md")] == []
    assert all((REPO / each).exists() for each in links)
