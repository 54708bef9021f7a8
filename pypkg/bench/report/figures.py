"""Figures of results: one per operator, and one of learning curves.

The figure of an operator has a row of panels per shape and dtype, and a column per pass. A panel
has a line per baseline: the median on a logarithmic scale, the quartiles, and the time divided by
ours. The colours of Okabe and Ito (2008) are distinguishable with colour blindness; lines also have
names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle, product

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from pypkg.bench.ops.case import OURS
from pypkg.bench.ops.work import PASSES
from pypkg.bench.report.quantities import milliseconds
from pypkg.bench.report.result import Row

_OURS_COLOUR = "#0072b2"
_COLOURS = ("#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
# Inches: of a panel with its labels, of a line in it, and around it.
_PANEL_WIDTH, _LABEL_WIDTH, _LINE, _BETWEEN, _HEAD = 3.4, 1.6, 0.2, 0.36, 1.0
_FEW_DECADES = 50  # below this ratio, a scale also has ticks at 2 and 5 times powers of ten


def operator_figure(rows: Sequence[Row], device: str) -> Figure:
    """The figure of all rows of one operator.

    The sum of forward and backward is left out if both are shown.
    """
    passes = list(dict.fromkeys(row["pass"] for row in rows))
    if set(passes) == set(PASSES):
        passes = list(PASSES[:2])
    panels: dict[tuple[str, str], dict[str, list[Row]]] = {}
    for row in rows:
        if row["pass"] in passes:
            panel = panels.setdefault((row["shape"], row["dtype"]), {})
            panel.setdefault(row["pass"], []).append(row)
    lines = [max(map(len, panel.values())) for panel in panels.values()]
    height = _HEAD + sum(_LINE * count + _BETWEEN for count in lines)
    size = _LABEL_WIDTH + _PANEL_WIDTH * len(passes), height
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(
        f"{rows[0]['op']} on {device}: median and quartiles; dashed: limit\n"
        f"right: time divided by that of {OURS} (ms)",
        fontsize=9.5,
    )
    axes = figure.subplots(
        *(len(panels), len(passes)), sharex=True, squeeze=False, height_ratios=lines
    )
    others = dict.fromkeys(row["baseline"] for row in rows if row["baseline"] != OURS)
    colours = {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(others)}
    colours[OURS] = _OURS_COLOUR
    for (shape, dtype), line in zip(panels, axes):
        line[0].set_title(f"{shape}, {dtype}", loc="left", fontsize=8.5, fontweight="bold")
        for axis, each in zip(line, passes):
            _draw_panel(axis, panels[shape, dtype][each], colours, axis is line[0])
    for axis, each in zip(axes[-1], passes):
        axis.set_xlabel(f"{each}, ms")
    low, high = axes[0][0].get_xlim()
    ticks = LogLocator(subs=(1, 2, 5) if high < _FEW_DECADES * low else (1,), numticks=20)
    for axis in axes.flat:
        axis.xaxis.set_major_locator(ticks)
    return figure


def _draw_panel(
    axis: Axes, rows: Sequence[Row], colours: Mapping[str, str], with_names: bool
) -> None:
    """The baselines at one shape, dtype and pass, and the limit."""
    axis.set_xscale("log")
    axis.axvline(rows[0]["limit"], color="black", linewidth=1, linestyle="--")
    for position, row in enumerate(rows):
        colour, median = colours[row["baseline"]], row["median"]
        axis.plot([row["lower_quartile"], row["upper_quartile"]], [position] * 2, color=colour)
        shape, inside = ("o", colour) if row["baseline"] == OURS else ("s", "white")
        axis.plot(median, position, color=colour, markersize=5, marker=shape, mfc=inside)
    ours = next(row["median"] for row in rows if row["baseline"] == OURS)
    names = [row["baseline"] if with_names else "" for row in rows]
    times = [f"{row['median'] / ours:.2f} ({milliseconds(row['median'])})" for row in rows]
    axis.set_yticks(range(len(rows)), names)
    axis.set_ylim(len(rows) - 0.5, -0.5)
    right = axis.secondary_yaxis("right")
    right.set_yticks(range(len(rows)), times)
    for label, row in zip([*axis.get_yticklabels(), *right.get_yticklabels()], [*rows, *rows]):
        label.set_fontweight("bold" if row["baseline"] == OURS else "normal")
    for each in (axis, right):
        each.tick_params(axis="y", length=0)
    axis.grid(color="#e3e7ec")
    axis.set_axisbelow(True)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_locator(NullLocator())


def curves_figure(rows: Sequence[Row]) -> Figure:
    """Training losses, nats per token, by step: a line per optimizer."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axis = figure.subplots()
    styles = cycle(product(("-", "--", ":"), (_OURS_COLOUR, *_COLOURS)))
    for row, (line, colour) in zip(rows, styles, strict=False):
        axis.plot(row["steps"], row["losses"], line, color=colour, lw=1.2, label=row["optimizer"])
    axis.set_xlabel("step")
    axis.set_ylabel("training loss, nats per token")
    axis.grid(color="#e3e7ec")
    axis.set_axisbelow(True)
    axis.legend(frameon=False, fontsize=9)
    return figure
