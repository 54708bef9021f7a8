"""Cases in which planned memory is compared with that of CPU processes; used by several tests."""

from __future__ import annotations

from typing import Any

from tiny_configs import tiny

from pypkg.config import Settings
from pypkg.models.architecture.config import ModelConfig
from pypkg.parallel.mesh import Degrees
from pypkg.planner.memory import MemoryPlan, plan_memory

TOLERANCE = 0.02  # of what is measured
MEASURED_STEP = 2  # the third: it has optimizer state, and stage 3 predicts its order
# What takes most: rows of a micro batch, tokens in a row, micro batches, and changes of the model.
SIZES: dict[str, dict[str, Any]] = {
    "activations": {"rows": 8, "length": 128, "micro_batches": 2, "model": {"vocab_size": 512}},
    "state": {"rows": 1, "length": 16, "micro_batches": 1, "model": {"vocab_size": 6000}},
    "logits": {"rows": 4, "length": 256, "micro_batches": 1, "model": {"vocab_size": 20000}},
}
LAYOUTS: dict[str, tuple[dict[str, Any], str]] = {
    "1": ({}, ""),
    "dp2": ({"data": 2}, ""),
    "stage1": ({"sharding": 2}, "stage1"),
    "stage2": ({"sharding": 2}, "stage2"),
    "stage3": ({"sharding": 2}, "stage3"),
    "tp2": ({"tensor": 2}, ""),
    "tp2+sp": ({"tensor": 2, "sequence_parallel": True}, ""),
    "pp2": ({"pipeline": 2}, ""),
}
DEEP = {"pp5": ({"pipeline": 5}, "")}  # beside LAYOUTS, not measured
GRANULARITIES = ("", "full", "full_attn", "core_attn")


def case_of(family: str, layout: str, granularity: str, size: str, layers: int = 2) -> dict:
    degrees, sharding = {**LAYOUTS, **DEEP}[layout]
    return {"family": family, "layout": layout, "degrees": degrees, "sharding": sharding,
            "granularity": granularity, "size": size, "layers": layers}  # fmt: skip


def config_of(case: dict[str, Any]) -> ModelConfig:
    changes = SIZES[case["size"]]["model"]
    config = tiny(case["family"], case["layers"])
    if config.prefix_lm:  # whose special tokens are at the end of the vocabulary
        changes = {**changes, "vocab_size": max(changes["vocab_size"], config.vocab_size)}
    return config.replace(**changes)


def settings_of(case: dict[str, Any], **changes: Any) -> Settings:
    """The settings of a case, and ``changes``."""
    size, degrees = SIZES[case["size"]], case["degrees"]
    micro_batches = max(size["micro_batches"], 2 * degrees.get("pipeline", 1) - 1)
    return Settings(
        max_steps=10,
        per_device_train_batch_size=size["rows"],
        max_seq_length=size["length"],
        gradient_accumulation_steps=micro_batches,
        recompute=bool(case["granularity"]),
        recompute_granularity=case["granularity"] or "full",
        sharding=(case["sharding"],) if case["sharding"] else (),
        tensor_parallel_degree=degrees.get("tensor", 1),
        pipeline_parallel_degree=degrees.get("pipeline", 1),
        **changes,
    )


def plan_of(case: dict[str, Any]) -> MemoryPlan:
    return plan_memory(settings_of(case), config_of(case), Degrees(**case["degrees"]), "cpu")


def world_size(layout: str) -> int:
    return Degrees(**LAYOUTS[layout][0]).world_size


def errors(cases: list[dict[str, Any]], ranks: list[dict[str, Any]]) -> list[float]:
    """(plan - measured) / measured of each case, where it is largest.

    Args:
        ranks: what the ranks reported (distributed/layouts/memory_worker.py).
    """
    return [
        max((_error(case, number, place, ranks) for place in {tuple(r["place"]) for r in ranks}),
            key=abs)
        for number, case in enumerate(cases)
    ]  # fmt: skip


def _error(
    case: dict[str, Any], number: int, place: tuple[int, int], ranks: list[dict[str, Any]]
) -> float:
    """Of the ranks in one pipeline stage with one rank in the tensor group, the one with most."""
    peaks = [
        max(rank["results"][number][window] for window in ("passes", "update"))
        for rank in ranks
        if tuple(rank["place"]) == place
    ]
    at_stage = [each for each in plan_of(case).ranks if each.pipeline_rank == place[0]]
    planned = next((each for each in at_stage if each.tensor_rank == place[1]), at_stage[0])
    return planned.peak / max(peaks) - 1
