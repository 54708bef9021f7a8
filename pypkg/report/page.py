"""The page as one HTML file: template, scripts, styles, plotting library and document."""

from __future__ import annotations

import html
from pathlib import Path

from pypkg.report.document import Document

_HERE = Path(__file__).resolve().parent
_STYLES = ("vendor/uPlot.min.css", "template/page.css")
_SCRIPTS = (
    "vendor/uPlot.iife.min.js",
    "template/elements.js",
    "template/charts.js",
    "template/sections.js",
    "template/main.js",
)


def render(document: Document) -> str:
    """The page as one HTML document that loads no other file, so it works offline.

    Data of the runs are embedded as JSON only. The scripts insert them into the page as text.
    """
    runs = ", ".join(run.name for run in document.runs)
    parts = {
        "title": html.escape(f"{runs} - pypkg report"),
        "styles": _joined(_STYLES),
        "scripts": "\n".join(f"<script>\n{_read(name)}</script>" for name in _SCRIPTS),
        "document": _inside_script(document.to_json()),
    }
    page = _read("template/page.html")
    for name, text in parts.items():
        before, after = page.split(f"<!-- {name} -->")
        page = before + text + after
    return page


def _inside_script(text: str) -> str:
    """Escapes "<", so that no string ends the script element. JSON has "<" only in strings."""
    return text.replace("<", "\\u003c")


def _joined(names: tuple[str, ...]) -> str:
    return "\n".join(map(_read, names))


def _read(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")
