"""What a run is, gathered where it starts, for run_info.json and for other programs' records."""

from __future__ import annotations

import json
import os
import platform
import socket
from dataclasses import asdict
from typing import Any

from pypkg import __version__
from pypkg.config import Settings
from pypkg.device.capabilities import ExecutionPlan
from pypkg.models import ModelConfig
from pypkg.parallel import endpoints, mesh
from pypkg.training.reporting.planned import RunPlan
from pypkg.training.reporting.run_info import RunInfo

_SIZES = (
    "model_type",
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)


def run_info(
    settings: Settings, config: ModelConfig, plan: ExecutionPlan, run_plan: RunPlan | None
) -> RunInfo:
    """This start of a run, whose mesh has started."""
    return RunInfo(
        settings=json.loads(settings.to_json()),
        model={name: getattr(config, name) for name in _SIZES}
        | {"parameters": config.num_parameters()},
        layout=asdict(mesh.current().degrees),
        hosts=endpoints.hosts(),
        environment=_environment(plan),
        plan=None if run_plan is None else _planned(run_plan),
    )


def _environment(plan: ExecutionPlan) -> dict[str, str]:
    capabilities = plan.capabilities
    products = " with bfloat16 products" if plan.matmul_precision == "bfloat16" else ""
    return {
        "pypkg": __version__,
        "Paddle": capabilities.paddle,
        "Python": platform.python_version(),
        "system": platform.platform(),
        "host": socket.gethostname(),
        "device": f"{capabilities.device_name}, {capabilities.memory_bytes / 2**30:.0f} GiB",
        "cores": str(len(os.sched_getaffinity(0))),
        "data type": plan.dtype + products,
        "operators": f"{capabilities.ops_backend} (compiled: {capabilities.compiled_ops})",
        "attention": plan.attention,
    }


def _planned(plan: RunPlan) -> dict[str, Any]:
    found: dict[str, Any] = {
        "peak_bytes": plan.memory.peak,
        "memory_terms": dict(plan.memory.terms),
    }
    if plan.time is not None:
        found["tokens_per_second_per_device"] = plan.time.tokens_per_second
        found["step_terms"] = dict(plan.time.terms)
    return found
