"""Rolls a run back to the newest good checkpoint after a bad step, and skips its samples."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from pypkg.config import Settings
from pypkg.errors import UserError
from pypkg.parallel import mesh
from pypkg.parallel.comm.collective import from_first_rank, is_first_rank
from pypkg.parallel.comm.places import Places
from pypkg.training.checkpoint.folders import remove_checkpoint
from pypkg.training.feed.batch_size import BatchSize
from pypkg.training.healing.left_out import LeftOut
from pypkg.training.healing.spikes import SpikeDetector
from pypkg.training.ledger import LEDGER_FILE, Event, record
from pypkg.training.state import TrainerState
from pypkg.training.step.pending_steps import BadStep

logger = logging.getLogger("pypkg")


_MOST_LISTED = 100  # documents of a corpus that a line of the ledger lists


class Reloads(Protocol):
    def reload(self, checkpoint: Path) -> TrainerState:
        """Restores model and optimizer from a checkpoint. Every rank must call this."""


class KnowsDocuments(Protocol):
    def documents(self, first: int, stop: int) -> dict[str, list[int]]:
        """Documents by corpus that training samples ``first`` to ``stop`` - 1 contain."""


class Healer:
    """Rolls back and skips. Every rank has a healer and makes the same calls.

    Rank 0 writes the ledger.

    Attributes:
        spikes: judges the steps of the run.
    """

    def __init__(
        self,
        settings: Settings,
        state: TrainerState,
        *,
        checkpointer: Reloads,
        samples: KnowsDocuments,
        start: Path | None,
        events: Sequence[Event] = (),
        places: Places = Places(),  # noqa: B008 (it is immutable)
    ) -> None:
        """
        Args:
            state: trainer state at the start of the run.
            start: the checkpoint of ``state``; None for a new run.
            events: ``current_events`` of the run.
            places: which ranks see the same output_dir.
        """
        self._settings, self._places = settings, places
        self._checkpointer, self._samples = checkpointer, samples
        self._events = list(events)
        self._left_out = LeftOut(settings.skips, self._events)
        self._recorded = {e["samples"][0] for e in self._events if e["event"] == "skipped"}
        self._good = [] if start is None else [(state.global_step, start)]
        self._batch_size = BatchSize(settings, mesh.current().sample_shards)
        self.spikes = SpikeDetector(
            (settings.loss_spike_threshold, settings.grad_norm_spike_threshold),
            settings.spike_window,
        )
        self.spikes.load(state.spike_history)

    def leaves_out(self, state: TrainerState) -> bool:
        """Whether the step after ``state`` is skipped. The ledger records a skipped step once."""
        first, step = state.consumed_samples, state.global_step + 1
        stop = first + self._batch_size.samples(first)
        reason = self._left_out.reason(step, first, stop)
        if reason is None:
            return False
        if first not in self._recorded and is_first_rank():
            record(
                self._settings.output_dir,
                "skipped",
                step=step,
                reason=reason,
                samples=[first, stop],
                documents=_bounded(self._samples.documents(first, stop)),
            )
        self._recorded.add(first)
        return True

    def saved(self, state: TrainerState, folder: Path) -> None:
        """Records that ``folder`` is a checkpoint of ``state``, whose steps were good."""
        if not self._settings.ignore_save_lr_and_optim:
            self._good.append((state.global_step, folder))

    def go_back(self, bad: BadStep, state: TrainerState) -> None:
        """Restores ``state``, model and optimizer from a checkpoint before ``bad``.

        The run skips the samples of ``bad`` from then on. Every rank must call this.

        Raises:
            UserError: there is no such checkpoint, or the run has gone back too often already.
        """
        event = from_first_rank(lambda: self._decide(bad, state))
        self._events.append(event)
        self._left_out.add(event)
        checkpoint = dict(self._good)[event["to_step"]]
        logger.warning(
            "%s: going back to %s, and leaving out the samples of steps %d to %d",
            *(bad, checkpoint, *event["steps"]),
        )
        if not self._places.is_one:
            self._places.from_leaders(lambda: self._remove_after(event["to_step"]))
        self._good = [each for each in self._good if each[0] <= event["to_step"]]
        state.become(self._checkpointer.reload(checkpoint))
        self.spikes.load(state.spike_history)

    def _decide(self, bad: BadStep, state: TrainerState) -> Event:
        """Chooses the checkpoint and records the rollback.

        Raises:
            UserError: as ``go_back``; the ledger then records that the run stops.
        """
        s = self._settings
        first = max(bad.step - s.rollback_skip_steps + 1, 1)
        good = [each for each in self._good if each[0] < bad.step and each[1].is_dir()]
        if not good:
            raise self._stop(bad, "there is no checkpoint to go back to")
        if not self._may_go_back(bad.step):
            raise self._stop(
                bad,
                f"max_rollbacks ({s.max_rollbacks}) in rollback_window ({s.rollback_window}) steps "
                f"are used up, as {Path(s.output_dir, LEDGER_FILE)} tells",
            )
        # The newest checkpoint before the steps to skip. If there is none, the oldest one; the
        # steps up to it are not skipped.
        to_step, checkpoint = next((g for g in reversed(good) if g[0] < first), good[0])
        first = max(first, to_step + 1)
        self._remove_after(to_step)

        def samples_before(step: int) -> int:
            steps = state.global_step - step + 1
            return self._batch_size.before(state.consumed_samples, steps)

        return record(
            s.output_dir,
            "rollback",
            step=bad.step,
            reason=bad.reason,
            checkpoint=str(checkpoint),
            to_step=to_step,
            steps=[first, bad.step],
            samples=[samples_before(first), samples_before(bad.step + 1)],
        )

    def _remove_after(self, step: int) -> None:
        """Removes the checkpoints of this place after ``step``."""
        for number, folder in self._good:
            if number > step and folder.is_dir():
                remove_checkpoint(folder)

    def _may_go_back(self, step: int) -> bool:
        """Whether the run has gone back less than ``max_rollbacks`` times in the window.

        The count starts again after the run has stopped, because the user has restarted it.
        """
        earliest, recent = step - self._settings.rollback_window, 0
        for event in self._events:
            if event["event"] == "stopped":
                recent = 0
            recent += event["event"] == "rollback" and event["step"] > earliest
        return recent < self._settings.max_rollbacks

    def _stop(self, bad: BadStep, why: str) -> UserError:
        """Records that the run stops; returns the error to raise."""
        s = self._settings
        record(s.output_dir, "stopped", step=bad.step, reason=bad.reason)
        return UserError(
            f"{bad} (learning_rate {s.learning_rate}, max_grad_norm {s.max_grad_norm}, "
            f"warmup_steps {s.warmup_steps}, "
            f"per_device_train_batch_size {s.per_device_train_batch_size}, seed {s.seed}, "
            f"max_seq_length {s.max_seq_length}), and {why}. Training stopped; checkpoints in "
            f"{s.output_dir} are from before. Lower learning_rate or lengthen the warm-up, then "
            "start the same command again."
        )


def _bounded(documents: dict[str, list[int]]) -> dict[str, list[int] | dict[str, int]]:
    """Documents by corpus; a long list is replaced by its length, first and last document."""
    return {
        corpus: found
        if len(found) <= _MOST_LISTED
        else {"count": len(found), "first": found[0], "last": found[-1]}
        for corpus, found in documents.items()
    }
