"""Parts of tensors that pass from ranks to writers through shared memory."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import pytest

from pypkg.models.weights.staging import (
    Area,
    AreaPlace,
    AreaSize,
    Receiver,
    Sender,
    Staging,
    new_area,
)

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


def test_another_file_is_no_area() -> None:
    """As where a number of a process means another process in another container."""
    _, place, area = new_area(AreaSize(256, 1, 1))
    area.data[:] = 7
    again: Area = place.open()
    assert (again.data == 7).all()
    _, other, _ = new_area(AreaSize(256, 1, 1))
    with pytest.raises(FileNotFoundError):
        AreaPlace(place.path, other.identity, place.size).open()
