"""``pypkg pretrain CONFIG --dry_run``: the plan of a run and its findings, without a start."""

from __future__ import annotations

from collections.abc import Sequence

from pypkg.config import Settings
from pypkg.device.capabilities import Capabilities, probe, resolve
from pypkg.errors import UserError
from pypkg.models import ModelConfig
from pypkg.parallel.mesh import Degrees
from pypkg.planner.memory import plan_memory
from pypkg.planner.output.text import describe
from pypkg.planner.search.plan import make_plan
from pypkg.planner.time.gpus import gpu_of_device
from pypkg.planner.time.step_time import Cluster
from pypkg.training.doctor.facts import observe
from pypkg.training.doctor.findings import Finding, Severity, exit_code
from pypkg.training.doctor.inputs import input_findings
from pypkg.training.doctor.machine import machine_findings, needs_of
from pypkg.training.start.layout import degrees
from pypkg.training.start.sources import model_config

_GPUS_PER_NODE = 8
_GIB = 2**30


def dry_run(settings: Settings, processes: int) -> int:
    """Prints the plan of a run of ``processes`` ranks, and findings about its inputs and outputs.

    Only the machine of this process is examined. ``settings`` must have been checked.

    Returns:
        The exit code: 0 no problem, 1 warnings, 2 errors.

    Raises:
        UserError: the device cannot do what the settings ask for.
    """
    plan = resolve(settings, probe(settings.device, settings.ops_backend))
    config = model_config(settings, None)
    layout = degrees(settings, processes)
    lines, finding = _planned(settings, config, layout, plan.capabilities)
    needs = needs_of(settings, config, plan.dtype)
    facts = [observe(plan.capabilities, settings.output_dir, settings.num_threads)]
    found = [finding, *machine_findings(facts, needs), *input_findings(settings, config, needs)]
    print("\n".join([*lines, *(each.labelled() for each in found)]))
    return exit_code(found)


def _planned(
    settings: Settings, config: ModelConfig, layout: Degrees, capabilities: Capabilities
) -> tuple[Sequence[str], Finding]:
    """The plan as lines of text, and a finding that says whether it fits the device."""
    gpu = gpu_of_device(capabilities.device_name, capabilities.memory_bytes)
    try:
        if gpu is not None:
            node = min(_GPUS_PER_NODE, layout.world_size)
            plan = make_plan(settings, config, layout, Cluster(gpu, node, gpu.link))
            severity = Severity.OK if plan.fits else Severity.ERROR
            needed, room = plan.largest.peak, plan.capacity
            lines = [*describe(plan, None, None), ""]
        else:
            memory = plan_memory(settings, config, layout, capabilities.device)
            needed, room = memory.largest.peak, capabilities.memory_bytes
            if capabilities.device == "cpu":
                needed *= layout.world_size
            severity = Severity.OK if needed <= room else Severity.ERROR
            lines = []
    except UserError as error:
        return [], Finding(Severity.WARNING, "plan", str(error))
    text = f"{needed / _GIB:.3g} GiB of tensors, {room / _GIB:.3g} GiB of memory"
    remedy = "pypkg plan --search looks for layouts that fit" if severity else ""
    return lines, Finding(severity, "plan", text, remedy=remedy)
