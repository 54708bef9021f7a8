"""Evaluation on the validation split, during training or without it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pypkg.config import Settings
from pypkg.data import Batch
from pypkg.errors import memory_shortage
from pypkg.parallel.launch import watchdog
from pypkg.training.checkpoint.folders import checkpoint_name
from pypkg.training.feed.data_source import DataSource
from pypkg.training.interrupt import InterruptRequest
from pypkg.training.reporting.outcome import perplexity
from pypkg.training.reporting.source_losses import SourceLosses, named
from pypkg.training.state import TrainerState
from pypkg.training.step.engine import Engine


class Evaluator:
    """Evaluates the model of ``engine``. Every rank has one and calls it at the same steps.

    Args:
        state: state of the run; ``pending_evaluation`` and the best checkpoint are stored in it.
        data: provides this rank's batches of the validation split.

    Attributes:
        loss: loss of the newest evaluation, in nats per token; None if there was none since the
            start or the last rollback.
    """

    def __init__(
        self, settings: Settings, engine: Engine, state: TrainerState, data: DataSource
    ) -> None:
        self._settings, self._engine, self._state, self._data = settings, engine, state, data
        self._source_losses = SourceLosses(data.sources.get("valid", ()))
        self.forget()

    @property
    def is_wanted(self) -> bool:
        """Whether the run evaluates and has a validation split."""
        return self._settings.evaluates and "valid" in self._data.sources

    def forget(self) -> None:
        """Drops the newest evaluation, which a rollback has undone."""
        self.loss: float | None = None
        self._evaluated_step: int | None = None

    def evaluate(self, interrupt: InterruptRequest) -> dict[str, float] | None:
        """Evaluates at the current step.

        Returns:
            Metrics by name: losses in nats per token, and the perplexity. None if a signal stopped
            the evaluation; ``state.pending_evaluation`` is true then.

        Raises:
            UserError: the batches exhaust the memory.
        """
        self._state.pending_evaluation = False
        batches = self._until_stopped(self._data.eval_batches(), interrupt)
        with evaluation_memory(self._settings.per_device_eval_batch_size):
            loss = self._engine.evaluate(map(self._source_losses.watch, batches))
        if self._state.pending_evaluation:
            return None
        self.loss = loss
        self._source_losses.collect()
        self._evaluated_step = self._state.global_step
        metrics = {"eval_loss": loss, "eval_perplexity": perplexity(loss)}
        return metrics | named("eval_loss", self._source_losses.take())

    def _until_stopped(
        self, batches: Iterator[Batch], interrupt: InterruptRequest
    ) -> Iterator[Batch]:
        """Yields ``batches`` until a signal stops them, after the same number on all ranks."""
        for number, batch in enumerate(batches, 1):
            if number > 1 and watchdog.is_to_stop(interrupt.signal_number):
                self._state.pending_evaluation = True
                return
            watchdog.at(self._state.global_step, f"batch {number} of the evaluation")
            yield batch

    def note_best(self) -> None:
        """Records whether the checkpoint of this step has the lowest validation loss."""
        state = self._state
        loss = self.loss if self._evaluated_step == state.global_step else None
        if not self._settings.load_best_model_at_end or loss is None:
            return
        if state.best_loss is None or loss < state.best_loss:
            state.best_loss, state.best_checkpoint = loss, checkpoint_name(state)


@contextmanager
def evaluation_memory(batch_size: int) -> Iterator[None]:
    """Raises UserError if memory runs out in its block, an evaluation of ``batch_size`` samples."""
    try:
        yield
    except Exception as error:
        way_out = f"Lower per_device_eval_batch_size, which is {batch_size}"
        if shortage := memory_shortage(error, way_out):
            raise shortage from error
        raise
