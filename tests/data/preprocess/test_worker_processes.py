"""Tasks in several processes, also when one fails, dies or is interrupted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from pypkg.data.preprocess.workers import run_tasks
from pypkg.errors import UserError


def make_work(word: str) -> Callable[[int], Iterator[tuple]]:
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


def failing_setup() -> None:
    raise UserError("no such tokenizer")


@pytest.mark.parametrize("processes", [1, 2])
def test_everything_is_done_once(processes):
    events = list(run_tasks(partial(make_work, "good"), range(10), processes))
    for stage in ("begun", "done"):
        assert sorted(event[1] for event in events if event[2] == stage) == list(range(10))
    assert all(event[0] == "good" for event in events)
    assert len({event[3] for event in events}) <= processes
    assert (os.getpid() in {event[3] for event in events}) == (processes == 1)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_users_mistake(processes):
    with pytest.raises(UserError, match=r"task [01] cannot be done"):
        list(run_tasks(partial(make_work, "user error"), range(4), processes))
    with pytest.raises(UserError, match="no such tokenizer"):
        list(run_tasks(failing_setup, range(4), processes))


def test_a_bug_shows_its_traceback():
    with pytest.raises(RuntimeError, match=r"(?s)Traceback.*ZeroDivisionError"):
        list(run_tasks(partial(make_work, "bug"), range(4), 2))


def test_a_killed_process_is_told():
    with pytest.raises(UserError, match=r"was killed by signal 9.*fewer --workers"):
        list(run_tasks(partial(make_work, "killed"), range(8), 2))


def test_closing_ends_the_processes():
    events = run_tasks(partial(make_work, "slow"), range(2), 2)
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
from test_worker_processes import endless
if __name__ == "__main__":
    for event in run_tasks(endless, range(2), 2):
        print(event, flush=True)
"""


def endless() -> Callable[[int], Iterator[int]]:
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
