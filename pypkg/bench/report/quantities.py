"""The format of numbers in the report."""

from __future__ import annotations

from pypkg.bench.report.result import Row


def milliseconds(value: float) -> str:
    """``value`` with three significant digits, two for small values, without an exponent."""
    digits = 4 if value < 0.1 else 3 if value < 1 else 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:.{digits}f}"


def median_and_quartiles(row: Row, digits: int = 2) -> list[str]:
    """The two table cells for a row with the fields of a ``Summary``."""
    low, high = row["lower_quartile"], row["upper_quartile"]
    return [f"{row['median']:.{digits}f}", f"{low:.{digits}f}-{high:.{digits}f}"]
