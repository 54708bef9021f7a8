"""SVG documents of matplotlib figures; equal figures give equal bytes."""

from __future__ import annotations

import io
from typing import Any

import matplotlib
from matplotlib.figure import Figure

# Text remains text, which is searchable. Ids have a fixed salt, and the file contains neither the
# date nor the version of matplotlib.
_STYLE: dict[Any, str] = {"svg.fonttype": "none", "svg.hashsalt": "pypkg"}
_METADATA = {"Date": None, "Creator": None}


def svg(figure: Figure) -> str:
    """The figure as an SVG document on a white ground, legible on light and dark pages."""
    out = io.StringIO()
    with matplotlib.rc_context(_STYLE):
        figure.savefig(out, format="svg", metadata=_METADATA, facecolor="white")
    # matplotlib leaves spaces at the ends of lines, which linters and editors remove.
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"
