"""The order of the checks: all of them for ``pypkg doctor``, the cheap ones for each run."""

from __future__ import annotations

import logging
from dataclasses import replace

from pypkg.config import Settings
from pypkg.device.capabilities import Capabilities
from pypkg.errors import UserError
from pypkg.models import ModelConfig
from pypkg.parallel import mesh
from pypkg.parallel.comm.collective import from_all_ranks, is_first_rank
from pypkg.planner.memory import plan_memory
from pypkg.training.doctor.device import device_findings
from pypkg.training.doctor.facts import Facts, observe
from pypkg.training.doctor.findings import Finding
from pypkg.training.doctor.inputs import input_findings
from pypkg.training.doctor.links import link_findings
from pypkg.training.doctor.machine import Needs, machine_findings, needs_of
from pypkg.training.doctor.operators import operator_findings
from pypkg.training.doctor.ports import port_findings

logger = logging.getLogger("pypkg")


def examine(
    capabilities: Capabilities, settings: Settings | None, config: ModelConfig | None, dtype: str
) -> list[Finding]:
    """All findings; all ranks have to call this once the mesh has started.

    Args:
        settings, config: those of the run; if None, only the machines are examined.
        dtype: dtype of the parameters.
    """
    facts = _facts(capabilities, settings)
    needs = Needs()
    if settings and config:
        needs = _needs(capabilities, settings, config, dtype)
    found = [*device_findings(facts), *machine_findings(facts, needs), *operator_findings()]
    hosts = [fact.host for fact in facts]
    if len(hosts) > 1:
        found += port_findings(hosts)
    if not any(finding.check == "ports" and finding.severity for finding in found):
        found += link_findings(capabilities, hosts)  # hangs if the ports are closed
    if settings and config:
        found += input_findings(settings, config, needs)
    return found


def warn_at_start(
    capabilities: Capabilities, settings: Settings, config: ModelConfig, dtype: str
) -> None:
    """Logs what the cheap checks find wrong; all ranks of a run have to call this."""
    facts = _facts(capabilities, settings)
    if not is_first_rank():
        return
    needs = _needs(capabilities, settings, config, dtype)
    for finding in (*device_findings(facts), *machine_findings(facts, needs)):
        if finding.severity:
            logger.warning("%s (pypkg doctor says more)", finding.line())


def _needs(
    capabilities: Capabilities, settings: Settings, config: ModelConfig, dtype: str
) -> Needs:
    needs = needs_of(settings, config, dtype)
    if capabilities.device != "cpu" or not settings.do_train:
        return needs
    try:
        plan = plan_memory(settings, config, mesh.current().degrees, "cpu")
    except UserError:  # not every run can be planned
        return needs
    return replace(needs, tensors=plan.largest.peak)


def _facts(capabilities: Capabilities, settings: Settings | None) -> list[Facts]:
    output_dir = settings.output_dir if settings is not None else None
    threads = settings.num_threads if settings is not None else 0
    return from_all_ranks(lambda: observe(capabilities, output_dir, threads))
