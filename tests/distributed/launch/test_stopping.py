"""A signal stops all ranks after the same step, wherever each of them is when it comes."""

from __future__ import annotations

import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from pypkg.parallel.endpoints import free_ports
from pypkg.parallel.launch.watchdog import Watchdog

STEPS = 6
TERM = signal.SIGTERM


@pytest.fixture
def two_ranks(monkeypatch):
    """Two ranks' watchdogs in this process, each used by a thread of its own."""
    monkeypatch.setenv("PYPKG_WATCH_ENDPOINT", f"127.0.0.1:{free_ports(1)[0]}")
    monkeypatch.setenv("PYPKG_START_SECONDS", "60")
    ranks = [Watchdog(rank, 2) for rank in range(2)]
    yield ranks
    for rank in reversed(ranks):
        rank.leave()


def train(rank: Watchdog, collective: threading.Barrier, signalled: dict[int, signal.Signals]):
    """The trainer's loop; ``signalled`` has the signal that this rank sees after a step."""
    step = 0
    while step < STEPS and not rank.is_to_stop(signalled.get(step)):
        collective.wait(5)  # a step ends on no rank before all have begun it
        step += 1
    return step, rank.finish()


def run_both(ranks, signalled):
    collective = threading.Barrier(2)
    with ThreadPoolExecutor(2) as pool:
        futures = [
            pool.submit(train, rank, collective, when)
            for rank, when in zip(ranks, signalled, strict=True)
        ]
        return [future.result(20) for future in futures]


def test_a_rank_that_waits_in_the_next_step_for_the_one_with_the_signal(two_ranks, capfd):
    first, second = two_ranks
    began = time.monotonic()
    assert not first.is_to_stop(None)  # and now its main thread waits in step 3
    assert not second.is_to_stop(TERM)
    assert first.is_to_stop(None)
    assert second.is_to_stop(TERM)
    assert [rank.finish() for rank in two_ranks] == [TERM, TERM]
    assert time.monotonic() - began < 20  # no wait ran into its limit
    assert capfd.readouterr().err == "rank 1 received SIGTERM: the run ends\n"


def test_one_that_has_left_stops_nobody(two_ranks):
    first, second = two_ranks
    assert second.finish() is None
    second.leave()
    assert not first.is_to_stop(TERM)
    assert first.finish() is None


def test_all_get_the_signal(two_ranks):
    (one, other) = run_both(two_ranks, ({3: TERM}, {3: TERM}))
    assert one == other
    assert one[0] in (3, 4)
    assert one[1] == TERM


def test_a_signal_in_the_last_step(two_ranks):
    (one, other) = run_both(two_ranks, ({STEPS - 1: TERM}, {}))
    assert one == other
    assert one in ((STEPS - 1, TERM), (STEPS, TERM), (STEPS, None))


def test_one_that_has_finished_is_not_stopped(two_ranks):
    first, second = two_ranks
    assert first.finish() is None
    assert not second.is_to_stop(TERM)
    assert second.finish() is None


def test_no_signal(two_ranks):
    assert run_both(two_ranks, ({}, {})) == [(STEPS, None)] * 2
