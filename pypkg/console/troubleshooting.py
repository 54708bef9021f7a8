"""The page of error messages, and the anchors on it that an error names.

``python -m pypkg.console.troubleshooting > docs/guides/troubleshooting.md`` writes the page from
``message_kinds.py``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from pypkg.console.message_kinds import KINDS, Kind

PAGE = "docs/guides/troubleshooting.md"
_HEAD = """\
# Troubleshooting by message

An error that a user can fix is printed as `error: ...`, followed by the section of this page for
its message. The exit code is 2. A message says what was found, where, and what to change; a section
adds the usual cause. `make docs` writes this page.
"""
_SEVERAL = re.compile(r"\d+ (?:problems|settings) [^\n]*:\n  - ")
_ITEM = "\n  - "


def error_text(message: str) -> str:
    """``message`` as a command prints it: after "error: ", with its sections of the page."""
    lines = [f"see {PAGE}#{anchor_of(kind)}" for kind in kinds_of(message)]
    return "\n".join([f"error: {message}", *lines])


def kinds_of(message: str) -> list[Kind]:
    """The kind of a message, or the kinds of all items of a list of problems, each once."""
    items: Iterable[str] = [message]
    if _SEVERAL.search(message):
        items = message.split(_ITEM)[1:]
    return list(dict.fromkeys(kind for item in items if (kind := _kind_of(item)) is not None))


def _kind_of(message: str) -> Kind | None:
    for kind in KINDS:
        if any(re.search(phrase, message, re.S) for phrase in kind.phrases):
            return kind
    return None


def anchor_of(kind: Kind) -> str:
    """The anchor that GitHub and MkDocs give to the heading of the kind."""
    return kind.title.lower().replace(" ", "-")


def page() -> str:
    """The text of docs/guides/troubleshooting.md."""
    parts = [_HEAD]
    parts += [f"- [{kind.title}](#{anchor_of(kind)}): `{kind.example}`" for kind in KINDS]
    for kind in KINDS:
        parts.append(f"\n## {kind.title}\n\n    {kind.example}\n\n{kind.cause}\n\n{kind.way_out}")
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    print(page(), end="")
