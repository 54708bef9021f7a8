"""Generation with a key-value cache."""

from __future__ import annotations

from pypkg.bench.report.quantities import median_and_quartiles
from pypkg.bench.report.result import Result
from pypkg.console.markdown import table

TITLE = "Generation"


def render(result: Result) -> list[str]:
    rows, tokens = result["rows"], result["tokens_per_run"]
    ours = rows[0]["later_tokens"]["median"]
    body = [
        [
            row["baseline"],
            f"{1e3 * row['first_token']['median']:.1f}",
            *median_and_quartiles(row["later_tokens"]),
            f"{tokens / row['later_tokens']['median']:.1f}",
            f"{row['later_tokens']['median'] / ours:.2f}",
            f"{row['peak_rss_bytes'] / 2**30:.2f}",
        ]
        for row in rows
    ]
    head = ["baseline", "first token, ms", "later tokens, s", "quartiles", "tokens/s", "vs first"]
    return [
        f"- {result['workload']}",
        "- The first token takes a pass over the prompts. tokens/s are those of the later tokens "
        "alone. All baselines make the same tokens",
        "- `vs first`: time of the later tokens divided by that of the first row; peak GiB: "
        "resident set",
        "",
        *table([*head, "peak GiB"], body, text_columns=1),
    ]
