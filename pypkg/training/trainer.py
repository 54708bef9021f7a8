"""The training loop: fetch, forward, backward, clip, step, log, evaluate, save."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from itertools import islice

import paddle
from paddle import Tensor
from paddle.profiler import RecordEvent

from pypkg.config import Settings
from pypkg.console.progress import end_start, phase
from pypkg.data import Batch, TimedIterator
from pypkg.parallel import mesh
from pypkg.parallel.comm.random_states import seed_step
from pypkg.parallel.launch import watchdog
from pypkg.training.evaluator import Evaluator
from pypkg.training.feed.batch_size import BatchSize
from pypkg.training.feed.data_source import DataSource
from pypkg.training.healing.healer import Healer
from pypkg.training.interrupt import InterruptRequest
from pypkg.training.reporting.metrics import Throughput, peak_memory_bytes
from pypkg.training.reporting.outcome import Outcome
from pypkg.training.reporting.progress import Progress
from pypkg.training.reporting.reporters import Reporter
from pypkg.training.reporting.source_losses import SourceLosses, named
from pypkg.training.reporting.text_samples import TextSamples
from pypkg.training.state import Saver, TrainerState
from pypkg.training.step.engine import Engine
from pypkg.training.step.pending_steps import BadStep, PendingSteps
from pypkg.training.step.phase_times import SAMPLES
from pypkg.training.step.profiling import StepProfiler
from pypkg.training.step.schedule import learning_rate

logger = logging.getLogger("pypkg")


class Trainer:
    """Trains the model of ``engine`` from ``state`` to the end of the run.

    Every rank has a trainer, and all take the same steps. Counts of samples and tokens are totals
    of all ranks. Losses are in nats per token. Until they are reported or saved, they are those of
    this rank.

    Args:
        data: this rank's batches.
        checkpointer: writes a checkpoint when one is due.
        healer: decides which steps are skipped, and rolls back after a bad step.
        reporters: receive the metrics of a logged step; empty on all ranks but rank 0.
        throughput: measures tokens per second.
        text_samples: writes texts every ``sample_steps``; None: there are none.
        profiler: is called after each trained step; None: nothing is profiled.
    """

    def __init__(
        self,
        settings: Settings,
        engine: Engine,
        state: TrainerState,
        *,
        data: DataSource,
        checkpointer: Saver,
        healer: Healer,
        reporters: Sequence[Reporter],
        throughput: Throughput,
        text_samples: TextSamples | None = None,
        profiler: StepProfiler | None = None,
    ) -> None:
        self.settings = settings
        self.engine = engine
        self.state = state
        self.data = data
        self.checkpointer = checkpointer
        self.healer = healer
        self.reporters = reporters
        self.throughput = throughput
        self.text_samples = text_samples
        self.profiler = profiler
        self.evaluator = Evaluator(settings, engine, state, data)
        self.final_loss: float | None = None
        self._warned_of_no_labels = False
        self._saved_step: int | None = None
        self._has_started = False
        self._start_seconds: dict[str, float] = {}  # by phase, for the first line of metrics
        self._batch_size = BatchSize(settings, mesh.current().sample_shards)
        self._begin()

    def _begin(self) -> None:
        """Resets the loop to ``state``, at the start of the run or after a rollback."""
        state = self.state
        self._pending = PendingSteps(
            state.pending_losses,
            has_loss_scale=self.settings.fp16,
            judge=self.healer.spikes.judge,
        )
        self._is_first_part = state.global_step == state.skipped_steps
        self._source_losses = SourceLosses(
            self.data.sources.get("train", ()), state.pending_source_losses
        )
        self._tokens = 0
        # Learning rate, gradient norm, number of micro batches.
        self._last_update: tuple[float, Tensor, int] | None = None

    def train(self) -> Outcome:
        """Runs to max_steps or to a signal, and saves a checkpoint of the last step.

        Raises:
            UserError: a step went wrong and no rollback is possible, or saving fails.
        """
        settings, state = self.settings, self.state
        watchdog.wait_for_all()  # some ranks may have loaded for longer
        self._read_from_here()
        then = "the run saves after the step or the batch of an evaluation, and ends"
        with InterruptRequest(then) as interrupt, Progress(settings, state.global_step) as progress:
            if state.pending_evaluation and self.evaluator.is_wanted:
                self._evaluate(progress, interrupt)
                self.evaluator.note_best()  # the checkpoint was saved without the result
            elif settings.eval_on_start and state.global_step == 0 and self.evaluator.is_wanted:
                self._evaluate(progress, interrupt)
            self.throughput.restart()
            while state.global_step < settings.max_steps and not watchdog.is_to_stop(
                interrupt.signal_number
            ):
                try:
                    self._advance(progress, interrupt)
                except BadStep as bad:
                    self._go_back(bad, progress)
            stopped_by = watchdog.finish(interrupt.signal_number)
            if stopped_by and settings.saves and state.global_step:
                self._save_before_the_end()
            self.engine.wait()
            self.checkpointer.wait()
            return self._outcome(128 + stopped_by if stopped_by else 0)

    def _read_from_here(self) -> None:
        self._batches = TimedIterator(self.data.train_batches(self.state.consumed_samples))

    def _advance(self, progress: Progress, interrupt: InterruptRequest) -> None:
        """Takes the next step, and logs, evaluates and saves if that is due.

        Raises:
            BadStep: this step or an earlier one went wrong; nothing was logged or saved since.
        """
        settings, state = self.settings, self.state
        is_left_out = self.healer.leaves_out(state)
        if is_left_out:
            self._skip()
        else:
            rate = learning_rate(settings, state.global_step - state.skipped_steps)
            step = self._step if self._has_started else self._first_step
            step(rate)
            if self.profiler is not None:
                self.profiler.end_step(state.global_step)
        self.checkpointer.poll()
        # A skipped step is not logged, evaluated or saved, unless it is the last one.
        if not is_left_out or state.global_step == settings.max_steps:
            if self._is_due(settings.logging_steps) or (
                settings.logging_first_step and state.global_step == 1
            ):
                self._log(progress)
            if self.evaluator.is_wanted and self._is_due(settings.evaluation_interval):
                self._evaluate(progress, interrupt)
            if self.text_samples and self._is_due(settings.sample_steps):
                self.text_samples.write(state.global_step)
                self._leave_out_time()
            if settings.saves and self._is_due(settings.save_interval):
                self._save()
        progress.advance()

    def _is_due(self, interval: int) -> bool:
        """Whether an action is due that takes place every ``interval`` steps and after the last."""
        step = self.state.global_step
        return step % interval == 0 or step == self.settings.max_steps

    def _go_back(self, bad: BadStep, progress: Progress) -> None:
        """Rolls back to a checkpoint before the bad step.

        Raises:
            UserError: there is no such checkpoint, or the run has rolled back too often.
        """
        watchdog.at(self.state.global_step, "going back to a checkpoint")
        self.checkpointer.wait()
        self.healer.go_back(bad, self.state)
        self.state.pending_evaluation = False  # done at the start; its metrics are kept
        step = self.state.global_step
        self._begin()
        self._read_from_here()
        self._saved_step = step
        self.evaluator.forget()
        for reporter in self.reporters:
            reporter.rewind(step)
        if self.text_samples:
            self.text_samples.rewind(step)
        progress.rewind(step)
        self.throughput.restart()

    def evaluate_only(self) -> Outcome:
        """Loss on the validation split, without training."""
        watchdog.wait_for_all()
        with (
            InterruptRequest("the evaluation ends after the batch") as interrupt,
            Progress(self.settings, self.state.global_step) as progress,
        ):
            if self.evaluator.is_wanted:
                self._evaluate(progress, interrupt)
            stopped_by = watchdog.finish(interrupt.signal_number)
        if stopped_by and self.state.pending_evaluation:
            return self._outcome(128 + stopped_by)
        return self._outcome(0)

    def _step(self, rate: float) -> None:
        """One optimizer step; without a label in the global batch, no update and no loss."""
        settings, state = self.settings, self.state
        # The numbers depend on seed and step alone, so a resumed run draws the same ones without
        # generator state in the checkpoint.
        seed_step(settings.seed, state.global_step)
        step = state.global_step + 1
        watchdog.at(step, "reading samples")
        with RecordEvent(SAMPLES):
            micro_batches = [self._source_losses.watch(batch) for batch in self._next_batches()]
        watchdog.at(step, "forward and backward")
        loss = self.engine.forward_backward(micro_batches)
        self._source_losses.collect()
        watchdog.at(step, "update")
        if loss is None:
            grad_norm = paddle.zeros([])
            self._warn_of_no_labels(step)
        else:
            grad_norm = self.engine.update(rate)
            self._pending.add(step, loss, grad_norm)
        self._last_update = rate, grad_norm, len(micro_batches)
        shards = mesh.current().sample_shards
        for batch in micro_batches:
            state.consumed_samples += batch["input_ids"].shape[0] * shards
            self._tokens += batch["input_ids"].size * shards
        state.global_step += 1

    def _next_batches(self) -> Iterator[Batch]:
        return islice(self._batches, self._batch_size.micro_batches(self.state.consumed_samples))

    def _first_step(self, rate: float) -> None:
        """The first step of this process, which ends the start of the run."""
        with phase("first step"):
            self._step(rate)
            if self._last_update is not None:
                float(self._last_update[1])  # waits for the device
        self._has_started = True
        seconds = end_start()
        self._start_seconds = {
            f"start_{name.replace(' ', '_')}_seconds": value for name, value in seconds.items()
        }

    def _warn_of_no_labels(self, step: int) -> None:
        if not self._warned_of_no_labels:
            logger.warning(
                "step %d has no label that counts for the loss, on any rank: it changes nothing. "
                "Loss masks (.lsm, eod_mask_loss) decide what counts; later steps like it are not "
                "reported",
                step,
            )
        self._warned_of_no_labels = True

    def _skip(self) -> None:
        """Skips the samples of a step. As in PaddleNLP, the learning rate does not advance."""
        state = self.state
        watchdog.at(state.global_step + 1, "skipping samples")
        for batch in self._next_batches():
            state.consumed_samples += batch["input_ids"].shape[0] * mesh.current().sample_shards
        state.global_step += 1
        state.skipped_steps += 1

    def _log(self, progress: Progress) -> None:
        watchdog.at(self.state.global_step, "reporting the loss")
        wait_per_batch = self._batches.seconds_per_item()
        losses = self._good_losses()
        self._pending.clear()
        if not losses or self._last_update is None:  # no label counted, or no step was trained
            return
        rate, grad_norm, micro_batches = self._last_update
        self.final_loss = math.fsum(losses) / len(losses)
        speed = self.throughput.interval(self._tokens / mesh.current().world_size)
        metrics = {
            "loss": self.final_loss,
            "learning_rate": rate,
            "grad_norm": float(grad_norm),
            "tokens_per_second_per_device": speed,
            "peak_memory_gib": peak_memory_bytes() / 2**30,
            "consumed_tokens": self._count_tokens(),
            "data_wait_seconds_per_step": wait_per_batch * micro_batches,
        }
        metrics |= named("loss", self._source_losses.take())
        if self.settings.log_layer_grad_norms:
            metrics |= named("grad_norm", self.engine.updater.layer_norms())
        metrics |= self._start_seconds
        self._start_seconds = {}
        mfu = self.throughput.mfu(speed)
        if mfu is not None:
            metrics["mfu"] = mfu
        self._report(metrics)
        progress.log(self.state.global_step, metrics)

    def _evaluate(self, progress: Progress, interrupt: InterruptRequest) -> None:
        metrics = self.evaluator.evaluate(interrupt)
        if metrics is None:
            return
        self._report(metrics)
        progress.log(self.state.global_step, metrics)
        self._leave_out_time()

    def _leave_out_time(self) -> None:
        """Throughput excludes the time since the last log line, so it excludes its tokens too."""
        self._count_tokens()
        self.throughput.restart()

    def _save(self) -> None:
        if self._saved_step == self.state.global_step:
            return
        watchdog.at(self.state.global_step, "saving")
        self.state.pending_losses = self._good_losses()
        self.state.pending_source_losses = self._source_losses.sums()
        self.state.spike_history = self.healer.spikes.history()
        self._count_tokens()
        self.evaluator.note_best()
        self.engine.wait()
        folder = self.checkpointer.save(self.state)
        self.healer.saved(self.state, folder)
        self._saved_step = self.state.global_step
        self.throughput.restart()

    def _save_before_the_end(self) -> None:
        """Saves a checkpoint of a run that a signal stops, if its steps were good."""
        try:
            self._save()
        except BadStep as bad:
            logger.warning("%s: nothing is saved; the next run finds it again", bad)

    def _good_losses(self) -> list[float]:
        """Losses since the last log line.

        Raises:
            BadStep: one of the steps went wrong; nothing was saved since.
        """
        losses, state = self._pending.fetch(), self.state
        if losses and self._is_first_part and state.initial_loss is None:
            state.initial_loss = losses[0]
        return losses

    def _count_tokens(self) -> int:
        self.state.consumed_tokens += self._tokens
        self._tokens = 0
        return self.state.consumed_tokens

    def _report(self, metrics: dict[str, float]) -> None:
        for reporter in self.reporters:
            reporter.report(self.state.global_step, metrics)

    def _outcome(self, exit_code: int) -> Outcome:
        speed = self.throughput.median_tokens_per_second()
        return Outcome(
            state=self.state,
            final_loss=self.final_loss,
            eval_loss=self.evaluator.loss,
            tokens_per_second=speed,
            mfu=self.throughput.mfu(speed) if speed else None,
            peak_memory=peak_memory_bytes(),
            exit_code=exit_code,
        )
