"""Turns Ctrl-C and SIGTERM into a request that the training loop honours between two steps."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType

_Handler = Callable[[int, FrameType | None], object] | int | None  # as ``signal.signal`` has it


class InterruptRequest:
    """While entered, the first signal sets :attr:`signal_number`; a second one interrupts."""

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self._previous: dict[int, _Handler] = {}

    def __enter__(self) -> InterruptRequest:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal_number is not None:
            raise KeyboardInterrupt
        self.signal_number = number

    def __bool__(self) -> bool:
        return self.signal_number is not None
