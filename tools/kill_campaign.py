"""Checks runs after kills, full disks, cut links and stopped ranks (docs/reliability.md).

    python tools/kill_campaign.py --json FILE               # all layouts; goes on from FILE
    python tools/kill_campaign.py --json FILE --only tp2    # those whose name holds "tp2"
    python tools/kill_campaign.py --json FILE --most 1      # the next one
    python tools/kill_campaign.py --json FILE --update      # tables of FILE into the page

A small model trains under each layout, saves at every step and keeps two checkpoints. Its processes
are forked from one that has imported Paddle (tests/processes), so a start takes a second. With
allow_local_output each rank has a folder of its own.

- ``kills``: SIGKILL to one rank or to all at a random instant: during the start, within half a
  second after a save, or when the temporary folder of a save or a removal has just appeared. Ranks
  that were not killed have to end by themselves. Every checkpoint folder has to be whole, and the
  newest checkpoint must not be older than before. The same command then has to resume from it.
- ``disk``: the disk (a tmpfs, which needs root) fills up at a random point of a save. All ranks
  have to end with exit code 2 and one message about it.
- ``links``: each rank has its own host (a network namespace, which needs root and iproute2), and a
  link is cut: first for up to 5 s, which the run has to survive, then for good. Both ranks then
  have to end and name the host that they lost.
- ``stops``: one of two ranks is stopped (SIGSTOP): first for up to 5 s, which the run has to
  survive, later until the other rank has ended. The stopped rank then continues and has to end.
  Both have to name the stopped rank.

The last three make the same checks as ``kills``. After the last fault a run continues to its end.
The losses and gradient norms of all steps, including repeated ones, and the final weights and
optimizer state have to equal, bit for bit, those of a run without faults.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "several_hosts")]

import netns  # noqa: E402
from campaign_faults import Campaign, Counts  # noqa: E402
from campaign_ranks import QUICK_TO_MISS  # noqa: E402
from fault_campaign import PAGE, Run, put_table  # noqa: E402

from pypkg.console.markdown import table  # noqa: E402
from pypkg.files import write_file  # noqa: E402

# Faults of each layout, with and without use_async_save.
USUAL = {"kills": 19, "disk": 5, "links": 2, "stops": 1}
_OF_TWO_RANKS = ("links", "stops")
_DISK = 8 << 20  # bytes of the tmpfs
_LOCAL = "allow_local_output"
_LAYOUTS: dict[str, tuple[int, dict[str, object]]] = {
    "one process": (1, {}),
    "dp2": (2, {}),
    "tp2": (2, {"tensor_parallel_degree": 2}),
    "pp2": (2, {"pipeline_parallel_degree": 2, "gradient_accumulation_steps": 2}),
    "sharding 2, stage 1": (2, {"sharding": "stage1"}),
    "sharding 2, stage 2": (2, {"sharding": "stage2"}),
    "sharding 2, stage 3": (2, {"sharding": "stage3"}),
    f"tp2, {_LOCAL}": (2, {"tensor_parallel_degree": 2, _LOCAL: True}),
}


@contextmanager
def _disk(folder: Path) -> Iterator[Path]:
    """A small tmpfs; needs root."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={_DISK}", "none", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def try_layout(layout: str, is_async: bool, kind: str, count: int, seed: int) -> Counts:
    """``count`` faults of a kind under a layout."""
    rng = random.Random(f"{layout} {is_async} {kind} {seed}")
    size, settings = _LAYOUTS[layout]
    settings = settings | {"use_async_save": is_async}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        run = Run(folder, has_tokenizer=False)
        disk = stack.enter_context(_disk(folder / "disk")) if kind == "disk" else folder
        hosts = stack.enter_context(netns.network(size)) if kind == "links" else ()
        folders = [disk / f"place{rank if _LOCAL in settings else 0}" for rank in range(size)]
        limits = QUICK_TO_MISS if kind in _OF_TWO_RANKS else {}
        campaign = Campaign(run, folders, settings, rng, hosts, limits)
        fault = {
            "kills": campaign.kill,
            "disk": campaign.fill_the_disk,
            "links": campaign.cut_the_link,
            "stops": campaign.stop_a_rank,
        }[kind]
        for _ in range(count):
            fault()
        campaign.finish()
        return campaign.counts


# Columns of the table of each kind: the counts to add up, by title.
_HARM = {
    "damaged": ("damaged",),
    "lost": ("lost",),
    "wrong start": ("wrong_start",),
    "other losses or weights": ("other_values",),
}
_OF_A_LOST_RANK: dict[str, tuple[str, ...]] = {
    "in a save": ("while_saving",),
    "steps taken again": ("steps_again",),
    **_HARM,
    "not told": ("untold", "orphans"),
}
_COLUMNS: dict[str, dict[str, tuple[str, ...]]] = {
    "kills": {
        "kills": ("faults",),
        "of one rank": ("of_one_rank",),
        "in a save": ("while_saving",),
        "in a removal": ("while_removing",),
        "steps taken again": ("steps_again",),
        **_HARM,
        "ranks left": ("untold", "orphans"),
    },
    "disk": {
        "full disks": ("faults",),
        **_HARM,
        "not told": ("untold", "orphans"),
    },
    "links": {
        "cut for up to 5 s": ("mended",),
        "cut for good": ("faults",),
        **_OF_A_LOST_RANK,
    },
    "stops": {
        "stopped for up to 5 s": ("mended",),
        "stopped for longer": ("faults",),
        **_OF_A_LOST_RANK,
    },
}


def table_of(results: Mapping[str, Mapping[str, float]], kind: str) -> list[str]:
    """The lines of a table: a row for each layout, and one for all."""
    prefix, columns = f"{kind}: ", _COLUMNS[kind]
    chosen = {key.removeprefix(prefix): results[key] for key in results if key.startswith(prefix)}
    total = Counts()
    for counts in chosen.values():
        total.add(counts)
    rows = [
        [name, *(f"{sum(counts[key] for key in keys):g}" for keys in columns.values())]
        for name, counts in (*chosen.items(), ("all", asdict(total)))
    ]
    return table(("layout", *columns), rows, text_columns=1)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Kills and stops runs, fills their disks, cuts their links."
    )
    parser.add_argument("--json", type=Path, required=True, help="results; those in it are kept")
    parser.add_argument("--only", default="", help="a part of the names to try")
    parser.add_argument("--count", type=int, help=f"of each; by default {USUAL}")
    parser.add_argument("--most", type=int, default=sys.maxsize, help="cases to try in this call")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--update", action="store_true", help=f"writes the tables to {PAGE.name}")
    options = parser.parse_args(arguments)
    results: dict[str, dict[str, float]] = {}
    if options.json.exists():
        results = json.loads(options.json.read_text())
    missing = {name: case for name, case in _cases().items() if name not in results}
    chosen = [name for name in missing if options.only in name]
    for name in chosen[: options.most]:
        layout, is_async, kind = missing[name]
        count = options.count or USUAL[kind]
        results[name] = asdict(try_layout(layout, is_async, kind, count, options.seed))
        write_file(options.json, json.dumps(results, indent=1).encode())
        print(name, results[name], flush=True)
    page = PAGE.read_text(encoding="utf-8")
    for kind in _COLUMNS:
        lines = table_of(results, kind)
        print("\n".join(lines))
        page = put_table(page, kind, lines)
    if options.update:
        write_file(PAGE, page.encode())
    return 0


def _cases() -> dict[str, tuple[str, bool, str]]:
    """Layout, use_async_save and kind of fault, by name."""
    return {
        f"{kind}: {layout}{', use_async_save' if is_async else ''}": (layout, is_async, kind)
        for kind in USUAL
        for layout, (size, _) in _LAYOUTS.items()
        if kind not in _OF_TWO_RANKS or size == 2
        for is_async in (False, True)
    }


if __name__ == "__main__":
    sys.exit(main())
