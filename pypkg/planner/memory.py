"""Memory of each rank at the peak of a training step, by what it is for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pypkg.config import Settings
from pypkg.errors import UserError
from pypkg.models.architecture.config import ModelConfig
from pypkg.parallel.mesh import Degrees

# The terms of a peak, in the order of a table. A term that takes nothing is left out of a plan.
TERMS = (
    "weights",
    "gradients",
    "master weights",
    "moments",
    "tables",
    "inputs",
    "activations",
    "logits",
    "gathered weights",
    "buckets",
    "communication",
    "workspace",
)
PHASES = ("forward", "backward", "update")


@dataclass(frozen=True)
class RankMemory:
    """What a rank has allocated at its peak; other ranks of the same place have no more.

    Attributes:
        pipeline_rank, tensor_rank: the place.
        terms: bytes by term, in the order of ``TERMS``.
        phases: the most bytes in each of ``PHASES``.
    """

    pipeline_rank: int
    tensor_rank: int
    terms: Mapping[str, int]
    phases: Mapping[str, int]

    @property
    def peak(self) -> int:
        """Bytes, the sum of the terms."""
        return sum(self.terms.values())

    @property
    def peak_phase(self) -> str:
        """The phase of the peak."""
        return max(PHASES, key=lambda name: self.phases[name])


@dataclass(frozen=True)
class MemoryPlan:
    """The memory of a run.

    Attributes:
        degrees: of the layout.
        ranks: by pipeline stage, then by rank in the tensor group.
    """

    degrees: Degrees
    ranks: tuple[RankMemory, ...]

    @property
    def largest(self) -> RankMemory:
        """The rank that needs most."""
        return max(self.ranks, key=lambda rank: rank.peak)


def plan_memory(
    settings: Settings, config: ModelConfig, degrees: Degrees, device: str = "gpu"
) -> MemoryPlan:
    """The memory of each rank in a training step after the first, which has optimizer state.

    Args:
        settings: of the run; its degrees are not looked at, but its ZeRO stage, recompute, batch
            and dtype are.
        config: of the model as it is trained.
        degrees: of a layout without problems (training/start/layout.py).
        device: "gpu", or "cpu", which is planned to the byte: products accumulate otherwise there.

    Raises:
        UserError: the layout or a setting is not planned yet.
    """
    raise UserError(f"not planned yet: {degrees}")
