"""``pypkg compare-losses A B``: the first step at which two runs differ, and what may explain it.

Exit codes: 0 the runs are equal within the tolerance, 1 they differ, 2 a folder that holds no run,
a damaged file or no step in common, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pypkg.console.command_line import exit_code
from pypkg.console.logs import configure_logging
from pypkg.console.markdown import table
from pypkg.errors import UserError
from pypkg.report.comparison import Comparison, Difference, MetricComparison, compare
from pypkg.report.document import finite


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    options = _parser().parse_args(arguments)
    configure_logging()
    return exit_code(lambda: _run(options), "interrupted")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pypkg compare-losses",
        description="Compares loss, validation loss, gradient norm, learning rate and tokens of "
        "two runs step by step. Lists settings that differ, and events up to the first difference. "
        "Exit code 0: equal, 1: different, 2: error.",
        allow_abbrev=False,
    )
    for name in ("a", "b"):
        parser.add_argument(name, type=Path, metavar=name.upper(), help="the output_dir of a run")
    parser.add_argument(
        "--tolerance", type=float, default=0.0, metavar="T",
        help="largest |a - b| / max(|a|, |b|) that counts as equal; by default 0, bit for bit",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _run(options: argparse.Namespace) -> int:
    if not options.tolerance >= 0:
        raise UserError(f"--tolerance is {options.tolerance}; expected 0 or more")
    found = compare(options.a, options.b, options.tolerance)
    if options.json:
        print(json.dumps(finite(asdict(found)), indent=2, allow_nan=False))
    else:
        print(comparison_text(found))
    return 0 if found.first_step is None else 1


def comparison_text(found: Comparison) -> str:
    """The tables that the command prints."""
    head = ("metric", "steps compared", "first difference", "A", "B", "relative", "largest at",
            "relative")  # fmt: skip
    parts = [
        f"A: {found.names[0]}, up to step {found.last_steps[0]}\n"
        f"B: {found.names[1]}, up to step {found.last_steps[1]}",
        "\n".join(table(head, [_metric_row(each) for each in found.metrics], 1)),
        _verdict(found),
    ]
    if found.settings:
        rows = [(each.name, _text(each.a), _text(each.b)) for each in found.settings]
        parts.append("\n".join(table(("what differs", "A", "B"), rows)))
    if found.events:
        event_rows = [
            (each.run, "-" if each.step is None else str(each.step), each.event, each.text)
            for each in found.events
        ]
        parts.append("\n".join(table(("run", "step", "event", "details"), event_rows)))
    return "\n\n".join(parts)


def _metric_row(metric: MetricComparison) -> tuple[str, ...]:
    first, largest = metric.first, metric.largest
    return (
        metric.name,
        str(metric.compared),
        *(_values(first) if first else ["-"] * 4),
        *((str(largest.step), f"{largest.relative:.1e}") if largest else ("-", "-")),
    )


def _values(found: Difference) -> list[str]:
    return [str(found.step), f"{found.a:.9g}", f"{found.b:.9g}", f"{found.relative:.1e}"]


def _verdict(found: Comparison) -> str:
    if found.first_step is None:
        return f"The runs are equal within a relative difference of {found.tolerance:g}."
    differing = [
        each.name for each in found.metrics if each.first and each.first.step == found.first_step
    ]
    return f"Step {found.first_step} is the first that differs, in {', '.join(differing)}."


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


if __name__ == "__main__":
    sys.exit(main())
