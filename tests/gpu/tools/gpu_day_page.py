"""Where the result of `make gpu-day` goes: a JSON file a day, and a table on docs/gpu.md."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # nothing is installed on a GPU
from pypkg.console.markdown import table

PAGE = "gpu.md"
DAYS = "gpu_days"
BEGIN, END = "<!-- gpu days: begin -->", "<!-- gpu days: end -->"
NONE = "No GPU has run it yet."


def write(day: dict[str, Any], docs: Path) -> list[Path]:
    """Writes the result of a day, its times for the page of benchmarks, and the table of days."""
    stamp = day["date"].replace(" ", "-").replace(":", "")
    written = [docs / DAYS / f"{stamp}.json"]
    written[0].parent.mkdir(parents=True, exist_ok=True)
    written[0].write_text(json.dumps(day, indent=1) + "\n", encoding="utf-8")
    times = next((p["report"] for p in day["parts"] if p["name"] == "time"), None)
    if times and "rows" in times:
        slug = re.sub("[^a-z0-9]+", "-", times["device"].lower()).strip("-")
        written.append(docs / "benchmarks" / f"ops-{slug}.json")
        written[1].parent.mkdir(exist_ok=True)
        written[1].write_text(json.dumps(times, indent=1) + "\n", encoding="utf-8")
    page = docs / PAGE
    page.write_text(with_days(page.read_text(encoding="utf-8"), read_days(docs)), encoding="utf-8")
    return [*written, page]


def read_days(docs: Path) -> list[dict[str, Any]]:
    """The results of all days, the newest first."""
    files = sorted((docs / DAYS).glob("*.json"), reverse=True)
    return [json.loads(file.read_text(encoding="utf-8")) for file in files]


def with_days(page: str, days: Sequence[dict[str, Any]]) -> str:
    """``page`` with the table of ``days`` between its markers."""
    before, _, rest = page.partition(BEGIN)
    _, marker, after = rest.partition(END)
    assert marker, f"docs/{PAGE} has lost its markers"
    return "\n".join([before + BEGIN, *_table(days), END + after])


def _table(days: Sequence[dict[str, Any]]) -> list[str]:
    if not days:
        return [NONE]
    head = ["date", "GPUs", "nvcc", "commit", "result"]
    rows = [
        [day["date"], _cell(day["gpus"]), _cell(day["nvcc"]), day["commit"], _result(day)]
        for day in days
    ]
    return table(head, rows, padded=False)


def _result(day: dict[str, Any]) -> str:
    """Which parts passed, which failed and why, and which were left out."""
    by_verdict: dict[str, list[str]] = {}
    for part in day["parts"]:
        by_verdict.setdefault(part["verdict"], []).append(part["name"])
    texts = [f"{verdict}: {', '.join(names)}" for verdict, names in by_verdict.items()]
    texts += [part["said"] for part in day["parts"] if part["verdict"] == "failed"]
    return _cell("; ".join(texts))


def _cell(text: str) -> str:
    return " / ".join(text.replace("|", "\\|").splitlines())
