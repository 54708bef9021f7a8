"""Tasks in several processes, also when one fails, dies or is interrupted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from pypkg.data.preprocess.workers import run_tasks
from pypkg.errors import UserError


def nothing() -> None:
    pass


def make_work(word: str, shared: object) -> Callable[[int], Iterator[tuple]]:
    return partial(_work, word)


def _work(word: str, task: int) -> Iterator[tuple]:
    if word == "user error":
        raise UserError(f"task {task} cannot be done")
    if word == "bug":
        raise ZeroDivisionError(task)
    if word == "killed" and task == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    yield (word, task, "begun", os.getpid())
    if word == "slow":
        time.sleep(60)
    yield (word, task, "done", os.getpid())


def failing_load() -> None:
    raise UserError("no such tokenizer")


def failing_setup(shared: object) -> Callable[[int], Iterator[tuple]]:
    raise UserError("no such tokenizer")


def buggy_load() -> None:
    raise ZeroDivisionError


def load_once(file: Path) -> list[object]:
    """Fails the second time."""
    file.touch(exist_ok=False)
    return [os.getpid(), len(os.listdir("/proc/self/task"))]


def tell(shared: list[object]) -> Callable[[int], Iterator[tuple]]:
    return partial(_tell, [*shared, os.getpid()])


def _tell(shared: list[object], task: int) -> Iterator[tuple]:
    yield (*shared, os.getppid())


@pytest.mark.parametrize("processes", [1, 2])
def test_everything_is_done_once(processes):
    events = list(run_tasks(nothing, partial(make_work, "good"), range(10), processes))
    for stage in ("begun", "done"):
        assert sorted(event[1] for event in events if event[2] == stage) == list(range(10))
    assert all(event[0] == "good" for event in events)
    assert len({event[3] for event in events}) <= processes
    assert (os.getpid() in {event[3] for event in events}) == (processes == 1)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_users_mistake(processes):
    with pytest.raises(UserError, match=r"task [01] cannot be done"):
        list(run_tasks(nothing, partial(make_work, "user error"), range(4), processes))
    for load, setup in (
        (failing_load, partial(make_work, "good")),
        (nothing, failing_setup),
    ):
        with pytest.raises(UserError, match="no such tokenizer"):
            list(run_tasks(load, setup, range(4), processes))


def test_what_processes_share_is_loaded_once(tmp_path):
    """By the process that they are forked from, which holds no other thread then."""
    events = list(run_tasks(partial(load_once, tmp_path / "loaded"), tell, range(6), 3))
    assert len(events) == 6 and os.getpid() not in events[0]
    for loader, threads, worker, parent in events:
        assert (loader, threads) == (parent, 1) and worker != loader


def test_a_bug_shows_its_traceback():
    with pytest.raises(RuntimeError, match=r"(?s)Traceback.*ZeroDivisionError"):
        list(run_tasks(buggy_load, partial(make_work, "good"), range(4), 2))
    with pytest.raises(RuntimeError, match=r"(?s)Traceback.*ZeroDivisionError"):
        list(run_tasks(nothing, partial(make_work, "bug"), range(4), 2))


def test_a_killed_process_is_told():
    with pytest.raises(UserError, match=r"was killed by signal 9.*fewer --workers"):
        list(run_tasks(nothing, partial(make_work, "killed"), range(8), 2))


def test_closing_ends_the_processes():
    events = run_tasks(nothing, partial(make_work, "slow"), range(2), 2)
    pids = {next(events)[3], next(events)[3]}
    start = time.monotonic()
    events.close()
    assert time.monotonic() - start < 10
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


ORPHANS = """
import os, sys
from functools import partial
sys.path.insert(0, {folder!r})
from pypkg.data.preprocess.workers import run_tasks
from test_worker_processes import endless, nothing
if __name__ == "__main__":
    for event in run_tasks(nothing, endless, range(2), 2):
        print(event, flush=True)
"""


def endless(shared: object) -> Callable[[int], Iterator[int]]:
    return _count


def _count(task: int) -> Iterator[int]:
    while True:
        time.sleep(0.05)
        yield os.getpid()


def test_workers_end_when_the_main_process_is_killed(tmp_path):
    script = tmp_path / "main.py"
    script.write_text(ORPHANS.format(folder=os.path.dirname(__file__)))
    process = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    pids = set()
    while len(pids) < 2:
        pids.add(int(process.stdout.readline()))
    process.kill()
    process.wait()
    deadline = time.monotonic() + 20
    while pids and time.monotonic() < deadline:
        pids = {pid for pid in pids if is_running(pid)}
        time.sleep(0.05)
    assert not pids


def is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
