"""Translations have the blocks, the headings and the names of the English pages."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from page_blocks import TRANSLATIONS, blocks_of

_FENCE = re.compile(r"^```.*?^```$", re.M | re.S)


def original_of(page: Path) -> Path:
    return page.with_name(page.name.replace(".zh.md", ".md"))


def prose_of(page: Path) -> str:
    return _FENCE.sub("", page.read_text(encoding="utf-8"))


def headings(page: Path) -> list[str]:
    """Levels of the headings, such as "##"."""
    return re.findall(r"^(#+) ", prose_of(page), re.M)


def code_spans(page: Path) -> set[str]:
    """Settings, files and commands within lines."""
    return {" ".join(text.split()) for text in re.findall(r"`([^`]+)`", prose_of(page))}


@pytest.mark.parametrize("page", TRANSLATIONS, ids=lambda page: page.name)
def test_a_translation_is_in_step(page):
    """A change of the English page that concerns a block or a heading needs one here."""
    original = original_of(page)
    blocks = [each[1:] for each in blocks_of(page)]
    assert len(blocks) > 1
    assert blocks == [each[1:] for each in blocks_of(original)]
    assert headings(page) == headings(original)
    assert code_spans(page) - code_spans(original) == set()


@pytest.mark.parametrize("page", TRANSLATIONS, ids=lambda page: page.name)
def test_a_page_and_its_translation_refer_to_each_other(page):
    original = original_of(page)
    assert f"]({page.name})" in original.read_text(encoding="utf-8")
    assert f"]({original.name})" in page.read_text(encoding="utf-8")
