"""What docs/planning.md shows of commands and published runs; as a script, it renews the page."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from pathlib import Path

from pypkg.console.markdown import table
from pypkg.models.architecture.registry import load_config
from pypkg.plan import main
from pypkg.planner.search.plan import make_plan
from pypkg.planner.time.gpus import GPUS
from pypkg.planner.time.published import (
    PUBLISHED,
    degrees_of,
    paddlenlp_memory,
    paddlenlp_time,
    settings_of,
)
from pypkg.planner.time.step_time import Cluster

REPO = Path(__file__).resolve().parents[2]
PAGE = REPO / "docs/planning.md"
_COMMAND = re.compile(r"^    \$ pypkg plan (.*)\n(?:    .*\n|\n(?=    (?!\$)))*", re.M)
_TABLE = re.compile(r"(<!-- published runs: begin -->\n).*?(<!-- published runs: end -->)", re.S)


def commands(page: str) -> list[tuple[str, str]]:
    """The arguments of each command, and the command with its output as it should be."""
    return [(found[1], _with_output(found[1])) for found in _COMMAND.finditer(page)]


def renewed_table(page: str) -> str:
    """The page with the table of the published runs as it should be."""
    return _TABLE.sub(lambda found: found[1] + published_table() + found[2], page)


def published_table() -> str:
    """Planned and published memory and speed of each run, and what this package would take."""
    gpu = GPUS["a100-80g"]
    rows = []
    for run in PUBLISHED:
        config = load_config(run.model)
        memory = sum(paddlenlp_memory(run, config).values()) / 2**20
        speed = paddlenlp_time(run, config).tokens_per_second
        ours = make_plan(settings_of(run), config, degrees_of(run), Cluster(gpu, 8, gpu.link))
        rows.append([
            run.model, f"{run.mib:,}", f"{memory:,.0f}", f"{100 * (memory / run.mib - 1):+.1f}",
            f"{run.tokens_per_second:,.0f}", f"{speed:,.0f}",
            f"{100 * (speed / run.tokens_per_second - 1):+.1f}",
            f"{ours.largest.peak / 2**20:,.0f}", f"{ours.time.tokens_per_second:,.0f}",
        ])  # fmt: skip
    head = [
        "model", "published MiB", "profile", "error %", "published tokens/s per GPU", "profile",
        "error %", "ours, MiB", "ours, tokens/s",
    ]  # fmt: skip
    return "\n".join(table(head, rows, text_columns=1)) + "\n"


def _with_output(arguments: str) -> str:
    out = io.StringIO()
    words = shlex.split(arguments)
    words[0] = str(REPO / words[0])
    with contextlib.redirect_stdout(out):
        main(words)
    lines = out.getvalue().replace(str(REPO) + "/", "").splitlines()
    shown = [f"    {line}".rstrip() for line in lines]
    return "\n".join([f"    $ pypkg plan {arguments}", *shown]) + "\n"


def renew() -> None:
    """Rewrites the page."""
    page = renewed_table(PAGE.read_text(encoding="utf-8"))
    page = _COMMAND.sub(lambda found: _with_output(found[1]), page)
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    renew()
