"""Parts of tensors that pass from ranks to writers through shared memory."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from pypkg.models.weights import staging
from pypkg.models.weights.area import (
    Area,
    AreaPlace,
    AreaSize,
    LostRankError,
    Staging,
    new_area,
)
from pypkg.models.weights.staging import Receiver, Sender

RANKS, UNITS = 3, 60


def stagings(capacity: int) -> list[Staging]:
    """Of each rank, all with the same areas."""
    made = [new_area(AreaSize(capacity, RANKS, UNITS)) for _ in range(RANKS)]
    for _, _, area in made:
        area.empty()
    areas = {rank: area for rank, (_, _, area) in enumerate(made)}
    return [Staging(rank, areas) for rank in range(RANKS)]


def parts(capacity: int) -> dict[tuple[int, int], np.ndarray]:
    """Of each unit and rank: empty ones, ones that fill the area, and larger ones."""
    random = np.random.default_rng(0)
    sizes = np.concatenate([[0, 1, capacity, capacity + 1, 3 * capacity + 5],
                            random.integers(0, capacity, UNITS - 5)])  # fmt: skip
    random.shuffle(sizes)
    return {
        (unit, rank): random.integers(0, 256, size, np.uint8)
        for unit, size in enumerate(sizes)
        for rank in range(RANKS)
    }


def in_threads(*work: Callable[[], None]) -> None:
    """Raises what one of them raises."""
    failures: list[BaseException] = []

    def run(each: Callable[[], None]) -> None:
        try:
            each()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=[each], daemon=True) for each in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    if failures:
        raise failures[0]


@pytest.mark.parametrize("capacity", [256, 8192, 1 << 20])
def test_every_part_arrives_whatever_fits_at_once(capacity: int) -> None:
    """Each rank sends and writes; the writer of a unit needs the parts of all ranks."""
    of_ranks, sent = stagings(capacity), parts(min(capacity, 8192))

    def send(rank: int) -> None:
        sender = Sender(of_ranks[rank])
        for unit in range(UNITS):
            sender.put(unit, unit % RANKS, sent[unit, rank])
        sender.flush()
        of_ranks[rank].areas[rank].let_take()

    def write(writer: int) -> None:
        receiver = Receiver(of_ranks[writer], lambda: None)
        for unit in range(writer, UNITS, RANKS):
            taken = [receiver.take(unit, rank) for rank in range(RANKS)]
            assert all(np.array_equal(each, sent[unit, rank]) for rank, each in enumerate(taken))
            receiver.release()

    in_threads(*(lambda rank=rank: send(rank) for rank in range(RANKS)),
               *(lambda rank=rank: write(rank) for rank in range(RANKS)))  # fmt: skip


def test_writers_leave_the_cores_to_ranks_that_copy() -> None:
    """A rank without room waits for them, so they begin."""
    first, second, third = stagings(256)
    begun = threading.Event()

    def write() -> None:
        Receiver(first, lambda: None).wait_for_copies()
        begun.set()

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    first.areas[0].let_take()
    third.areas[2].let_take()
    sender = Sender(second, lambda: second.areas[1].take_nothing_more() if begun.wait(60) else None)
    sender.put(0, 1, np.zeros(200, np.uint8))
    assert not begun.is_set()
    sender.put(1, 1, np.zeros(200, np.uint8))
    assert begun.is_set()


def test_a_writer_that_has_ended_holds_nobody_up() -> None:
    """The parts that it would have taken make room for those of the others."""
    first, second, _ = stagings(256)
    sent = [np.full(200, unit, np.uint8) for unit in range(4)]
    second.areas[1].take_nothing_more()

    def send() -> None:
        sender = Sender(first)
        for unit, part in enumerate(sent):
            sender.put(unit, 0 if unit == 3 else 1, part)
        sender.flush()
        first.areas[0].let_take()

    in_threads(send)
    assert np.array_equal(Receiver(first, lambda: None).take(3, 0), sent[3])


def test_a_part_that_will_not_come_is_no_endless_wait() -> None:
    def check() -> None:
        raise EOFError

    with pytest.raises(EOFError):
        Receiver(stagings(256)[0], check).take(0, 1)


@pytest.fixture
def beside_another(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Staging, subprocess.Popen]]:
    """Of rank 0, which may look at once whether rank 1, another process, still runs."""
    monkeypatch.setattr(staging, "_SECONDS_BETWEEN_LOOKS", 0.0)
    size = AreaSize(256, 2, UNITS)
    _, place, area = new_area(size)
    code = (
        f"from pypkg.models.weights.area import AreaSize, new_area; {size=}\n"
        "_, place, area = new_area(size); area.empty()\n"
        "print(place.path, *place.identity, flush=True); input()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None  # it is a pipe
    path, device, inode = process.stdout.readline().split()
    other = AreaPlace(path, (int(device), int(inode)), size)
    area.empty()
    yield Staging(0, {0: area, 1: other.open()}, {0: place, 1: other}), process
    process.communicate()


def test_a_rank_that_has_ended_is_named(
    beside_another: tuple[Staging, subprocess.Popen],
) -> None:
    """By one that waits for a part of it, and by one whose parts it has yet to take."""
    own, process = beside_another
    waits = 0

    def check() -> None:
        nonlocal waits
        waits += 1
        if waits == 5:  # until then the other runs, and is waited for
            process.kill()
            process.wait()

    with pytest.raises(LostRankError, match="rank 1 of this machine has ended before it sent"):
        Receiver(own, check).take(0, 1)
    assert waits >= 5
    sender = Sender(own)
    sender.put(0, 1, np.zeros(200, np.uint8))
    with pytest.raises(
        LostRankError, match=r"rank 1 of this machine has ended before it wrote what rank 0 sent"
    ):
        sender.put(1, 1, np.zeros(200, np.uint8))


def test_what_a_rank_has_put_in_before_its_end_arrives(
    beside_another: tuple[Staging, subprocess.Popen],
) -> None:
    own, process = beside_another
    part = np.arange(200, dtype=np.uint8)
    sender = Sender(Staging(1, own.areas, own.places))  # as the other process would do
    sender.put(3, 0, part)
    sender.flush()
    process.kill()
    process.wait()
    assert np.array_equal(Receiver(own, lambda: None).take(3, 1), part)


def test_a_rank_that_has_given_up_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though its process goes on."""
    monkeypatch.setattr(staging, "_SECONDS_BETWEEN_LOOKS", 0.0)
    first, second, _ = stagings(256)
    second.areas[1].give_up()
    with pytest.raises(LostRankError, match="rank 1 "):
        Receiver(first, lambda: None).take(0, 1)


def test_another_file_is_no_area() -> None:
    """As where a number of a process means another process in another container."""
    _, place, area = new_area(AreaSize(256, 1, 1))
    area.data[:] = 7
    again: Area = place.open()
    assert (again.data == 7).all()
    _, other, _ = new_area(AreaSize(256, 1, 1))
    with pytest.raises(FileNotFoundError):
        AreaPlace(place.path, other.identity, place.size).open()
