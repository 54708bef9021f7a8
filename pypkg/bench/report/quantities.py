"""How the report writes numbers."""

from __future__ import annotations

from pypkg.bench.report.result import Row


def milliseconds(value: float) -> str:
    """Three significant digits, or two of little, without an exponent."""
    digits = 4 if value < 0.1 else 3 if value < 1 else 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:.{digits}f}"


def median_and_quartiles(row: Row, digits: int = 2) -> list[str]:
    """Two cells: of a row that holds a ``Summary``."""
    low, high = row["lower_quartile"], row["upper_quartile"]
    return [f"{row['median']:.{digits}f}", f"{low:.{digits}f}-{high:.{digits}f}"]
