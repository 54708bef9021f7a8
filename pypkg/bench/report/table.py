"""How the report writes numbers and tables."""

from __future__ import annotations

from collections.abc import Sequence

from pypkg.bench.report.result import Row


def table(head: Sequence[str], body: Sequence[Sequence[str]], text_columns: int) -> list[str]:
    """The lines of a Markdown table, padded to be read as text too; numbers to the right."""
    widths = [max(len(row[i]) for row in [head, *body]) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if i < text_columns else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths))
        ]
        return f"| {' | '.join(padded)} |"

    rule = [
        "-" * width if i < text_columns else "-" * (width - 1) + ":"
        for i, width in enumerate(widths)
    ]
    return [line(head), line(rule), *(line(row) for row in body)]


def milliseconds(value: float) -> str:
    """Three significant digits, or two of little, without an exponent."""
    digits = 4 if value < 0.1 else 3 if value < 1 else 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:.{digits}f}"


def median_and_quartiles(row: Row, digits: int = 2) -> list[str]:
    """Two cells: of a row that holds a ``Summary``."""
    low, high = row["lower_quartile"], row["upper_quartile"]
    return [f"{row['median']:.{digits}f}", f"{low:.{digits}f}-{high:.{digits}f}"]
