"""Markdown tables for all generated pages."""

from __future__ import annotations

from collections.abc import Sequence


def table(
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    text_columns: int | None = None,
    padded: bool = True,
) -> list[str]:
    """The lines of a Markdown table.

    Args:
        head, rows: cells; every row has as many as the head.
        text_columns: the number of leading columns that are aligned to the left. The others hold
            numbers and are aligned to the right. None: all columns are text.
        padded: cells are padded to the width of their column, so that the source is legible.
    """
    count = len(head) if text_columns is None else text_columns
    widths = [3] * len(head)
    if padded:
        widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        if padded:
            cells = [
                cell.ljust(width) if i < count else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(cells, widths))
            ]
        return f"| {' | '.join(cells)} |"

    rule = ["-" * width if i < count else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    return [line(head), line(rule), *(line(row) for row in rows)]
