"""Host and device time of the phases of a step.

The host time of a phase ends when its calls return. On a GPU the calls return before the device has
finished. The device time is measured between two events on the stream, before the first kernel of
the phase and after its last. If the host time is as long as the device time, the device waits for
the host. On a CPU the operators are finished when their calls return, and there is no device time.

No GPU has run the part with the events yet.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import paddle

SAMPLES, FORWARD_BACKWARD, UPDATE = "samples", "forward and backward", "update"


@dataclass
class PhaseTimes:
    """Sums of seconds by phase. ``device`` is empty on a CPU."""

    host: dict[str, float] = field(default_factory=dict)
    device: dict[str, float] = field(default_factory=dict)

    def add(self, phase: str, host: float, device: float | None = None) -> None:
        self.host[phase] = self.host.get(phase, 0.0) + host
        if device is not None:
            self.device[phase] = self.device.get(phase, 0.0) + device

    @contextlib.contextmanager
    def measuring(self, phase: str) -> Iterator[None]:
        """Adds the times of the block. On a GPU it ends with a synchronization."""
        events = _events()
        begin = time.perf_counter()
        if events is not None:
            events[0].record()
        yield
        host = time.perf_counter() - begin
        if events is None:
            self.add(phase, host)
            return
        events[1].record()
        finish()
        self.add(phase, host, events[0].elapsed_time(events[1]) / 1e3)


def finish() -> None:
    """Waits until the GPU is idle."""
    if paddle.device.get_device().startswith("gpu"):
        paddle.device.synchronize()


def _events() -> tuple[paddle.device.Event, paddle.device.Event] | None:
    """Two events on the stream of the GPU; None on a CPU."""
    if not paddle.device.get_device().startswith("gpu"):
        return None
    return paddle.device.Event(enable_timing=True), paddle.device.Event(enable_timing=True)
