"""What kills and full disks leave of a run: docs/reliability.md.

    python tools/kill_campaign.py --json FILE               # all layouts; goes on from FILE
    python tools/kill_campaign.py --json FILE --only tp2    # those whose name holds "tp2"
    python tools/kill_campaign.py --json FILE --update      # tables of FILE into the page

A small model trains under each layout, saves at every step and keeps two checkpoints. Its processes
are forked from one that has imported Paddle (tests/processes), so a start takes a second.

- ``kills``: SIGKILL to one rank or to all at a random instant: while they start, within half a
  second after a save, or when a folder of a save or a removal has just appeared. Ranks that were
  not killed have to end by themselves. Every folder with the name of a checkpoint has to be whole,
  and none that was there before may be missing unless a newer one is there. Then the same command
  goes on, from the newest checkpoint.
- ``disk``: the same, where the disk (a tmpfs, which takes root) gets full at a random place of a
  save. All ranks have to end with exit code 2 and one message that says so.

After the last fault a run goes on to its end. The losses and gradient norms of all steps, those
that were taken again included, and the weights and optimizer state have to be those of a run that
never failed, bit for bit.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from campaign_ranks import Ranks, within  # noqa: E402
from fault_campaign import PAGE, Run, put_table  # noqa: E402

from pypkg.console.markdown import table  # noqa: E402
from pypkg.files import write_file  # noqa: E402
from pypkg.training.checkpoint.folders import TEMPORARY_PREFIX, checkpoints  # noqa: E402
from pypkg.training.checkpoint.verify import verify  # noqa: E402
from pypkg.training.ledger import events  # noqa: E402

KILLS, FULL_DISKS = 22, 5  # of each layout, with and without use_async_save
_SECONDS_TO_END = 60.0  # of ranks whose run has lost one
_DISK = 8 << 20  # bytes of the tmpfs
_FILLER = "filler"
_LAYOUTS: dict[str, tuple[int, dict[str, object]]] = {
    "one process": (1, {}),
    "dp2": (2, {}),
    "tp2": (2, {"tensor_parallel_degree": 2}),
    "pp2": (2, {"pipeline_parallel_degree": 2, "gradient_accumulation_steps": 2}),
    "sharding 2, stage 1": (2, {"sharding": "stage1"}),
    "sharding 2, stage 2": (2, {"sharding": "stage2"}),
    "sharding 2, stage 3": (2, {"sharding": "stage3"}),
}
_SAVING = {"save_steps": 1, "save_total_limit": 2, "max_steps": 100_000}


@dataclass
class Counts:
    """What was found after faults of one kind under one layout.

    Attributes:
        faults: kills, or full disks.
        of_one_rank: kills of one rank of several; the others had to end.
        while_saving, while_removing: faults that left the folder of a save or of a removal.
        damaged: faults after which a folder with the name of a checkpoint was not whole.
        lost: faults after which the newest checkpoint was older than one seen before.
        wrong_start: starts that went on from another checkpoint than the newest.
        untold: faults after which a rank did not end, or not with the exit code and the words that
            it should have.
        orphans: faults after which a process was left.
        steps_again: steps that were taken more than once.
        other_values: steps with other losses or norms than without faults, or another end.
        slowest_end: seconds until the last rank had ended.
    """

    faults: int = 0
    of_one_rank: int = 0
    while_saving: int = 0
    while_removing: int = 0
    damaged: int = 0
    lost: int = 0
    wrong_start: int = 0
    untold: int = 0
    orphans: int = 0
    steps_again: int = 0
    other_values: int = 0
    slowest_end: float = 0.0

    def add(self, other: Mapping[str, float]) -> None:
        """Adds the counts of another layout."""
        for field in fields(self):
            mine, theirs = getattr(self, field.name), other[field.name]
            joined = max(mine, theirs) if field.name == "slowest_end" else mine + theirs
            setattr(self, field.name, joined)


class Campaign:
    """Faults of one kind of a run under one layout.

    Attributes:
        counts: what was found.
    """

    def __init__(
        self, run: Run, output_dir: Path, layout: str, is_async: bool, rng: random.Random
    ) -> None:
        self.counts = Counts()
        self._run, self._output_dir, self._rng = run, output_dir, rng
        self._size, settings = _LAYOUTS[layout]
        self._settings = settings | {"use_async_save": is_async}
        self._seen: dict[int, set[tuple[float, ...]]] = {}  # values of each step
        self._resumed = 0  # events of the ledger that were looked at
        self._at_start = 0  # the newest checkpoint at the last start

    def kill(self) -> None:
        """Starts the run, and kills it."""
        with self._started() as ranks:
            before = self._newest()
            instant = self._rng.random()
            if instant < 0.15:  # while it starts
                time.sleep(self._rng.uniform(0, 1.5))
            else:
                self._wait(ranks, lambda: self._newest() > before)
            if instant > 0.5:  # in a save or a removal
                found = self._temporary()
                self._wait(ranks, lambda: bool(self._temporary() - found))
                time.sleep(self._rng.uniform(0, 0.02))
            elif instant > 0.15:
                time.sleep(self._rng.uniform(0, 0.5))
            before = max(before, self._newest())
            victims = self._rng.choice([ranks.processes, *([each] for each in ranks.processes)])
            for process in victims:
                process.send_signal(signal.SIGKILL)
            self.counts.of_one_rank += len(victims) < self._size
            self._look(ranks, before)

    def fill_the_disk(self) -> None:
        """Starts the run, and fills its disk so that a save fails."""
        filler = self._output_dir.parent / _FILLER
        with self._started() as ranks:
            before = self._newest()
            self._wait(ranks, lambda: self._newest() > before)
            newest = checkpoints(self._output_dir)[-1][1]
            size = sum(file.stat().st_size for file in newest.iterdir())
            before, room = self._newest(), int(self._rng.uniform(0, size))

            def has_ended() -> bool:
                _fill(filler, room)  # again, since a checkpoint may have been removed
                return ranks.have_ended()

            within(_SECONDS_TO_END, has_ended)
            self._look(ranks, before, "the disk is full")
        filler.unlink()

    def finish(self) -> None:
        """A run that goes on to its end, and one without a fault, have to be the same."""
        steps = max(self._newest(), *self._seen) + 1
        runs = [(self._output_dir, 1), (self._run.folder / "whole", steps)]
        for folder, save_steps in runs:
            given = self._settings | _SAVING | {"max_steps": steps, "save_steps": save_steps}
            with Ranks(self._run, self._size, folder, **given) as ranks:
                ranks.finish()
        self._note_values()
        self._check_start()
        expected = _values(runs[1][0])
        counts = self.counts
        counts.other_values += sum(
            found != {expected.get(step)} for step, found in self._seen.items()
        )
        counts.other_values += _tensors(runs[0][0], steps) != _tensors(runs[1][0], steps)

    def _started(self) -> Ranks:
        given = self._settings | _SAVING
        return Ranks(self._run, self._size, self._output_dir, **given)

    def _look(self, ranks: Ranks, before: int, words: str | None = None) -> None:
        """After a fault: at the processes, the checkpoints and the losses.

        Args:
            before: the newest checkpoint before the fault.
            words: that a rank has to say, with exit code 2 of all; None: they were killed.
        """
        counts, began = self.counts, time.monotonic()
        counts.faults += 1
        has_ended = within(_SECONDS_TO_END, ranks.have_ended)
        counts.slowest_end = max(counts.slowest_end, time.monotonic() - began)
        told = has_ended and all(ranks.codes())
        if words is not None:
            told = set(ranks.codes()) == {2} and ranks.said().count(words) >= 1
        if not told:
            print(f"untold: {ranks.codes()}\n{ranks.said()}", file=sys.stderr)
        counts.untold += not told
        counts.orphans += has_ended and ranks.leave_orphans()
        left = self._temporary()
        removed = {name for name in left if name.startswith(f"{TEMPORARY_PREFIX}checkpoint-")}
        counts.while_removing += bool(removed)
        counts.while_saving += bool(left - removed)
        counts.damaged += any(verify(each).damage for _, each in checkpoints(self._output_dir))
        counts.lost += self._newest() < before
        self._check_start()
        self._note_values()

    def _check_start(self) -> None:
        """Whether the last start went on from the newest checkpoint that there was."""
        found = [each for each in events(self._output_dir) if each["event"] == "resumed"]
        for event in found[self._resumed :]:
            self.counts.wrong_start += event["step"] != self._at_start
        self._resumed = len(found)
        self._at_start = self._newest()

    def _note_values(self) -> None:
        newest = self._newest()
        for step, values in _values(self._output_dir).items():
            self._seen.setdefault(step, set()).add(values)
            self.counts.steps_again += step > newest

    def _newest(self) -> int:
        found = checkpoints(self._output_dir)
        return found[-1][0] if found else 0

    def _temporary(self) -> set[str]:
        return {each.name for each in self._output_dir.glob(f"{TEMPORARY_PREFIX}*")}

    def _wait(self, ranks: Ranks, is_so: Callable[[], bool]) -> None:
        def is_over() -> bool:
            return is_so() or any(code is not None for code in ranks.codes())

        if not within(120.0, is_over, pause=0.001) or not is_so():
            raise RuntimeError(f"exit codes {ranks.codes()}\n{ranks.said()}")


def _values(output_dir: Path) -> dict[int, tuple[float, ...]]:
    """Loss and gradient norm by step, of the rows that are written whole."""
    file = output_dir / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return {row["global_step"]: (row["loss"], row["grad_norm"]) for row in rows}


def _tensors(output_dir: Path, step: int) -> dict[str, bytes]:
    folder = output_dir / f"checkpoint-{step}"
    return {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}


def _fill(filler: Path, room: int) -> None:
    """Lets a file grow until its disk has no more than ``room`` bytes."""
    status = os.statvfs(filler.parent)
    surplus = status.f_bavail * status.f_frsize - room
    if surplus > 0:
        with contextlib.suppress(OSError), filler.open("ab") as file:  # the run writes as well
            os.posix_fallocate(file.fileno(), file.tell(), surplus)


@contextmanager
def _disk(folder: Path) -> Iterator[Path]:
    """A small disk; takes root."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={_DISK}", "none", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def try_layout(layout: str, is_async: bool, kind: str, count: int, seed: int) -> Counts:
    """``count`` faults of a kind under a layout."""
    rng = random.Random(f"{layout} {is_async} {kind} {seed}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run = Run(folder, has_tokenizer=False)
        if kind == "kills":
            campaign = Campaign(run, folder / "out", layout, is_async, rng)
            for _ in range(count):
                campaign.kill()
            campaign.finish()
            return campaign.counts
        with _disk(folder / "disk") as disk:
            campaign = Campaign(run, disk / "out", layout, is_async, rng)
            for _ in range(count):
                campaign.fill_the_disk()
            campaign.finish()
            return campaign.counts


# Of the table of each kind: the sum of counts, by its title.
_COLUMNS: dict[str, dict[str, tuple[str, ...]]] = {
    "kills": {
        "kills": ("faults",),
        "of one rank": ("of_one_rank",),
        "in a save": ("while_saving",),
        "in a removal": ("while_removing",),
        "steps taken again": ("steps_again",),
        "damaged": ("damaged",),
        "lost": ("lost",),
        "wrong start": ("wrong_start",),
        "other losses or weights": ("other_values",),
        "ranks left": ("untold", "orphans"),
    },
    "disk": {
        "full disks": ("faults",),
        "damaged": ("damaged",),
        "lost": ("lost",),
        "wrong start": ("wrong_start",),
        "other losses or weights": ("other_values",),
        "not told": ("untold", "orphans"),
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
    parser = argparse.ArgumentParser(description="Kills runs, and fills their disks.")
    parser.add_argument("--json", type=Path, required=True, help="results; those in it are kept")
    parser.add_argument("--only", default="", help="a part of the names to try")
    parser.add_argument(
        "--count", type=int, help=f"of each: {KILLS} kills, {FULL_DISKS} full disks"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--update", action="store_true", help=f"writes the tables to {PAGE.name}")
    options = parser.parse_args(arguments)
    results: dict[str, dict[str, float]] = {}
    if options.json.exists():
        results = json.loads(options.json.read_text())
    for kind, usual in (("kills", KILLS), ("disk", FULL_DISKS)):
        for layout in _LAYOUTS:
            for is_async in (False, True):
                name = f"{kind}: {layout}{', use_async_save' if is_async else ''}"
                if name in results or options.only not in name:
                    continue
                counts = try_layout(layout, is_async, kind, options.count or usual, options.seed)
                results[name] = asdict(counts)
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


if __name__ == "__main__":
    sys.exit(main())
