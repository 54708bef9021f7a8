"""Pictures of operator results, one SVG per operator, in the same bytes for the same result.

A panel per dtype and pass; in it a group per shape with a line per baseline: the median on a
logarithmic scale, the quartiles, and how many times as long as ours. Every line carries its name,
so that nothing hangs on colours; they are those of Okabe and Ito, which the colour-blind can tell
apart.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence

from pypkg.bench.ops.case import OURS, PASSES
from pypkg.bench.report.quantities import milliseconds
from pypkg.bench.report.result import Row

_TEXT, _FAINT, _GRID = "#1f2630", "#5b6573", "#e3e7ec"
_OURS_COLOUR, _LIMIT_COLOUR = "#0072b2", "#000000"
_BASELINE_COLOURS = ("#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_LINE, _GROUP_GAP, _MARGIN, _HEAD = 17, 30, 12, 78
# Widths: of the names, of a scale, of the values beside it, and where the two of them end.
_NAMES, _PANEL, _VALUES = 162, 220, 124
_MS_END, _RATIO_END = _PANEL + 46, _PANEL + 100
_FONT = 11.5


class _Drawing:
    """SVG elements; coordinates in pixels."""

    def __init__(self) -> None:
        self.parts: list[str] = []

    def text(
        self,
        at: tuple[float, float],
        text: str,
        colour: str = _TEXT,
        anchor: str = "start",
        bold: bool = False,
        size: float = _FONT,
    ) -> None:
        weight = ' font-weight="bold"' if bold else ""
        self.parts.append(
            f'<text x="{at[0]:.1f}" y="{at[1]:.1f}" font-size="{size:g}" fill="{colour}" '
            f'text-anchor="{anchor}"{weight}>{html.escape(text)}</text>'
        )

    def line(
        self,
        start: tuple[float, float],
        end: tuple[float, float],
        colour: str,
        width: float = 1,
        dashes: str = "",
    ) -> None:
        dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
        self.parts.append(
            f'<line x1="{start[0]:.1f}" y1="{start[1]:.1f}" x2="{end[0]:.1f}" y2="{end[1]:.1f}" '
            f'stroke="{colour}" stroke-width="{width:g}"{dashed}/>'
        )

    def dot(self, x: float, y: float, colour: str, is_ours: bool) -> None:
        if is_ours:
            self.parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{colour}"/>')
            return
        self.parts.append(
            f'<rect x="{x - 3.5:.1f}" y="{y - 3.5:.1f}" width="7" height="7" fill="white" '
            f'stroke="{colour}" stroke-width="2"/>'
        )

    def document(self, width: float, height: float) -> str:
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" '
            f'width="{width:.0f}" height="{height:.0f}" font-family="DejaVu Sans, Verdana, '
            'Arial, sans-serif">'
        )
        ground = f'<rect width="{width:.0f}" height="{height:.0f}" fill="white"/>'
        return "\n".join([head, ground, *self.parts, "</svg>"]) + "\n"


class _Scale:
    """Milliseconds to pixels, logarithmic; all panels of a picture share it."""

    def __init__(self, values: Sequence[float]) -> None:
        self._low, self._high = math.log10(min(values)), math.log10(max(values))
        spare = max(0.02 * (self._high - self._low), 0.05)
        self._low, self._high = self._low - spare, self._high + spare

    def __call__(self, value: float) -> float:
        return _PANEL * (math.log10(value) - self._low) / (self._high - self._low)

    def ticks(self) -> list[float]:
        """Powers of ten, with 2 and 5 times them where there are few."""
        exponents = range(math.floor(self._low), math.ceil(self._high) + 1)
        factors = (1, 2, 5) if self._high - self._low < 1.7 else (1,)
        values = [factor * 10.0**exponent for exponent in exponents for factor in factors]
        return [each for each in values if self._low <= math.log10(each) <= self._high]


def draw_operator(rows: Sequence[Row], device: str) -> str:
    """The picture of the rows of one operator, as an SVG document."""
    passes = list(dict.fromkeys(row["pass"] for row in rows))
    if set(passes) == set(PASSES):
        passes = list(PASSES[:2])  # the third is their sum
    rows = [row for row in rows if row["pass"] in passes]
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    baselines = dict.fromkeys(row["baseline"] for row in rows if row["baseline"] != OURS)
    colours = {OURS: _OURS_COLOUR}
    for number, baseline in enumerate(baselines):
        colours[baseline] = _BASELINE_COLOURS[number % len(_BASELINE_COLOURS)]
    shown = ("median", "lower_quartile", "upper_quartile", "limit")
    scale = _Scale([row[key] for row in rows for key in shown])
    drawing = _Drawing()
    drawing.text((_MARGIN, 24), f"{rows[0]['op']} on {device}", bold=True, size=15)
    drawing.text(
        (_MARGIN, 43), "Milliseconds, logarithmic: median and quartiles; left is faster.", _FAINT
    )
    drawing.text(
        (_MARGIN, 58),
        "vs: time divided by that of pypkg. Dashed: the limit of the machine.",
        _FAINT,
    )
    top = float(_HEAD)
    for dtype in dtypes:
        chosen = [row for row in rows if row["dtype"] == dtype]
        bottom = top
        for column, part in enumerate(passes):
            of_pass = [row for row in chosen if row["pass"] == part]
            left = _MARGIN + _NAMES + column * (_PANEL + _VALUES)
            bottom = _draw_panel(drawing, of_pass, (left, top), scale, colours, column == 0)
        top = bottom + 22
    width = 2 * _MARGIN + _NAMES + len(passes) * (_PANEL + _VALUES)
    return drawing.document(width, top)


def _draw_panel(
    drawing: _Drawing,
    rows: Sequence[Row],
    corner: tuple[float, float],
    scale: _Scale,
    colours: Mapping[str, str],
    with_names: bool,
) -> float:
    """Draws one dtype and pass; returns where it ends."""
    left, top = corner
    drawing.text((left, top + 12), f"{rows[0]['pass']}, {rows[0]['dtype']}", bold=True)
    drawing.text((left + _MS_END, top + 12), "ms", _FAINT, "end")
    drawing.text((left + _RATIO_END, top + 12), "vs", _FAINT, "end")
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    groups = [[row for row in rows if row["shape"] == shape] for shape in shapes]
    height = sum(_GROUP_GAP + _LINE * (len(group) + 1) for group in groups)
    begin, end = top + 20, top + 20 + height
    for tick in scale.ticks():
        x = left + scale(tick)
        drawing.line((x, begin), (x, end), _GRID)
        drawing.text((x, end + 14), f"{tick:g}", _FAINT, "middle", size=10.5)
    drawing.line((left, end), (left + _PANEL, end), _FAINT)
    y = begin
    for shape, group in zip(shapes, groups):
        if with_names:
            drawing.text((_MARGIN, y + 17), shape, bold=True)
        y += _GROUP_GAP
        _draw_group(drawing, group, (left, y), scale, colours, with_names)
        y += _LINE * (len(group) + 1)
    return end + 16


def _draw_group(
    drawing: _Drawing,
    group: Sequence[Row],
    corner: tuple[float, float],
    scale: _Scale,
    colours: Mapping[str, str],
    with_names: bool,
) -> None:
    """The baselines at one shape, and the limit."""
    left, top = corner
    ours = next(row["median"] for row in group if row["baseline"] == OURS)
    limit = group[0]["limit"]
    x = left + scale(limit)
    middle = top + _LINE * (len(group) + 0.5)
    drawing.line((x, top), (x, middle + 6), _LIMIT_COLOUR, 1.2, "3 2")
    drawing.text((left + _MS_END, middle + 4), milliseconds(limit), _FAINT, "end")
    if with_names:
        drawing.text((_MARGIN + _NAMES - 10, middle + 4), "limit", _FAINT, "end")
    for number, row in enumerate(group):
        y = top + _LINE * (number + 0.5)
        colour, is_ours = colours[row["baseline"]], row["baseline"] == OURS
        drawing.line((left, y), (left + _PANEL, y), _GRID)
        quartiles = (left + scale(row[key]) for key in ("lower_quartile", "upper_quartile"))
        drawing.line(*((each, y) for each in quartiles), colour, 2)
        x = left + scale(row["median"])
        drawing.dot(x, y, colour, is_ours)
        said = milliseconds(row["median"])
        drawing.text((left + _MS_END, y + 4), said, anchor="end", bold=is_ours)
        ratio = f"{row['median'] / ours:.2f}"
        drawing.text((left + _RATIO_END, y + 4), ratio, anchor="end", bold=is_ours)
        if with_names:
            place = (_MARGIN + _NAMES - 10, y + 4)
            drawing.text(place, row["baseline"], anchor="end", bold=is_ours)
