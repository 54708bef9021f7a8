"""The end of a run, for its summary and exit code."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from pypkg.training.state import TrainerState


@dataclass
class Outcome:
    """The end of a run.

    Attributes:
        final_loss, eval_loss: the last ones, nats per token; None where there is none.
        tokens_per_second: median over the logged intervals, per rank.
        mfu: model FLOPs utilisation, a fraction of the peak.
        peak_memory: bytes, of this rank.
        exit_code: 0, or 128 + the signal that stopped the run.
    """

    state: TrainerState
    final_loss: float | None
    eval_loss: float | None
    tokens_per_second: float | None
    mfu: float | None
    peak_memory: int
    exit_code: int = 0

    def completed_from(self, rows: Sequence[Mapping[str, float]]) -> Outcome:
        """A copy whose missing losses are the last ones in ``rows`` of metrics.jsonl."""

        def last(name: str) -> float | None:
            return next((row[name] for row in reversed(rows) if name in row), None)

        return replace(
            self,
            final_loss=last("loss") if self.final_loss is None else self.final_loss,
            eval_loss=last("eval_loss") if self.eval_loss is None else self.eval_loss,
        )


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf
