"""The fenced blocks of README.md, CONTRIBUTING.md, docs/*.md and docs/guides/*.md."""

from __future__ import annotations

import re
import shlex
import textwrap
from pathlib import Path
from typing import NamedTuple

REPO = Path(__file__).resolve().parents[2]
PAGES = (
    REPO / "README.md",
    REPO / "CONTRIBUTING.md",
    *sorted((REPO / "docs").glob("*.md")),
    *sorted((REPO / "docs/guides").glob("*.md")),
)
_FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.M | re.S)
_PROGRAMS = ("pypkg", "python", "pip", "make")
# Translations have the blocks of the originals (test_translations.py).
TRANSLATIONS = (REPO / "README.zh.md", *(page for page in PAGES if page.stem.endswith(".zh")))


class Block(NamedTuple):
    """A fenced block: stem of its page, language after the fence, text without indentation."""

    page: str
    language: str
    text: str

    @property
    def commands(self) -> list[str]:
        """The command lines, without comments; one that ends in a backslash goes on.

        Empty for Python, and for what is no command: a tree of folders, a printed table.
        """
        if self.language not in ("bash", "sh", ""):
            return []
        lines = self.text.replace("\\\n", " ").splitlines()
        starting = [line for line in lines if line.partition(" ")[0] in _PROGRAMS]
        return [shlex.join(shlex.split(line, comments=True)) for line in starting]


def blocks() -> list[Block]:
    """All blocks of all pages but translations, in their order."""
    return [each for page in PAGES if page not in TRANSLATIONS for each in blocks_of(page)]


def blocks_of(page: Path) -> list[Block]:
    """The blocks of a page, in their order."""
    found = _FENCE.findall(page.read_text(encoding="utf-8"))
    return [Block(page.stem, language, textwrap.dedent(text)) for _, language, text in found]


def inline_commands() -> list[tuple[str, str]]:
    """Page and text of every pypkg command within a line, such as `pypkg models`."""
    found = []
    for page in PAGES:
        prose = _FENCE.sub("", page.read_text(encoding="utf-8"))
        for text in re.findall(r"`((?:python -m pypkg\.|pypkg )[^`]+)`", prose):
            found.append((page.stem, " ".join(text.replace("\\|", "|").split())))
    return found
