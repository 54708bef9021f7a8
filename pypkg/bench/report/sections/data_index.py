"""Construction of sample indices."""

from __future__ import annotations

from pypkg.bench.ops.case import OURS
from pypkg.bench.report.quantities import median_and_quartiles
from pypkg.bench.report.result import Result
from pypkg.console.markdown import table

TITLE = "Sample indices"


def render(result: Result) -> list[str]:
    ours = {row["step"]: row["median"] for row in result["rows"] if row["baseline"] == OURS}
    body = [
        [
            row["step"],
            row["work"],
            row["baseline"],
            *median_and_quartiles(row, digits=3),
            f"{row['median'] / ours[row['step']]:.2f}",
            f"{row['map_bytes'] / 2**20:.0f}",
            f"{row['peak_bytes'] / row['map_bytes']:.2f}",
        ]
        for row in result["rows"]
    ]
    head = ["step", "work", "baseline", "s", "quartiles", "vs ours", "MiB", "peak"]
    baselines = ", ".join(f"{name} {version}" for name, version in result["baselines"].items())
    return [
        f"- {result['documents']:,} documents of {result['mean_tokens']} tokens in the mean, "
        "exponentially distributed, in memory; one thread",
        f"- baselines: {baselines or 'none'}; PaddleNLP and Megatron-LM shuffle with NumPy",
        "- All baselines build the same maps, bit for bit, which is checked before they are timed",
        "- `vs ours`: time divided by ours; `MiB`: size of the maps that a step builds; `peak`: "
        "growth of the process at its largest, divided by that size",
        "",
        *table(head, body, text_columns=3),
    ]
