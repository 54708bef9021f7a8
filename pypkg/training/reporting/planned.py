"""The plan of a run beside what the run takes: at start, and once after ten steps."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

from paddle.base import core

from pypkg.config import Settings
from pypkg.device.capabilities import Capabilities
from pypkg.errors import UserError
from pypkg.models import ModelConfig
from pypkg.parallel import endpoints, mesh
from pypkg.planner import memory as memory_terms
from pypkg.planner.memory import RankMemory, plan_memory
from pypkg.planner.search.plan import OUTSIDE, time_of
from pypkg.planner.time import step_time
from pypkg.planner.time.gpus import gpu_of_device
from pypkg.planner.time.step_time import Cluster, StepTime

logger = logging.getLogger("pypkg")

_STEPS = 10  # after which measured values are compared
_TOLERATED = 0.1
# Scalars, losses and what is read ahead are not planned; a toy model takes no more.
_TOLERATED_GIB = 2**-10
_GIB = 2**30


@dataclass(frozen=True)
class RunPlan:
    """What is planned for the first rank.

    Attributes:
        device: "gpu" or "cpu".
        memory: at the peak of the first rank.
        largest: the same of the rank with most.
        time: of a training step; None on a CPU, where the GPU is not known, and between machines.
    """

    device: str
    memory: RankMemory
    largest: RankMemory
    time: StepTime | None


def plan_of_run(
    settings: Settings, config: ModelConfig, capabilities: Capabilities
) -> RunPlan | None:
    """The plan of a run whose mesh has started; None where it is not planned yet."""
    degrees, device = mesh.current().degrees, capabilities.device
    try:
        memory = plan_memory(settings, config, degrees, device)
    except UserError as error:
        logger.info("%s", error)
        return None
    gpu = gpu_of_device(capabilities.device_name, capabilities.memory_bytes)
    time = None
    if device == "gpu" and gpu is not None and endpoints.launched_machines() == 1:
        cluster = Cluster(gpu, degrees.world_size, gpu.link)
        time = time_of(settings, config, degrees, cluster).training_alone()
    return RunPlan(device, memory.ranks[0], memory.largest, time)


def compare_with_capacity(plan: RunPlan, capacity: int) -> None:
    """Logs the plan beside the memory that there is, and whether it fits a GPU.

    Args:
        capacity: bytes of a GPU, or of the machine, which its ranks share on a CPU. There the
            checks of machines compare the plan with the memory that is free (doctor/machine.py).
    """
    if plan.device == "cpu":
        ranks = _ranks_here()
        of_all = f" in {ranks} ranks" if ranks > 1 else ""
        planned = _gib(ranks * plan.largest.peak)
        logger.info("plan %s of tensors%s; the machine has %s", planned, of_all, _gib(capacity))
        return
    memory, free = plan.memory, capacity - OUTSIDE
    text = f"plan {_gib(memory.peak)} of tensors, room for {free / _GIB:.1f}"
    if plan.time is not None:
        text += f"; plan {plan.time.tokens_per_second:,.0f} tokens/s per GPU"
    if memory.peak > free:
        most = max(memory.terms.items(), key=lambda term: term[1])[0]
        logger.warning("%s; %s take most. pypkg plan says what would fit", text, most)
    else:
        logger.info(text)


def _gib(size: int) -> str:
    return f"{size / _GIB:.3g} GiB"


def _ranks_here() -> int:
    """Ranks of the run on this machine."""
    if mesh.launched_processes() == 1:
        return 1
    return max(1, endpoints.hosts().count(endpoints.own_host()))


class PlanReporter:
    """Compares the plan with the first metrics after ten steps."""

    def __init__(self, plan: RunPlan, first_step: int) -> None:
        self._plan, self._due = plan, first_step + _STEPS
        self._is_told = False
        core.host_memory_stat_reset_peak_value("Allocated", 0)  # of what came before training

    def report(self, step: int, metrics: dict[str, float]) -> None:
        if self._is_told or step < self._due or "peak_memory_gib" not in metrics:
            return
        self._is_told = True
        memory, time = self._plan.memory, self._plan.time
        measured = metrics["peak_memory_gib"]
        if self._plan.device == "cpu":  # where that is the resident set, with all libraries
            measured = core.host_memory_stat_peak_value("Allocated", 0) / _GIB
        errors = memory_terms.TERM_ERRORS
        _compare("GiB", memory.peak / _GIB, measured, memory.terms, errors, _TOLERATED_GIB)
        if time is not None:
            speed = metrics["tokens_per_second_per_device"]
            planned = time.tokens_per_second
            _compare("tokens/s per GPU", planned, speed, time.terms, step_time.TERM_ERRORS)

    def rewind(self, step: int) -> None:
        """Nothing: the comparison is made once."""

    def close(self) -> None:
        """Nothing is open."""


def _compare(
    unit: str,
    planned: float,
    measured: float,
    terms: Mapping[str, float],
    errors: Mapping[str, float],
    tolerated: float = 0.0,
) -> None:
    """Logs both values; a warning where they differ by over 10 % and by over ``tolerated``."""
    text = f"plan {planned:,.4g} {unit}, measured {measured:,.4g}"
    deviation = abs(measured / planned - 1)
    if deviation <= _TOLERATED or deviation * planned <= tolerated:
        logger.info(text)
        return
    likely = likely_term(terms, errors)
    logger.warning(
        "%s: the plan is off by %.0f %%, most likely in %s", text, 100 * deviation, likely
    )


def likely_term(terms: Mapping[str, float], errors: Mapping[str, float]) -> str:
    """The term that most likely accounts for a deviation of the sum of ``terms``.

    If the terms err independently, each takes a part of a deviation that is proportional to its
    variance, so it is the term with the largest error.

    Args:
        errors: relative standard error of each term.
    """
    return max(terms, key=lambda name: terms[name] * errors[name])
