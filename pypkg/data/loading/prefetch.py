"""Prefetching of iterators in threads, and the time that their consumer waits."""

from __future__ import annotations

import atexit
import queue
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

T = TypeVar("T")

_EXIT_SECONDS = 10.0  # wait at the end of the program for an item that a thread is creating


@dataclass
class _End:
    error: BaseException | None


def prefetch(source: Iterator[T], depth: int) -> Generator[T, None, None]:
    """Yields the items of ``source``; a background thread creates up to ``depth`` items ahead.

    An exception of ``source`` is raised here, after the items before it. The thread ends when the
    iterator is exhausted, closed or garbage-collected, at the latest at the end of the program,
    which waits up to 10 seconds for an item in progress.
    """
    items: queue.Queue[Any] = queue.Queue(depth)
    stop = threading.Event()
    thread = threading.Thread(target=_fill, args=(source, items, stop), daemon=True)

    def end(limit: float | None = _EXIT_SECONDS) -> None:
        stop.set()
        if thread.is_alive():  # a thread that starts after this line ends by itself
            thread.join(limit)

    try:
        # A thread that returns from C++ into an interpreter during shutdown aborts the process.
        atexit.register(end)
        thread.start()
        while True:
            item = items.get()
            if isinstance(item, _End):
                if item.error is not None:
                    raise item.error
                return
            yield item
    finally:
        atexit.unregister(end)
        end(None)


def prefetch_in_turn(sources: Sequence[Iterator[T]], depth: int) -> Iterator[T]:
    """Yields one item of each of ``sources`` in turn; each source has a thread of its own.

    The iterator ends when the first source ends. Exceptions and threads behave as in
    :func:`prefetch`. ``depth`` is the number of items ahead of all sources together.
    """
    ahead = [prefetch(source, max(1, depth // len(sources))) for source in sources]
    try:
        while True:
            for items in ahead:
                try:
                    item = next(items)
                except StopIteration:
                    return
                yield item
    finally:
        for items in ahead:
            items.close()


class TimedIterator(Generic[T]):
    """Yields the items of ``source`` and measures the time that the consumer waits for them."""

    def __init__(self, source: Iterator[T]) -> None:
        self._source = source
        self._seconds = 0.0
        self._items = 0

    def __iter__(self) -> TimedIterator[T]:
        return self

    def __next__(self) -> T:
        begin = time.perf_counter()
        try:
            item = next(self._source)
        finally:
            self._seconds += time.perf_counter() - begin
        self._items += 1
        return item

    def seconds_per_item(self) -> float:
        """Mean wait per item in seconds since the last call."""
        seconds, items = self._seconds, self._items
        self._seconds, self._items = 0.0, 0
        return seconds / max(items, 1)


def _fill(source: Iterator[Any], items: queue.Queue[Any], stop: threading.Event) -> None:
    if stop.is_set():  # Ctrl-C interrupted the start
        return
    error: BaseException | None = None
    try:
        for item in source:
            if not _put(item, items, stop):
                return
    except BaseException as raised:
        error = raised
    _put(_End(error), items, stop)


def _put(item: Any, items: queue.Queue[Any], stop: threading.Event) -> bool:
    """Puts ``item`` into the queue when it has room; returns False if the consumer is gone."""
    while not stop.is_set():
        try:
            items.put(item, timeout=0.1)
        except queue.Full:
            continue
        return True
    return False
