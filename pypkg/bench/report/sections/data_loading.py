"""Assembly of batches from tokens."""

from __future__ import annotations

from pypkg.bench.report.quantities import milliseconds
from pypkg.bench.report.result import Result
from pypkg.console.markdown import table

TITLE = "Tokens to batches"


def render(result: Result) -> list[str]:
    rows = result["rows"]
    ours = rows[0]["samples_per_second"]
    reads = [
        [
            row["baseline"],
            f"{row['samples_per_second'] / 1e6:.3f}",
            f"{ours / row['samples_per_second']:.2f}",
        ]
        for row in rows
    ]
    waits = [
        [
            row["objective"],
            str(row["threads"]),
            milliseconds(1e3 * row["mean"]),
            milliseconds(1e3 * row["largest"]),
        ]
        for row in result["waits"]
    ]
    return [
        f"- {result['workload']}",
        "- `NumPy, sample by sample` assembles a sample from the same index maps, as "
        "Megatron-LM and PaddleNLP do; `one slice` ignores documents and their order",
        "",
        *table(["baseline", "M samples/s", "pypkg / this"], reads, text_columns=1),
        "",
        "Time that a training loop waits for a micro batch. The loop consumes "
        f"{result['tokens_per_second']:,} tokens per second and computes matrix products on every "
        "core between two micro batches:",
        "",
        *table(["objective", "threads", "mean ms", "longest ms"], waits, text_columns=1),
    ]
