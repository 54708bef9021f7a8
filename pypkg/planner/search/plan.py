"""The plan of one layout: memory against capacity, and time."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from pypkg.config import Settings
from pypkg.models.architecture.config import ModelConfig
from pypkg.parallel.mesh import Degrees
from pypkg.planner.memory import MemoryPlan, RankMemory, plan_memory
from pypkg.planner.time.step_time import Cluster, StepTime, plan_time

# Bytes that a process uses besides tensors: CUDA context, NCCL, fragmentation. PaddleNLP's page of
# published runs reports 2 to 3 GB; this is the upper end. It is not measured with this package.
OUTSIDE = 3 * 10**9
# Relative errors of the speed: the largest against the published runs (A100, one machine), and an
# assumption for all other cases.
PROVEN, UNPROVEN = 0.1, 0.25


@dataclass(frozen=True)
class Plan:
    """Memory and time of one layout.

    Attributes:
        settings, config, degrees, cluster: what was planned.
        memory, time: of a step.
    """

    settings: Settings
    config: ModelConfig
    degrees: Degrees
    cluster: Cluster
    memory: MemoryPlan
    time: StepTime

    @property
    def capacity(self) -> int:
        """Bytes available for the tensors of a rank."""
        return self.cluster.gpu.memory - OUTSIDE

    @property
    def largest(self) -> RankMemory:
        """The rank with the highest peak."""
        return self.memory.largest

    @property
    def short(self) -> int:
        """Bytes by which the peak exceeds the capacity; negative if it fits."""
        return self.largest.peak - self.capacity

    @property
    def fits(self) -> bool:
        return self.short <= 0

    @property
    def uncertainty(self) -> float:
        """Largest expected relative error of the speed, 0 to 1."""
        within = self.degrees.world_size <= self.cluster.gpus_per_node
        is_proven = within and self.cluster.gpu.name.startswith("a100")
        return PROVEN if is_proven else UNPROVEN

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation, 0 to 1."""
        gpu = self.cluster.gpu
        peak = gpu.matmul_flops if element_bytes(self.settings) == 2 else gpu.matmul_flops_float32
        return self.time.mfu(self.config, self.settings.max_seq_length, peak)


def element_bytes(settings: Settings) -> int:
    """Bytes of an element of weights and activations on a GPU, where bfloat16 is the default."""
    return 4 if settings.bf16 is False and not settings.fp16 else 2


def make_plan(
    settings: Settings,
    config: ModelConfig,
    degrees: Degrees,
    cluster: Cluster,
    stages: Iterable[int] | None = None,
) -> Plan:
    """The plan of a layout without problems.

    Args:
        stages: pipeline stages whose memory is planned; None: all.

    Raises:
        UserError: the layout or a setting is not planned yet.
    """
    memory = plan_memory(settings, config, degrees, stages=stages)
    return Plan(
        settings, config, degrees, cluster, memory, time_of(settings, config, degrees, cluster)
    )


def time_of(
    settings: Settings, config: ModelConfig, degrees: Degrees, cluster: Cluster
) -> StepTime:
    """The time of a step in the dtype of the settings."""
    return plan_time(settings, config, degrees, cluster, element_bytes(settings))


def largest_term(plan: Plan) -> str:
    """The term that takes most on the largest rank."""
    terms = plan.largest.terms
    return max(terms, key=lambda name: terms[name])


def what_would_do(plan: Plan) -> tuple[str, Plan] | None:
    """The change of one setting that makes the plan fit at the highest speed; None if none does.

    The changes are recompute, a smaller micro batch, and a higher ZeRO stage, also over the
    data-parallel ranks. Each keeps the global batch.

    Returns:
        A name of the change, and the plan with it.
    """
    found = []
    for label, changed, layout in _changes(plan):
        candidate = make_plan(changed, plan.config, layout, plan.cluster)
        if candidate.fits:
            found.append((label, candidate))
    return min(found, key=lambda each: each[1].time.seconds, default=None)


def _changes(plan: Plan) -> list[tuple[str, Settings, Degrees]]:
    s, degrees = plan.settings, plan.degrees
    found = []
    granularities = ("core_attn", "full_attn", "full")
    done = granularities.index(s.recompute_granularity) if s.recompute else -1
    for name in granularities[done + 1 :]:
        changed = replace(s, recompute=True, recompute_granularity=name)
        found.append((f"recompute {name}", changed, degrees))
    rows = s.per_device_train_batch_size
    while rows % 2 == 0:
        rows //= 2
        more = s.gradient_accumulation_steps * s.per_device_train_batch_size // rows
        changed = replace(s, per_device_train_batch_size=rows, gradient_accumulation_steps=more)
        found.append((f"a micro batch of {rows}", changed, degrees))
    if degrees.sharding == 1:
        degrees = replace(degrees, data=1, sharding=degrees.data)
    last = 3 if degrees.pipeline == 1 else 1
    for stage in range(s.sharding_stage + 1, last + 1) if degrees.sharding > 1 else ():
        changed = replace(s, sharding=(f"stage{stage}",), data_parallel_degree=-1)
        found.append((f"sharding stage{stage}", changed, degrees))
    return found
