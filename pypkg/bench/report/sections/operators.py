"""Operators: a table and a figure each."""

from __future__ import annotations

from collections.abc import Sequence

from pypkg.bench.ops.case import OURS
from pypkg.bench.report.quantities import milliseconds
from pypkg.bench.report.result import Result, Row, device_name, result_name
from pypkg.console.markdown import table

TITLE = "Operators"


def render(result: Result, with_figures: bool = False) -> list[str]:
    """The lines of the section, with links to ``figures`` or without."""
    limits = result["limits"]
    lines = [
        f"- operators: {result['backend']}",
        f"- limits: a copy of {limits['copy_bytes'] / 2**20:.0f} MiB (read and written together) "
        f"ran at {limits['copy_bytes_per_second'] / 1e9:.1f} GB/s, matrix products at "
        f"{limits['matmul_flops_per_second'] / 1e9:.0f} GFLOP/s ({limits['matmul_source']})",
    ]
    for name, rows in _by_operator(result).items():
        lines += ["", f"### {name}", "", f"Counted: {result['counted'][name]}.", ""]
        if with_figures:
            lines += [f"![Times of {name}](benchmarks/{_figure_name(result, name)})", ""]
        lines += _table(rows)
    return lines


def figures(result: Result) -> dict[str, str]:
    """The SVG of each operator, by the name of its file in docs/benchmarks."""
    from pypkg.bench.report.figures import operator_figure
    from pypkg.console.svg import svg

    return {
        _figure_name(result, name): svg(operator_figure(rows, device_name(result)))
        for name, rows in _by_operator(result).items()
    }


def _figure_name(result: Result, operator: str) -> str:
    return f"{result_name(result)}-{operator.replace('+', '-')}.svg"


def _by_operator(result: Result) -> dict[str, list[Row]]:
    rows: dict[str, list[Row]] = {}
    for row in result["rows"]:
        rows.setdefault(row["op"], []).append(row)
    return rows


def _unit(rows: Sequence[Row]) -> tuple[str, str, float]:
    """The counted quantity of the rows, its unit, and the divisor; GPUs use TFLOP/s."""
    if rows[0]["flops"] == 0:
        return "bytes", "GB/s", 1e9
    fastest = max(1e3 * row["flops"] / row["median"] for row in rows)
    return ("flops", "TFLOP/s", 1e12) if fastest > 1e13 else ("flops", "GFLOP/s", 1e9)


def _table(rows: Sequence[Row]) -> list[str]:
    work, unit, scale = _unit(rows)
    baselines = list(dict.fromkeys(row["baseline"] for row in rows if row["baseline"] != OURS))
    keys = dict.fromkeys((row["shape"], row["dtype"], row["pass"]) for row in rows)
    has_yardsticks = any("of_yardstick" in row for row in rows)
    body = []
    for key in keys:
        times = {
            row["baseline"]: row for row in rows if (row["shape"], row["dtype"], row["pass"]) == key
        }
        ours = times[OURS]
        cells = [
            *key,
            milliseconds(ours["median"]),
            f"{1e3 * ours[work] / ours['median'] / scale:.1f}",
            f"{100 * ours['limit'] / ours['median']:.0f} %",
        ]
        if has_yardsticks:
            cells.append(f"{ours['of_yardstick']:.2f}" if "of_yardstick" in ours else "-")
        for baseline in baselines:
            if baseline not in times:
                cells.append("-")
                continue
            other = times[baseline]["median"]
            cells.append(f"{other / ours['median']:.2f} ({milliseconds(other)})")
        body.append(cells)
    head = ["shape", "dtype", "pass", "ms", unit, "of limit"]
    head += ["of causal"] if has_yardsticks else []
    head += [f"vs {baseline}" for baseline in baselines]
    return table(head, body, text_columns=3)
