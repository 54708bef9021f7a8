"""Learning curves of the optimizers: a table and a figure."""

from __future__ import annotations

from typing import Any

from pypkg.bench.report.result import Result, result_name
from pypkg.console.markdown import table

TITLE = "Learning curves of the optimizers"


def render(result: Result, with_figures: bool = False) -> list[str]:
    """The lines of the section, with a link to the figure or without."""
    rows = result["rows"]
    steps = rows[0]["eval_steps"]
    head = ["optimizer", *(f"step {step}" for step in steps), "tokens/s", "settings"]
    body = [
        [
            row["optimizer"],
            *(f"{loss:.3f}" for loss in row["eval_losses"]),
            f"{row['tokens_per_second']:,.0f}",
            _settings(result["differences"][row["optimizer"]]),
        ]
        for row in rows
    ]
    lines = [
        f"- {result['workload']}",
        "- Columns of steps: validation loss, nats per token, of the same samples. `settings`: "
        "those in which a run differs from that of adamw. One run each: a difference of a few "
        "hundredths says little, and no learning rate was searched for",
        "",
        *table(head, body, text_columns=1),
    ]
    if with_figures:
        lines += ["", f"![Training losses](benchmarks/{result_name(result)}.svg)"]
    return lines


def figures(result: Result) -> dict[str, str]:
    """The SVG of the training losses, by the name of its file in docs/benchmarks."""
    from pypkg.bench.report.figures import curves_figure
    from pypkg.console.svg import svg

    return {f"{result_name(result)}.svg": svg(curves_figure(result["rows"]))}


def _settings(differences: dict[str, Any]) -> str:
    return ", ".join(f"`{name}` {_text(value)}" for name, value in differences.items())


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value).lower()
