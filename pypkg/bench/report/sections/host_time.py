"""The host's part of a training step."""

from __future__ import annotations

from pypkg.bench.report.result import Result
from pypkg.console.markdown import table

TITLE = "Host time"


def render(result: Result) -> list[str]:
    rows, layers = result["rows"], result["layers"]
    first = rows[0]

    def cells(row: dict, part: str) -> list[str]:
        times = row[part]
        quartiles = f"{1e3 * times['lower_quartile']:.1f} to {1e3 * times['upper_quartile']:.1f}"
        ratio = first[part]["median"] / times["median"]
        return [f"{1e3 * times['median']:.1f}", quartiles, f"{ratio:.2f}"]

    body = [
        [
            row["baseline"],
            *cells(row, "forward_backward"),
            f"{1e3 * row['forward_backward']['median'] / layers:.2f}",
            *cells(row, "update"),
        ]
        for row in rows
    ]
    head = ["baseline", "forward, backward ms", "quartiles", "first / this", "ms per layer"]
    head += ["update ms", "quartiles", "first / this"]
    return [
        f"- {result['workload']}",
        "- Matrices are so small that the time is that of Python, dispatch and autograd. An update "
        "is clipping by the global norm, AdamW and clearing the gradients",
        "- `first / this`: time of the first row divided by that of this row",
        "",
        *table(head, body, text_columns=1),
    ]
