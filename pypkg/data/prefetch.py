"""Running an iterator ahead in a thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass
class _End:
    error: BaseException | None


def prefetch(source: Iterator[T], depth: int) -> Iterator[T]:
    """The items of ``source``, up to ``depth`` of them made ahead by a background thread.

    What ``source`` raises is raised here, after the items before it. The thread ends when the
    iterator is exhausted, closed or forgotten, and never keeps the program from ending.
    """
    items: queue.Queue[Any] = queue.Queue(depth)
    stop = threading.Event()
    thread = threading.Thread(target=_fill, args=(source, items, stop), daemon=True)
    thread.start()
    try:
        while True:
            item = items.get()
            if isinstance(item, _End):
                if item.error is not None:
                    raise item.error
                return
            yield item
    finally:
        stop.set()
        thread.join()


def _fill(source: Iterator[Any], items: queue.Queue[Any], stop: threading.Event) -> None:
    error: BaseException | None = None
    try:
        for item in source:
            if not _put(item, items, stop):
                return
    except BaseException as raised:
        error = raised
    _put(_End(error), items, stop)


def _put(item: Any, items: queue.Queue[Any], stop: threading.Event) -> bool:
    """Waits for a free place; False when the consumer has gone."""
    while not stop.is_set():
        try:
            items.put(item, timeout=0.1)
        except queue.Full:
            continue
        return True
    return False
