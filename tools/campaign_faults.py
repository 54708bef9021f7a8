"""Injects faults into runs under one layout and checks what each fault leaves."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import chain
from pathlib import Path
from types import MappingProxyType

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "several_hosts")]

from campaign_ranks import OUTPUT_DIR, Ranks, within  # noqa: E402
from fault_campaign import Run  # noqa: E402
from netns import Host  # noqa: E402

from pypkg.training.checkpoint.folders import TEMPORARY_PREFIX, checkpoints  # noqa: E402
from pypkg.training.checkpoint.verify import verify  # noqa: E402
from pypkg.training.ledger import events  # noqa: E402

_SECONDS_TO_END = 60.0  # within which all ranks end after the run has lost one
_SECONDS_AWAY = 5.0  # longest interruption of a link or a rank that the run survives
_FILLER = "filler"
_OF_STARTS = 0.15  # share of the faults that occur while the ranks start
_SAVING = {"save_steps": 1, "save_total_limit": 2, "max_steps": 100_000}


@dataclass
class Counts:
    """What was found after faults of one kind under one layout.

    Attributes:
        faults: kills, full disks, links that stay cut, or ranks that stay stopped.
        of_one_rank: kills of one rank of several; the others had to end.
        mended: short interruptions of a link or a rank, which the run has to survive.
        while_saving, while_removing: faults that left the temporary folder of a save or a removal.
        damaged: faults after which a checkpoint folder was not whole.
        lost: faults after which the newest checkpoint was older than before.
        wrong_start: starts that did not resume from the newest checkpoint.
        untold: faults after which a rank did not end, or ended without the expected exit code and
            message.
        orphans: faults that left a process behind.
        steps_again: steps that were repeated.
        other_values: steps whose losses or norms differ from those of a run without faults; one
            more if the final weights or optimizer state differ.
        slowest_end: longest time, in seconds, until the last rank had ended.
    """

    faults: int = 0
    of_one_rank: int = 0
    mended: int = 0
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

    Args:
        folders: in which each rank runs; ranks of one folder share their output_dir.
        settings: settings of the run under this layout.
        hosts: on which each rank runs; empty: all on this machine.
        limits: environment variables of all ranks.

    Attributes:
        counts: what was found.
    """

    def __init__(
        self,
        run: Run,
        folders: Sequence[Path],
        settings: Mapping[str, object],
        rng: random.Random,
        hosts: Sequence[Host] = (),
        limits: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.counts = Counts()
        self._run, self._folders, self._rng = run, folders, rng
        self._hosts, self._limits = hosts, limits
        self._places = [folder / OUTPUT_DIR for folder in dict.fromkeys(folders)]
        self._settings = settings
        self._seen: dict[int, set[tuple[float, ...]]] = {}  # values of each step
        self._resumed = 0  # events of the ledger that were looked at
        self._at_start = 0  # the newest checkpoint at the last start

    def kill(self) -> None:
        """Starts the run, and kills one rank or all."""
        with self._started() as ranks:
            before = self._await_an_instant(ranks, self._rng.random())
            victims = self._rng.choice([ranks.processes, *([each] for each in ranks.processes)])
            for process in victims:
                process.send_signal(signal.SIGKILL)
            self.counts.of_one_rank += len(victims) < len(self._folders)
            self._look(ranks, before)

    def fill_the_disk(self) -> None:
        """Starts the run, and fills its disk so that a save fails."""
        filler = self._folders[0].parent / _FILLER
        with self._started() as ranks:
            start = self._newest()
            self._wait(ranks, lambda: self._newest() > start)
            before = self._newest()
            files = chain(*(each.glob(f"checkpoint-{before}/*") for each in self._places))
            room = int(self._rng.uniform(0, sum(file.stat().st_size for file in files)))

            def has_ended() -> bool:
                _fill(filler, room)  # again, since a checkpoint may have been removed
                return ranks.have_ended()

            within(_SECONDS_TO_END, has_ended)
            self._look(ranks, before, _says_full)
        filler.unlink()

    def cut_the_link(self) -> None:
        """Starts the run, cuts the link of a host for seconds, and later for good."""
        host = self._rng.choice(self._hosts)
        with self._started() as ranks:
            self._await_an_instant(ranks, self._rng.uniform(_OF_STARTS, 1))
            host.cut()
            time.sleep(self._rng.uniform(0, _SECONDS_AWAY))
            host.mend()
            before = self._await_an_instant(ranks, self._rng.uniform(_OF_STARTS, 1))
            self.counts.mended += 1
            host.cut()
            try:
                self._look(ranks, before, self._name_each_other)
            finally:
                host.mend()

    def stop_a_rank(self) -> None:
        """Starts the run, and stops a rank for seconds, and later until the other has ended."""
        rank = self._rng.randrange(len(self._folders))
        with self._started() as ranks:
            process = ranks.processes[rank]
            self._await_an_instant(ranks, self._rng.uniform(_OF_STARTS, 1))
            process.send_signal(signal.SIGSTOP)
            time.sleep(self._rng.uniform(0, _SECONDS_AWAY))
            process.send_signal(signal.SIGCONT)
            before = self._await_an_instant(ranks, self._rng.uniform(_OF_STARTS, 1))
            self.counts.mended += 1
            process.send_signal(signal.SIGSTOP)
            within(_SECONDS_TO_END, lambda: ranks.codes()[1 - rank] is not None)
            process.send_signal(signal.SIGCONT)
            self._look(ranks, before, lambda ranks: _name_the_stopped(ranks, rank))

    def finish(self) -> None:
        """Lets the run end, and compares it with a run that had no fault."""
        steps = max(self._newest(), *self._seen) + 1
        whole = [
            self._run.folder / f"whole{self._places.index(folder / OUTPUT_DIR)}"
            for folder in self._folders
        ]
        for folders, save_steps in ((self._folders, 1), (whole, steps)):
            given = self._settings | _SAVING | {"max_steps": steps, "save_steps": save_steps}
            with Ranks(self._run, folders, self._hosts, self._limits, **given) as ranks:
                ranks.finish()
        self._note_values()
        self._check_start()
        expected, counts = _values(whole[0] / OUTPUT_DIR), self.counts
        counts.other_values += sum(
            found != {expected.get(step)} for step, found in self._seen.items()
        )
        places = [folder / OUTPUT_DIR for folder in dict.fromkeys(whole)]
        counts.other_values += _tensors(self._places, steps) != _tensors(places, steps)

    def _started(self) -> Ranks:
        settings = self._settings | _SAVING
        return Ranks(self._run, self._folders, self._hosts, self._limits, **settings)

    def _await_an_instant(self, ranks: Ranks, kind: float) -> int:
        """Waits for a random instant; returns the newest checkpoint.

        Args:
            kind: a number in [0, 1) that selects the kind of instant: below _OF_STARTS while the
                ranks start, below 0.5 soon after a save, else during a save or a removal.
        """
        newest = self._newest()
        if kind < _OF_STARTS:
            time.sleep(self._rng.uniform(0, 1.5))
            return newest
        self._wait(ranks, lambda: self._newest() > newest)
        if kind < 0.5:
            time.sleep(self._rng.uniform(0, 0.5))
        else:
            found = self._temporary()
            self._wait(ranks, lambda: bool(self._temporary() - found))
            time.sleep(self._rng.uniform(0, 0.02))
        return max(newest, self._newest())

    def _look(
        self,
        ranks: Ranks,
        before: int,
        is_told: Callable[[Ranks], bool] = lambda ranks: all(ranks.codes()),
    ) -> None:
        """Checks processes, checkpoints and losses after a fault, and counts what is wrong.

        Args:
            before: the newest checkpoint before the fault.
            is_told: whether the ranks ended with the expected exit codes and messages.
        """
        counts, began = self.counts, time.monotonic()
        counts.faults += 1
        has_ended = within(_SECONDS_TO_END, ranks.have_ended)
        counts.slowest_end = max(counts.slowest_end, time.monotonic() - began)
        if not (has_ended and is_told(ranks)):
            print(f"untold: {ranks.codes()}\n{ranks.said()}", file=sys.stderr)
            counts.untold += 1
        counts.orphans += has_ended and ranks.leave_orphans()
        left = self._temporary()
        removed = {path for path in left if path.name.startswith(f"{TEMPORARY_PREFIX}checkpoint-")}
        counts.while_removing += bool(removed)
        counts.while_saving += bool(left - removed)
        whole = chain(*(checkpoints(place) for place in self._places))
        counts.damaged += any(verify(each).damage for _, each in whole)
        counts.lost += self._newest() < before
        self._check_start()
        self._note_values()

    def _name_each_other(self, ranks: Ranks) -> bool:
        """Whether each of two ranks has ended and named the other one and its host."""
        names = [f"rank {rank} ({host.address})" for rank, host in enumerate(self._hosts)]
        return all(ranks.codes()) and all(names[1 - rank] in ranks.said_by(rank) for rank in (0, 1))

    def _check_start(self) -> None:
        """Counts a start that did not resume from the checkpoint that was then the newest."""
        found = [each for each in events(self._places[0]) if each["event"] == "resumed"]
        for event in found[self._resumed :]:
            self.counts.wrong_start += event["step"] != self._at_start
        self._resumed = len(found)
        self._at_start = self._newest()

    def _note_values(self) -> None:
        newest = self._newest()
        for step, values in _values(self._places[0]).items():
            self._seen.setdefault(step, set()).add(values)
            self.counts.steps_again += step > newest

    def _newest(self) -> int:
        """The newest checkpoint of which every place has its part."""
        steps = [{step for step, _ in checkpoints(place)} for place in self._places]
        return max(set.intersection(*steps), default=0)

    def _temporary(self) -> set[Path]:
        return set(chain(*(each.glob(f"{TEMPORARY_PREFIX}*") for each in self._places)))

    def _wait(self, ranks: Ranks, is_so: Callable[[], bool]) -> None:
        """Waits until ``is_so`` was true once; the folder that it looks for may vanish again."""
        was_so = False

        def is_over() -> bool:
            nonlocal was_so
            was_so = is_so()
            return was_so or any(code is not None for code in ranks.codes())

        within(120.0, is_over, pause=0.001)
        if not was_so:
            raise RuntimeError(f"exit codes {ranks.codes()}\n{ranks.said()}")


def _name_the_stopped(ranks: Ranks, stopped: int) -> bool:
    """Whether both ranks have ended and report no heartbeat from the stopped rank."""
    said = [ranks.said_by(rank) for rank in (0, 1)]
    return all(ranks.codes()) and all(
        f"no heartbeat from rank {stopped} " in each and "Traceback" not in each for each in said
    )


def _says_full(ranks: Ranks) -> bool:
    return set(ranks.codes()) == {2} and "the disk is full" in ranks.said()


def _values(output_dir: Path) -> dict[int, tuple[float, ...]]:
    """Loss and gradient norm by step, from the complete rows of metrics.jsonl."""
    file = output_dir / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return {row["global_step"]: (row["loss"], row["grad_norm"]) for row in rows}


def _tensors(places: Sequence[Path], step: int) -> dict[str, bytes]:
    files = (each.glob(f"checkpoint-{step}/*.safetensors") for each in places)
    return {file.name: file.read_bytes() for file in chain(*files)}


def _fill(filler: Path, room: int) -> None:
    """Grows a file until its disk has at most ``room`` free bytes."""
    status = os.statvfs(filler.parent)
    surplus = status.f_bavail * status.f_frsize - room
    if surplus > 0:
        with contextlib.suppress(OSError), filler.open("ab") as file:  # the run writes as well
            os.posix_fallocate(file.fileno(), file.tell(), surplus)
