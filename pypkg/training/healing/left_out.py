"""Which global batches a run skips: those of ``skip_data_intervals``, and those of rollbacks."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from pypkg.training.ledger import Event


class LeftOut:
    """The steps in ``skip_data_intervals``, and the samples of rollbacks in the ledger.

    Rollbacks record samples instead of steps, because a resumed run with another global batch has
    the same samples in other steps.

    Args:
        by_hand: says whether a step, counted from 1, is in ``skip_data_intervals``.
        events: the events of the ledger.
    """

    def __init__(self, by_hand: Callable[[int], bool], events: Iterable[Event] = ()) -> None:
        self._by_hand = by_hand
        self._samples: list[tuple[int, int]] = []
        for event in events:
            self.add(event)

    def add(self, event: Event) -> None:
        """Adds the samples of ``event``, if it is a rollback."""
        if event["event"] == "rollback":
            first, stop = event["samples"]
            self._samples.append((first, stop))

    def reason(self, step: int, first: int, stop: int) -> str | None:
        """Why a global batch is skipped: "skip_data_intervals" or "rollback"; None if it is not.

        Args:
            step: its step, counted from 1.
            first, stop: its samples [first, stop).
        """
        if self._by_hand(step):
            return "skip_data_intervals"
        if any(begin < stop and first < end for begin, end in self._samples):
            return "rollback"
        return None
