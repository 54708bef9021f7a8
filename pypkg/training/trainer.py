"""The training loop: fetch, forward, backward, clip, step, log, evaluate, save."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import paddle
from paddle import Tensor

from pypkg.config import Settings
from pypkg.data import Batch
from pypkg.errors import UserError
from pypkg.training.checkpoint import TrainerState
from pypkg.training.interrupt import InterruptRequest
from pypkg.training.metrics import Throughput, peak_memory_bytes
from pypkg.training.optimizer import clip_by_global_norm
from pypkg.training.progress import Progress
from pypkg.training.reporters import Reporter
from pypkg.training.schedule import learning_rate

logger = logging.getLogger("pypkg")

# Yields the arguments of the model's loss from a sample position on; input_ids and labels are
# int64 [batch, sequence].
BatchSource = Callable[[int], Iterator[Batch]]


@dataclass
class Outcome:
    """How a run ended. exit_code is 0, or 128 + the signal that stopped it."""

    state: TrainerState
    final_loss: float | None
    eval_loss: float | None
    tokens_per_second: float | None
    mfu: float | None
    peak_memory: int
    exit_code: int = 0


class Trainer:
    """Trains ``model`` as the settings say, from ``state`` on."""

    def __init__(
        self,
        settings: Settings,
        model: paddle.nn.Layer,
        optimizer: paddle.optimizer.Optimizer,
        state: TrainerState,
        *,
        train_batches: BatchSource,
        eval_batches: BatchSource | None,
        save: Callable[[TrainerState], Path],
        reporters: list[Reporter],
        throughput: Throughput,
    ) -> None:
        self.settings = settings
        self.model = model
        self.optimizer = optimizer
        self.state = state
        self.train_batches = train_batches
        self.eval_batches = eval_batches
        self.save = save
        self.reporters = reporters
        self.throughput = throughput
        self.parameters = [p for p in model.parameters() if not p.stop_gradient]
        self.final_loss: float | None = None
        self.eval_loss: float | None = None
        self._losses: list[Tensor] = [paddle.to_tensor(x) for x in state.pending_losses]
        self._tokens = 0
        self._saved_step: int | None = None

    def train(self) -> Outcome:
        """Runs to max_steps or to a signal; leaves a checkpoint of the last step either way.

        Raises:
            UserError: the loss is not a finite number, or saving fails.
        """
        settings, state = self.settings, self.state
        batches = self.train_batches(state.consumed_samples)
        with InterruptRequest() as interrupt, Progress(settings, state.global_step) as progress:
            self.throughput.restart()
            while state.global_step < settings.max_steps and not interrupt:
                rate = learning_rate(settings, state.global_step)
                grad_norm = self._step(batches, rate)
                if _due(state.global_step, settings.logging_steps, settings.max_steps) or (
                    settings.logging_first_step and state.global_step == 1
                ):
                    self._log(rate, grad_norm, progress)
                if (
                    self.eval_batches
                    and settings.evaluates
                    and _due(state.global_step, settings.eval_steps, settings.max_steps)
                ):
                    self._evaluate(progress)
                if settings.saves and _due(
                    state.global_step, settings.save_steps, settings.max_steps
                ):
                    self._save()
                progress.advance()
            if interrupt and settings.saves:
                self._save()
            return self._outcome(interrupt.exit_code if interrupt else 0)

    def evaluate_only(self) -> Outcome:
        """The loss on the validation split, without training."""
        with Progress(self.settings, self.state.global_step) as progress:
            if self.eval_batches and self.settings.evaluates:
                self._evaluate(progress)
        return self._outcome(0)

    def _step(self, batches: Iterator[Batch], rate: float) -> Tensor:
        """One optimizer step over gradient_accumulation_steps micro batches; returns the norm."""
        settings, state = self.settings, self.state
        # The random numbers of a step depend on seed and step alone, so a resumed run draws the
        # same ones without any generator state in the checkpoint.
        paddle.seed(settings.seed + state.global_step)
        self.optimizer.set_lr(rate)
        total = None
        for _ in range(settings.gradient_accumulation_steps):
            batch = next(batches)
            loss = self.model.loss(**_to_device(batch)) / settings.gradient_accumulation_steps
            loss.backward()
            total = loss.detach() if total is None else total + loss.detach()
            state.consumed_samples += batch["input_ids"].shape[0]
            self._tokens += batch["input_ids"].size
        grad_norm = clip_by_global_norm(self.parameters, settings.max_grad_norm)
        self.optimizer.step()
        self.optimizer.clear_grad(set_to_zero=False)
        state.global_step += 1
        self._losses.append(total)
        return grad_norm

    def _log(self, rate: float, grad_norm: Tensor, progress: Progress) -> None:
        losses = self._finite_losses()
        self._losses.clear()
        self.final_loss = math.fsum(losses) / len(losses)
        speed = self.throughput.interval(self._tokens)
        metrics = {
            "loss": self.final_loss,
            "learning_rate": rate,
            "grad_norm": float(grad_norm.item()),
            "tokens_per_second_per_device": speed,
            "peak_memory_gib": peak_memory_bytes() / 2**30,
            "consumed_tokens": self._count_tokens(),
        }
        mfu = self.throughput.mfu(speed)
        if mfu is not None:
            metrics["mfu"] = mfu
        self._report(metrics)
        progress.log(self.state.global_step, metrics)

    def _evaluate(self, progress: Progress) -> None:
        self.eval_loss = evaluate(self.model, self.eval_batches, self.settings.eval_iters)
        metrics = {"eval_loss": self.eval_loss, "eval_perplexity": perplexity(self.eval_loss)}
        self._report(metrics)
        progress.log(self.state.global_step, metrics)
        self.throughput.restart()

    def _save(self) -> None:
        if self._saved_step == self.state.global_step:
            return
        self.state.pending_losses = self._finite_losses()
        self._count_tokens()
        folder = self.save(self.state)
        self._saved_step = self.state.global_step
        logger.info("saved %s", folder)
        self.throughput.restart()

    def _finite_losses(self) -> list[float]:
        """Losses since the last log line, fetched from the device in one go.

        Raises:
            UserError: one of them is NaN or infinite; nothing has been saved since it arose.
        """
        if not self._losses:
            return []
        losses = [float(x) for x in paddle.stack(self._losses).numpy()]
        first = self.state.global_step - len(losses) + 1
        if first == 1 and self.state.initial_loss is None:
            self.state.initial_loss = losses[0]
        for step, loss in enumerate(losses, start=first):
            if not math.isfinite(loss):
                s = self.settings
                raise UserError(
                    f"the loss is {loss} at step {step} (learning_rate {s.learning_rate}, "
                    f"max_grad_norm {s.max_grad_norm}, warmup_steps {s.warmup_steps}, "
                    f"per_device_train_batch_size {s.per_device_train_batch_size}, seed {s.seed}, "
                    f"max_seq_length {s.max_seq_length}). Training stopped; checkpoints in "
                    f"{s.output_dir} are from before. Lower learning_rate or lengthen the warm-up, "
                    "then start the same command again."
                )
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
            eval_loss=self.eval_loss,
            tokens_per_second=speed,
            mfu=self.throughput.mfu(speed) if speed else None,
            peak_memory=peak_memory_bytes(),
            exit_code=exit_code,
        )


@paddle.no_grad()
def evaluate(model: paddle.nn.Layer, batches: BatchSource, iterations: int) -> float:
    """Mean loss over the first ``iterations`` batches of a split, or fewer where it ends."""
    model.eval()
    losses = []
    for _, batch in zip(range(iterations), batches(0)):
        losses.append(model.loss(**_to_device(batch)))
    model.train()
    return float(paddle.stack(losses).mean().item())


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


def _to_device(batch: Batch) -> dict[str, Tensor]:
    return {name: paddle.to_tensor(array) for name, array in batch.items()}


def _due(step: int, interval: int, last: int) -> bool:
    return step % interval == 0 or step == last
