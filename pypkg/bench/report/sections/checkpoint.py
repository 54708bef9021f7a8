"""Saving and loading of checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pypkg.bench.report.quantities import median_and_quartiles
from pypkg.bench.report.result import Result
from pypkg.console.markdown import table

TITLE = "Checkpoints"


def render(result: Result) -> list[str]:
    alone = next((row for row in result["rows"] if row["layout"] == "alone"), None)
    body = []
    for row in result["rows"]:
        sync = row["sync_total"]["median"]
        stall = row.get("async_stall")
        body.append(
            [
                row["layout"],
                *median_and_quartiles(row["sync_total"]),
                f"{row['bytes'] / sync / 1e9:.2f}",
                _cell(row.get("of_dd")),
                _cell(row.get("of_direct_dd")),
                "" if alone is None else f"{sync / alone['sync_total']['median']:.2f}",
                _cell(stall),
                "" if stall is None else f"{stall['median'] / sync:.2f}",
                _number(row, "first_async_stall", 1),
                _cell(row.get("async_total")),
                _cell(row.get("load_total")),
                _number(row, "largest_share", 1),
                _number(row, "read_per_held", 1),
                _number(row, "sync_host_bytes", 2**20, 0),
            ]
        )
    head = [
        "layout", "save, s", "quartiles", "GB/s", "of dd", "of direct", "vs alone",
        "async stall, s", "of save", "first, s", "async save, s", "load, s", "share", "read",
        "host MiB",
    ]  # fmt: skip
    return [
        f"- {result['workload']}; {result['rows'][0]['bytes'] / 1e9:.2f} GB",
        "- `of dd`: time of `dd` with fsync that writes as many bytes in the same round, divided "
        "by the time of the save; `of direct`: the same with `oflag=direct`, past the page cache, "
        "as a save writes; `async stall`: how long training stands still with "
        "`use_async_save`, after the first save, whose time is `first`; `of save`: divided by the "
        "time of the save that is awaited. Shared memory is allocated before the first save, as in "
        "a run, and kept, so no save waits for its pages. The pause is that of the slowest rank. "
        "It is the time of its copy, and of one message before it; a rank waits for no copy of "
        "another. The copy needs a core for each rank: beside other programs, ranks that share "
        "cores pause longer",
        "- `share`: bytes that the rank with the most converts and writes, relative to the mean of "
        "all ranks; "
        "`read`: bytes that a rank reads when it loads, at most, relative to what the model before "
        "ZeRO and its optimizer state hold; `host`: growth of a rank's memory during the save",
        "",
        *table(head, body, text_columns=1),
    ]


def _cell(summary: Mapping[str, Any] | None) -> str:
    return "" if summary is None else f"{summary['median']:.2f}"


def _number(row: Mapping[str, Any], name: str, unit: float, digits: int = 2) -> str:
    return f"{row[name] / unit:.{digits}f}" if name in row else ""
