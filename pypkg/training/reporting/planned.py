"""The plan of a run on a GPU beside what the run takes: at start, and once after ten steps."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

from pypkg.config import Settings
from pypkg.device.capabilities import Capabilities
from pypkg.errors import UserError
from pypkg.models import ModelConfig
from pypkg.parallel import endpoints, mesh
from pypkg.planner.memory import RankMemory, plan_memory
from pypkg.planner.search.plan import OUTSIDE, time_of
from pypkg.planner.time.gpus import gpu_of_device
from pypkg.planner.time.step_time import Cluster, StepTime

logger = logging.getLogger("pypkg")

_STEPS = 10  # after which measured values are compared
_TOLERATED = 0.1
_GIB = 2**30


@dataclass(frozen=True)
class RunPlan:
    """What is planned for the first rank.

    Attributes:
        memory: peak memory of the rank.
        time: time of a step; None if the GPU or the network between machines is not known.
    """

    memory: RankMemory
    time: StepTime | None


def plan_of_run(
    settings: Settings, config: ModelConfig, capabilities: Capabilities
) -> RunPlan | None:
    """The plan of a run whose mesh has started; None on a CPU, or if the planner lacks support."""
    if capabilities.compute_capability is None:
        return None
    degrees = mesh.current().degrees
    try:
        memory = plan_memory(settings, config, degrees).ranks[0]
    except UserError as error:
        logger.info("%s", error)
        return None
    gpu = gpu_of_device(capabilities.device_name, capabilities.memory_bytes)
    if gpu is None or endpoints.launched_machines() > 1:
        return RunPlan(memory, None)
    cluster = Cluster(gpu, degrees.world_size, gpu.link)
    return RunPlan(memory, time_of(settings, config, degrees, cluster))


def compare_with_capacity(plan: RunPlan, capacity: int) -> None:
    """Logs whether the plan fits into ``capacity`` bytes of a GPU."""
    free = capacity - OUTSIDE
    text = f"plan {plan.memory.peak / _GIB:.1f} GiB of tensors, room for {free / _GIB:.1f}"
    if plan.time is not None:
        text += f"; plan {plan.time.tokens_per_second:,.0f} tokens/s per GPU"
    if plan.memory.peak > free:
        most = max(plan.memory.terms.items(), key=lambda term: term[1])[0]
        logger.warning("%s; %s take most. pypkg plan says what would fit", text, most)
    else:
        logger.info(text)


class PlanReporter:
    """Compares the plan with the first metrics after ten steps."""

    def __init__(self, plan: RunPlan, first_step: int) -> None:
        self._plan, self._due = plan, first_step + _STEPS
        self._is_told = False

    def report(self, step: int, metrics: dict[str, float]) -> None:
        if self._is_told or step < self._due or "peak_memory_gib" not in metrics:
            return
        self._is_told = True
        memory, time = self._plan.memory, self._plan.time
        _compare("GiB", memory.peak / _GIB, metrics["peak_memory_gib"], memory.terms)
        if time is not None:
            speed = metrics["tokens_per_second_per_device"]
            _compare("tokens/s per GPU", time.tokens_per_second, speed, time.terms)

    def rewind(self, step: int) -> None:
        """Nothing: the comparison is made once."""

    def close(self) -> None:
        """Nothing is open."""


def _compare(unit: str, planned: float, measured: float, terms: Mapping[str, float]) -> None:
    text = f"plan {planned:,.4g} {unit}, measured {measured:,.4g}"
    if abs(measured / planned - 1) <= _TOLERATED:
        logger.info(text)
        return
    most = max(terms.items(), key=lambda term: term[1])[0]
    logger.warning(
        "%s: the plan is off by %.0f %%, most likely in its largest term, %s",
        *(text, 100 * abs(measured / planned - 1), most),
    )
