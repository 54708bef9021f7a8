"""The output at the end of a run: test loss, sample text, loss curve, summary."""

from __future__ import annotations

import logging
from pathlib import Path

from pypkg.config import Settings
from pypkg.console.logs import show
from pypkg.data.tokenizers.load import Tokenizer
from pypkg.models.building import Model
from pypkg.parallel.comm.collective import is_first_rank
from pypkg.training.checkpoint.folders import checkpoints
from pypkg.training.evaluator import evaluation_memory
from pypkg.training.feed.samples import Samples
from pypkg.training.ledger import counts
from pypkg.training.reporting.outcome import Outcome
from pypkg.training.reporting.reporters import SUMMARY_FILE, read_metrics
from pypkg.training.reporting.summary import Summary, draw_loss_curve, write_sample
from pypkg.training.step.engine import Engine

logger = logging.getLogger("pypkg")


def log_stopped(settings: Settings, outcome: Outcome) -> None:
    """Logs that a signal stopped the run, and where the newest checkpoint is."""
    if not settings.do_train:
        logger.info("stopped during the evaluation, which has no result")
        return
    found = checkpoints(settings.output_dir)
    saved = f"saved {found[-1][1]}; " if found else ""
    further = "the same command goes on from there"
    if settings.ignore_save_lr_and_optim:
        further = "it holds no optimizer state (ignore_save_lr_and_optim)"
    logger.info("stopped at step %d: %s%s", outcome.state.global_step, saved, further)


def report_outcome(
    settings: Settings,
    outcome: Outcome,
    *,
    model: Model,
    engine: Engine,
    samples: Samples,
    tokenizer: Tokenizer | None,
    checkpoint: Path | None = None,
) -> None:
    """Writes test loss, a sample of text, the loss curve, summary.json, and the summary on stdout.

    Every rank must call this; rank 0 writes.

    Args:
        checkpoint: the checkpoint of ``model``; by default the newest in output_dir.
    """
    test_loss, sample = None, None
    if settings.do_predict and "test" in samples.sources:
        with evaluation_memory(settings.per_device_eval_batch_size):
            test_loss = engine.evaluate(samples.eval_batches("test"))
    if settings.sample_tokens > 0 and tokenizer is not None:
        sample = write_sample(
            model, tokenizer, settings.sample_prompt, settings.sample_tokens, settings.seed
        )
    if not is_first_rank():
        return
    found = checkpoints(settings.output_dir)
    metrics_file = Path(settings.output_dir, "metrics.jsonl")
    summary = Summary(
        outcome.completed_from(read_metrics(metrics_file)),
        checkpoint=checkpoint or (found[-1][1] if found else None),
        loss_curve=draw_loss_curve(metrics_file, metrics_file.with_name("loss_curve.png")),
        sample=sample,
        test_loss=test_loss,
        data=samples.usage(outcome.state.consumed_samples),
        events=counts(settings.output_dir),
    )
    summary.write(metrics_file.with_name(SUMMARY_FILE))
    show(summary.text())
