"""Ranks and coordinator watch each other; who is stopped, late or gone is named, nobody else."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import forked
import pytest
from distributed_testing import REPO, rank_environment, start_rank

from pypkg.console import progress
from pypkg.errors import UserError
from pypkg.parallel.endpoints import free_ports
from pypkg.parallel.launch import clock, verdicts
from pypkg.parallel.launch.verdicts import Failure, Member
from pypkg.parallel.launch.watchdog import Watchdog

WATCHED = Path(__file__).with_name("watched_rank.py")
TIMEOUT = (
    "RuntimeError: [/paddle/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:80] TIMEOUT "
    "self_rank = none pair_rank = 1 peer_str = none"
)


class Listener:
    """A program that accepts connections, and answers with some bytes or not at all."""

    def __init__(self, answer: bytes) -> None:
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        self.received = b""
        self._answer = answer
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while True:
            connection, _ = self._server.accept()
            with connection, contextlib.suppress(OSError):
                connection.sendall(self._answer)
                while data := connection.recv(1 << 16):
                    self.received += data

    def messages(self) -> list[dict]:
        return [json.loads(line) for line in self.received.splitlines()]


@pytest.fixture
def listener(monkeypatch, request):
    held = Listener(request.param)
    monkeypatch.setenv("PYPKG_WATCH_ENDPOINT", f"127.0.0.1:{held.port}")
    return held


def lines(*messages: dict) -> bytes:
    return b"".join(json.dumps(message).encode() + b"\n" for message in messages)


@pytest.mark.parametrize(
    "listener",
    [lines({"kind": "welcome"}, {"kind": "heartbeat", "place": "at step 3, update"})],
    indirect=True,
)
def test_a_silent_coordinator_ends_the_rank_with_its_name(listener, monkeypatch):
    monkeypatch.setenv("PYPKG_SILENCE_SECONDS", "0.5")
    ended, texts = threading.Event(), []

    def end(self: Watchdog, message: str, exit_code: int, stacks: bool) -> None:
        texts.append((message, exit_code))
        self.leave()
        ended.set()

    monkeypatch.setattr(Watchdog, "_end", end)
    Watchdog(1, 2)
    assert ended.wait(60)
    [(text, code)] = texts
    assert text.startswith("no heartbeat from rank 0 for ")
    assert text.endswith("rank 0 was last at step 3, update")
    assert code == 1
    deadline = time.monotonic() + 60
    while not any(m["kind"] == "failed" for m in listener.messages()):
        assert time.monotonic() < deadline
    [told] = [m for m in listener.messages() if m["kind"] == "failed"]
    assert told["lost_coordinator"]


@pytest.mark.parametrize(
    ("listener", "words"),
    [
        (b"", "accepts connections at this port but does not answer as rank 0"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", "another program answers at this port"),
    ],
    indirect=["listener"],
)
def test_a_port_that_another_program_holds(listener, words, monkeypatch):
    monkeypatch.setenv("PYPKG_START_SECONDS", "0.5")
    with pytest.raises(UserError, match=words) as caught:
        Watchdog(1, 2)
    assert f"rank 1 could not join rank 0 at 127.0.0.1:{listener.port}" in str(caught.value)


def test_a_held_port_of_fleet_is_told_before_fleet_starts(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as held:
        port = held.getsockname()[1]
        monkeypatch.setenv("PADDLE_MASTER", f"127.0.0.1:{port}")
        monkeypatch.setenv("PYPKG_WATCH_ENDPOINT", f"127.0.0.1:{free_ports(1)[0]}")
        rank = Watchdog(0, 2)
        with pytest.raises(UserError, match=f"port {port} of PADDLE_MASTER"):
            rank.compare_settings("{}")
        rank.leave()


@pytest.fixture
def two_ranks(monkeypatch):
    monkeypatch.setenv("PYPKG_WATCH_ENDPOINT", f"127.0.0.1:{free_ports(1)[0]}")
    ranks = [Watchdog(rank, 2) for rank in range(2)]
    yield ranks
    for rank in reversed(ranks):
        rank.leave()


def test_wait_for_all_has_no_limit_of_its_own(two_ranks):
    first, second = two_ranks
    with ThreadPoolExecutor(1) as pool:
        for _ in range(2):
            waiting = pool.submit(first.wait_for_all)
            time.sleep(0.2)
            assert not waiting.done()
            second.wait_for_all()
            waiting.result(60)


def test_reports_of_progress_reach_the_watchdog(two_ranks):
    first = two_ranks[0]
    first.at(3, "saving")
    before = first._heartbeat()
    progress.listen(first.progress)
    progress.report("writing model.safetensors")
    progress.listen(None)
    progress.report("nobody listens")
    heartbeat = first._heartbeat()
    assert (heartbeat["step"], heartbeat["operation"]) == (3, "writing model.safetensors")
    assert heartbeat["count"] == before["count"] + 1


def test_a_stopped_process_does_not_count_the_time(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(clock.time, "monotonic", lambda: now[0])
    running = clock.RunningClock(longest=1.0)
    now[0] += 0.5
    assert running.tick() == 0.5
    assert running.recent_pause() == 0
    now[0] += 3600
    assert running.tick() == 1.5
    assert running.recent_pause() == 3600
    for _ in range(60):
        now[0] += 1
        running.tick()
    assert running.recent_pause() == 0


def member(operation: str, count: int, **fields) -> Member:
    return Member(stream=None, **({"heard": 100.0, "step": 3} | fields), operation=operation,
                  count=count)  # fmt: skip


def failure(message: str, **fields) -> Failure:
    return Failure(**({"message": message, "exit_code": 1, "details": "", "at": 100.0} | fields))


def test_a_failed_wait_names_the_silent_rank():
    framed = f"OSError: (External)\n{{ === Error message in backward ===\n  {TIMEOUT}\n}}"
    members = {
        0: member("update", 9, failure=failure(framed, details="Traceback ...")),
        1: member("update", 9, heard=69.0),
    }
    found = verdicts.of_failures(members, 2, 100.0, pause=0)
    assert found.message == (
        "no heartbeat from rank 1 for 31 s: rank 1 was last at step 3, update; rank 0, at step 3, "
        f"update, waited and failed: {TIMEOUT}"
    )


def test_a_failed_wait_names_the_rank_that_is_behind():
    members = {
        0: member("update", 9, failure=failure(TIMEOUT)),
        1: member("forward and backward", 8),
        2: member("update", 9),
    }
    found = verdicts.of_failures(members, 3, 100.0, pause=0)
    assert found.message.startswith("rank 1 is at step 3, forward and backward; rank 0, at step 3,")


def test_the_cause_is_told_and_not_the_waits_that_failed_before_it():
    members = {
        0: member("update", 9, failure=failure(TIMEOUT)),
        1: member("saving", 9, failure=failure("the disk is full", exit_code=2, at=100.5)),
    }
    found = verdicts.of_failures(members, 2, 101.0, pause=0)
    assert found.message == "rank 1, at step 3, saving: the disk is full"
    assert found.exit_code == 2


def test_rank_0_was_stopped_and_blames_nobody():
    gone = member("update", 9, gone=True)
    lost = "no heartbeat from rank 0 for 8 s: rank 0 was last at step 3, update"
    told = member("update", 9, gone=True, failure=failure(lost, lost_coordinator=True))
    reset = failure("RuntimeError: Connection reset by peer", details="Traceback ...")
    members = {0: member("update", 9, failure=reset), 1: told, 2: gone}
    found = verdicts.of_failures(members, 3, 100.0, pause=30)
    assert found.message == f"rank 1 ended: {lost}"
    timeout = failure(TIMEOUT, details="Traceback ...", at=99.0)
    failed = member("update", 9, gone=True, failure=timeout)
    members = {0: member("update", 9, failure=reset), 1: failed}
    found = verdicts.of_failures(members, 2, 100.0, pause=30)
    assert found.message.startswith("rank 0 did not run for 30 s")
    assert found.message.endswith(f"rank 1, at step 3, update, waited and failed: {TIMEOUT}")
    members = {0: member("update", 9, failure=reset), 1: gone}
    found = verdicts.of_failures(members, 2, 100.0, pause=30)
    assert found.message.startswith("rank 0 did not run for 30 s")


def test_only_a_run_of_which_no_rank_gets_on_hangs():
    writes, waits = member("writing x", 20, idle=1.0), member("saving", 9, idle=99.0, waits=True)
    assert verdicts.of_hang({0: writes, 1: waits}, 10) is None
    writes.idle = 11.0
    found = verdicts.of_hang({0: writes, 1: waits}, 10)
    assert "no progress for 10 s. rank 0 is at step 3, writing x, and the others" in found.message
    assert verdicts.of_hang({0: writes, 1: waits}, 0) is None


def test_a_run_that_all_ranks_have_left_does_not_hang():
    assert verdicts.of_hang({rank: member("saving", 9, left=True) for rank in (0, 1)}, 10) is None


class Ranks:
    """Two watched ranks without Paddle's part, which have started."""

    def __init__(self, folder: Path) -> None:
        self.stop = folder / "stop"
        self.logs = [folder / f"rank{rank}.log" for rank in range(2)]
        limits = {"PYPKG_SILENCE_SECONDS": "4", "PYPKG_HANG_SECONDS": "4"}
        ports = free_ports(2)
        self.processes = []
        for rank, path in enumerate(self.logs):
            with path.open("wb") as log:
                self.processes.append(
                    start_rank([WATCHED, self.stop], rank_environment(rank, ports) | limits, log)
                )
        deadline = time.monotonic() + 60
        while not all((folder / f"started{rank}").exists() for rank in range(2)):
            assert time.monotonic() < deadline, [path.read_text() for path in self.logs]
            time.sleep(0.05)

    def signal(self, rank: int, number: int) -> None:
        os.kill(self.processes[rank].pid, number)

    def said(self, rank: int) -> str:
        text = self.logs[rank].read_text()
        assert text.count("error: ") <= 1, text
        assert "Traceback" not in text
        return text


@pytest.fixture
def ranks(tmp_path):
    started = Ranks(tmp_path)
    yield started
    for process in started.processes:
        forked.kill_group(process)


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_rank_is_named_by_the_other_and_by_itself(ranks, stopped):
    other = 1 - stopped
    ranks.signal(stopped, signal.SIGSTOP)
    assert ranks.processes[other].wait(120) == 1
    assert f"no heartbeat from rank {stopped} for" in ranks.said(other)
    assert f"rank {stopped} was last " in ranks.said(other)
    time.sleep(2)  # the stopped one has been away for more than 5 s
    ranks.signal(stopped, signal.SIGCONT)
    assert ranks.processes[stopped].wait(120) == 1
    assert f"no heartbeat from rank {stopped} for" in ranks.said(stopped)


@pytest.mark.slow
def test_a_run_that_was_stopped_as_a_whole_goes_on(ranks):
    for number in (signal.SIGSTOP, signal.SIGCONT):
        ranks.signal(0, number)
        ranks.signal(1, number)
        time.sleep(4.8)
    ranks.stop.touch()
    assert [process.wait(60) for process in ranks.processes] == [0, 0]
    assert not any(ranks.said(rank) for rank in range(2))


def test_a_rank_whose_fleet_start_takes_too_long_ends_with_a_stack_trace():
    """As where another rank has ended, and fleet's own wait lasts for 15 minutes."""
    script = (
        "import time\n"
        "from pypkg.parallel.launch import watchdog\n"
        "watchdog._watchdog = object()\n"
        "def wait_in_fleet():\n"
        "    time.sleep(600)\n"
        "with watchdog.starting_fleet():\n"
        "    wait_in_fleet()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": str(REPO), "PYPKG_START_SECONDS": "0.2"},
    )  # fmt: skip
    assert done.returncode == 1
    assert "Timeout" in done.stderr and "in wait_in_fleet" in done.stderr
