"""One run at a time writes into an output_dir, and a dead one does not block it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from pypkg.errors import UserError
from pypkg.training.checkpoint import lock
from pypkg.training.checkpoint.lock import (
    BEAT_SECONDS,
    SILENCE_SECONDS,
    WATCH_SECONDS,
    Holder,
    OutputLock,
)


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen]:
    """Another process of this machine."""
    process = subprocess.Popen(["sleep", "600"])
    yield process
    process.kill()
    process.wait()


@pytest.fixture
def pause(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], None]], None]:
    """Sets what happens in place of each pause between two looks at a lock."""

    def set_to(happens: Callable[[], None]) -> None:
        monkeypatch.setattr(lock.time, "sleep", lambda _: happens())

    set_to(lambda: pytest.fail("nothing is to be waited for"))
    return set_to


@pytest.fixture
def passed(pause, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that pauses have taken by this process's clock; each takes as long as a heartbeat."""
    monotonic, passed = lock.time.monotonic, []
    pause(lambda: passed.append(BEAT_SECONDS))
    monkeypatch.setattr(lock.time, "monotonic", lambda: monotonic() + sum(passed))
    return passed


def leave_lock(folder: Path, holder: Holder, silent: float = 0.0) -> Path:
    """The lock file of ``holder``, which it touched ``silent`` seconds ago."""
    path = folder / ".lock"
    path.write_text(json.dumps(asdict(holder)))
    touch(path, silent)
    return path


def touch(path: Path, ago: float) -> None:
    now = path.stat().st_mtime
    os.utime(path, (now - ago, now - ago))


def of_process(pid: int) -> Holder:
    started = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    return replace(Holder.of_this_process(), pid=pid, started=started)


def elsewhere() -> Holder:
    return replace(Holder.of_this_process(), host="node7", pid=4711, boot_id="of node7")


def test_taken_and_given_back(tmp_path):
    held = OutputLock(tmp_path)
    said = json.loads((tmp_path / ".lock").read_text())
    assert said["pid"] == os.getpid()
    held.check()
    held.release()
    assert list(tmp_path.iterdir()) == []
    OutputLock(tmp_path).release()


def test_a_second_run_is_refused_and_told_who_is_first(tmp_path, sleeper, pause):
    holder = of_process(sleeper.pid)
    path = leave_lock(tmp_path, holder, silent=10 * SILENCE_SECONDS)
    before = path.read_text()
    with pytest.raises(UserError) as caught:
        OutputLock(tmp_path)
    for words in (str(tmp_path), f"process {sleeper.pid} on {holder.host} since {holder.since}",
                  "set output_dir to another folder", f"remove {path}"):  # fmt: skip
        assert words in str(caught.value)
    assert path.read_text() == before


def test_a_dead_process_of_this_machine_is_followed_at_once(tmp_path, sleeper, pause):
    leave_lock(tmp_path, of_process(sleeper.pid))
    sleeper.kill()
    os.waitid(os.P_PID, sleeper.pid, os.WEXITED | os.WNOWAIT)  # dead, though not waited for
    OutputLock(tmp_path).release()
    sleeper.wait()


def test_another_process_with_the_same_number(tmp_path, sleeper, pause):
    holder = of_process(sleeper.pid)
    leave_lock(tmp_path, replace(holder, started=holder.started - 1))
    OutputLock(tmp_path).release()


@pytest.mark.parametrize("field", ["boot_id", "pid_namespace"])
def test_a_silent_holder_elsewhere_is_followed(tmp_path, passed, field):
    """On another machine, or in another container of this one, where its number says nothing."""
    holder = replace(of_process(os.getpid()), **{field: "another"})
    leave_lock(tmp_path, holder, silent=SILENCE_SECONDS + 1)
    OutputLock(tmp_path).release()
    assert sum(passed) == WATCH_SECONDS


def test_a_holder_elsewhere_that_gives_a_sign_of_life(tmp_path, pause):
    path = leave_lock(tmp_path, elsewhere(), silent=SILENCE_SECONDS / 2)
    pauses = []

    def live() -> None:
        pauses.append(1)
        if pauses.count(1) == 2:
            path.touch()

    pause(live)
    with pytest.raises(UserError, match="process 4711 on node7"):
        OutputLock(tmp_path, on_wait=lambda: pauses.append(0))
    assert pauses == [0, 1, 0, 1]


def test_a_holder_elsewhere_that_falls_silent_while_it_is_watched(tmp_path, passed, monkeypatch):
    now = leave_lock(tmp_path, elsewhere()).stat().st_mtime
    monkeypatch.setattr(OutputLock, "_now", lambda _: now + sum(passed))
    OutputLock(tmp_path).release()
    assert SILENCE_SECONDS <= sum(passed) <= SILENCE_SECONDS + BEAT_SECONDS


def test_a_clock_that_was_set_back(tmp_path, passed):
    """The dead holder's last touch is an hour in the future."""
    leave_lock(tmp_path, elsewhere(), silent=-3600)
    OutputLock(tmp_path).release()
    assert sum(passed) == SILENCE_SECONDS


def test_a_clock_that_was_set_forward(tmp_path, passed, pause):
    """The holder lives, though its last touch seems to be an hour ago."""
    path = leave_lock(tmp_path, elsewhere(), silent=3600)

    def touch_in_time() -> None:
        passed.append(BEAT_SECONDS)
        path.touch()

    pause(touch_in_time)
    with pytest.raises(UserError, match="process 4711 on node7"):
        OutputLock(tmp_path)
    assert path.exists()


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "\x00" * 300])
def test_a_lock_that_names_nobody(tmp_path, passed, pause, content):
    """As a kill between making and writing it leaves it."""
    path = tmp_path / ".lock"
    path.write_text(content)
    pause(path.touch)
    touch(path, 1)
    with pytest.raises(UserError, match="in use by another run"):
        OutputLock(tmp_path)
    touch(path, SILENCE_SECONDS + 1)
    pause(lambda: passed.append(BEAT_SECONDS))
    OutputLock(tmp_path).release()


def test_of_many_that_find_a_dead_one_a_single_one_follows(tmp_path, sleeper, monkeypatch):
    holder = of_process(sleeper.pid)
    sleeper.kill()
    sleeper.wait()
    monkeypatch.setattr(lock, "_LOOK_SECONDS", 0.001)

    def take(folder: Path) -> OutputLock | None:
        try:
            return OutputLock(folder)
        except UserError:
            return None

    for attempt in range(20):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        leave_lock(folder, holder)
        with ThreadPoolExecutor(8) as pool:
            taken = [each for each in pool.map(take, [folder] * 8) if each is not None]
        assert len(taken) == 1
        taken[0].check()
        taken[0].release()
        assert list(folder.iterdir()) == []


def test_one_that_died_while_it_took_over(tmp_path, sleeper, pause):
    holder = of_process(sleeper.pid)
    sleeper.kill()
    sleeper.wait()
    leave_lock(tmp_path, holder)
    claim = tmp_path / f".lock.{holder.token}"
    claim.touch()
    pause(lambda: claim.exists() and touch(claim, SILENCE_SECONDS + 1))
    OutputLock(tmp_path).release()
    assert list(tmp_path.iterdir()) == []


def test_a_touch_is_a_sign_of_life(tmp_path):
    held = OutputLock(tmp_path)
    path = tmp_path / ".lock"
    touch(path, 1000)
    silent = path.stat().st_mtime
    held.beat()
    assert path.stat().st_mtime > silent + 900
    held.release()


def test_one_that_was_taken_over_stops_and_leaves_the_lock(tmp_path):
    held = OutputLock(tmp_path)
    path = leave_lock(tmp_path, elsewhere(), silent=50)
    before = path.stat().st_mtime
    held.beat()
    assert path.stat().st_mtime == before
    with pytest.raises(UserError, match=r"was taken over by process 4711 on node7 since"):
        held.check()
    held.release()
    assert path.exists()


@pytest.mark.parametrize("is_replaced", [False, True])
def test_an_output_dir_that_vanishes_is_an_error(tmp_path, is_replaced):
    folder = tmp_path / "out"
    folder.mkdir()
    held = OutputLock(folder)
    shutil.rmtree(folder)
    if is_replaced:
        folder.mkdir()
    with pytest.raises(UserError, match="was removed or replaced while the run wrote into it"):
        held.check()
    held.release()


def test_a_lock_that_was_removed_is_made_anew(tmp_path):
    held = OutputLock(tmp_path)
    (tmp_path / ".lock").unlink()
    held.check()
    assert (tmp_path / ".lock").exists()
    held.release()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written(tmp_path):
    with pytest.raises(UserError, match=r"lock .* cannot be taken: No such file"):
        OutputLock(tmp_path / "absent")


@pytest.mark.parametrize("kind", ["file", "below a file", "dangling link", "link loop"])
def test_what_is_no_folder_is_refused_before_the_start(tmp_path, kind):
    folder = tmp_path / "output"
    if "link" in kind:
        folder.symlink_to(folder if "loop" in kind else tmp_path / "nowhere")
    else:
        folder.write_text("")
    if kind == "below a file":
        folder /= "run"
    with pytest.raises(UserError, match=r"output_dir .* cannot be written: .*Set output_dir to"):
        lock.refuse_if_in_use(folder)
