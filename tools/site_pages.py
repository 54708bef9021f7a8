"""Hook of MkDocs: adds pages from the root of the repository, and renders lists as GitHub does.

Python-Markdown wants a blank line before a list and nested items four spaces in; GitHub's dialect,
in which the pages are written, does not.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

_ROOT = Path(__file__).resolve().parent.parent
# File in the root of the repository to page of the site.
_PAGES = {
    "README.md": "index.md",
    "README.zh.md": "README.zh.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "CHANGELOG.md": "CHANGELOG.md",
}
_ITEM = re.compile(r"( *)(?:[-*]|\d+\.) ")
_FENCE = re.compile(r" *(```|~~~)")


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages of the root, with links as seen from docs/."""
    for source, page in _PAGES.items():
        text = (_ROOT / source).read_text(encoding="utf-8")
        text = re.sub(r"\]\(docs/", "](", text).replace("](README.md", "](index.md")
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The text of a page in the dialect of Python-Markdown, with the root's pages beside docs'."""
    depth = page.file.src_uri.count("/")
    out_of_docs = rf"\]\((?:\.\./){{{depth + 1}}}(?=\w+\.md)"
    return with_python_markdown_lists(re.sub(out_of_docs, f"]({'../' * depth}", markdown))


def with_python_markdown_lists(markdown: str) -> str:
    """``markdown`` with a blank line before each list, and text within items four spaces in."""
    lines: list[str] = []
    in_code = in_list = False
    for line in markdown.splitlines():
        item = None if in_code else _ITEM.match(line)
        if item and not in_list and lines and lines[-1].strip():
            lines.append("")
        if item:
            in_list = True
        elif line.strip() and not line.startswith(" "):
            in_list = False
        indent = len(line) - len(line.lstrip(" "))
        if in_list and 0 < indent < 4:
            line = "    " + line.lstrip(" ")
        if _FENCE.match(line):
            in_code = not in_code
        lines.append(line)
    return "\n".join(lines)
