"""A picture of a plan: the memory of each pipeline stage as stacked bars, against the capacity.

It is an SVG document, written without a library, since a plan is made on any machine.
"""

from __future__ import annotations

from html import escape

from pypkg.planner.memory import TERMS
from pypkg.planner.output.text import largest_of_each_stage, layout_of
from pypkg.planner.search.plan import Plan

_COLOURS = (
    "#4c78a8", "#f58518", "#54a24b", "#88d27a", "#bab0ac", "#d8b5a5", "#e45756", "#b279a2",
    "#9d755d", "#eeca3b", "#72b7b2", "#ff9da6",
)  # fmt: skip
_HEIGHT, _BAR, _GAP, _LEFT, _TOP = 320, 44, 16, 60, 48
_LEGEND = 150
_GIB = 2**30


def picture(plan: Plan) -> str:
    """The SVG document."""
    ranks = largest_of_each_stage(plan)
    top = max(plan.cluster.gpu.memory, plan.largest.peak) * 1.05
    width = _LEFT + len(ranks) * (_BAR + _GAP) + _LEGEND

    def y(size: float) -> float:
        return _TOP + _HEIGHT * (1 - size / top)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{_HEIGHT + 100}" '
        'font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
        _text(8, 18, f"Memory of a rank, GiB: {plan.config.model_type}, {layout_of(plan)}"),
    ]
    for column, rank in enumerate(ranks):
        x, below = _LEFT + column * (_BAR + _GAP), 0
        for name, size in rank.terms.items():
            above = below + size
            parts.append(
                f'<rect x="{x}" y="{y(above):.1f}" width="{_BAR}" '
                f'height="{y(below) - y(above):.1f}" fill="{_COLOURS[TERMS.index(name)]}">'
                f"<title>{escape(name)}: {size / _GIB:.2f} GiB</title></rect>"
            )
            below = above
        parts.append(_text(x + 4, y(below) - 4, f"{below / _GIB:.1f}"))
        parts.append(_text(x + 2, _TOP + _HEIGHT + 16, f"stage {rank.pipeline_rank}"))
    right = _LEFT + len(ranks) * (_BAR + _GAP)
    for size, label in ((plan.cluster.gpu.memory, "GPU"), (plan.capacity, "tensors")):
        parts.append(
            f'<line x1="{_LEFT - 6}" x2="{right}" y1="{y(size):.1f}" y2="{y(size):.1f}" '
            'stroke="#d62728" stroke-dasharray="5 3"/>'
        )
        parts.append(_text(4, y(size) + 4, f"{size / _GIB:.0f} {label}"))
    shown = [name for name in TERMS if any(name in rank.terms for rank in ranks)]
    for row, name in enumerate(shown):
        at = _TOP + 18 * row
        colour = _COLOURS[TERMS.index(name)]
        parts.append(f'<rect x="{right + 8}" y="{at}" width="12" height="12" fill="{colour}"/>')
        parts.append(_text(right + 26, at + 10, name))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _text(x: float, y: float, text: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'
