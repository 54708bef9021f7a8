"""Progress of a run: what resuming needs besides weights and optimizer state."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class TrainerState:
    """What resuming needs besides weights and optimizer state; trainer_state.json holds it.

    Attributes:
        global_step: completed optimizer steps.
        consumed_samples, consumed_tokens: of all ranks, since the start of the run.
        initial_loss: of the first step, nats per token.
        pending_losses: of the steps since the last log line, so that a resumed run prints the line
            that an uninterrupted run prints.
        pending_source_losses: ``SourceLosses.sums`` of these steps.
        data_order: ``SampleOrder.to_json``, with the samples consumed from each corpus.
        loss_scale: ``LossScaler.state``, or empty.
        skipped_steps: steps of ``global_step`` that skip_data_intervals passed over.
        best_loss: lowest validation loss of a checkpoint, with load_best_model_at_end.
        best_checkpoint: name of the folder of that checkpoint.
    """

    global_step: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0
    initial_loss: float | None = None
    pending_losses: list[float] = field(default_factory=list)
    pending_source_losses: list[list[float]] = field(default_factory=list)
    data_order: dict = field(default_factory=dict)
    loss_scale: dict = field(default_factory=dict)
    skipped_steps: int = 0
    best_loss: float | None = None
    best_checkpoint: str | None = None
