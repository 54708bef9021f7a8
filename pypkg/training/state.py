"""How far a run has come: what resuming needs besides weights and optimizer state."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class TrainerState:
    """What resuming needs besides weights and moments.

    pending_losses are the losses of the steps since the last log line, so that the first line
    after a resume is the one that an uninterrupted run prints; pending_source_losses are what
    SourceLosses.sums gives of them. loss_scale is the state of a LossScaler, if there is one.
    data_order is a SampleOrder, with how many samples each corpus has given.
    """

    global_step: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0
    initial_loss: float | None = None
    pending_losses: list[float] = field(default_factory=list)
    pending_source_losses: list[list[float]] = field(default_factory=list)
    data_order: dict = field(default_factory=dict)
    loss_scale: dict = field(default_factory=dict)
