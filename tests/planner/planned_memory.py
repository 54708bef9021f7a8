"""Cases in which planned memory is compared with that of CPU processes; used by several tests."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tiny_configs import KEYS, tiny

from pypkg.config import Settings
from pypkg.models.architecture.config import ModelConfig
from pypkg.parallel.mesh import Degrees
from pypkg.planner.memory import MemoryPlan, plan_memory

RECORD = Path(__file__).with_name("measured_memory.json")  # memory_table.py writes it
# Samples of these many tokens, for memory against length.
LENGTHS = (512, 1024, 2048)
_OF_LENGTHS: dict[str, dict[str, Any]] = {
    f"{length} tokens": {
        "rows": 1, "length": length, "micro_batches": 1, "model": {"vocab_size": 512},
    }
    for length in LENGTHS
}  # fmt: skip
TOLERANCE = 0.01  # of what is measured
# What takes most: rows of a micro batch, tokens in a row, micro batches, and changes of the model.
SIZES: dict[str, dict[str, Any]] = {
    "activations": {"rows": 8, "length": 128, "micro_batches": 2, "model": {"vocab_size": 512}},
    "state": {"rows": 1, "length": 16, "micro_batches": 1, "model": {"vocab_size": 6000}},
    "logits": {"rows": 4, "length": 256, "micro_batches": 1, "model": {"vocab_size": 20000}},
}


@dataclass(frozen=True)
class Layout:
    """
    Attributes:
        sharding: ZeRO stage as a setting has it.
        micro_batches: of a step; 0: those of the size, or what fills the pipeline.
        layers: of the model.
    """

    degrees: Degrees
    sharding: str = ""
    micro_batches: int = 0
    layers: int = 2


LAYOUTS = {
    "1": Layout(Degrees()),
    "dp2": Layout(Degrees(data=2)),
    "stage1": Layout(Degrees(sharding=2), "stage1"),
    "stage2": Layout(Degrees(sharding=2), "stage2"),
    "stage3": Layout(Degrees(sharding=2), "stage3"),
    "tp2": Layout(Degrees(tensor=2)),
    "tp2+sp": Layout(Degrees(tensor=2, sequence_parallel=True)),
    "sep2": Layout(Degrees(context=2)),
    "ring2": Layout(Degrees(context=2, ring=True)),
    "ring4": Layout(Degrees(context=4, ring=True)),
    "tp2+sp, ring2": Layout(Degrees(tensor=2, context=2, ring=True, sequence_parallel=True)),
    "pp2": Layout(Degrees(pipeline=2)),
    # Interleaved: 7 is not a multiple of the stages, and with 3 all forward passes come first.
    "pp3v2": Layout(Degrees(pipeline=3, virtual_stages=2), micro_batches=7, layers=7),
    "pp3v2, 3 batches": Layout(Degrees(pipeline=3, virtual_stages=2), micro_batches=3, layers=6),
}
DEEP = {"pp5": Layout(Degrees(pipeline=5)),
        "pp4v3": Layout(Degrees(pipeline=4, virtual_stages=3), micro_batches=15)}  # fmt: skip
GRANULARITIES = ("", "full", "full_attn", "core_attn")


def case_of(
    family: str, layout: str, granularity: str, size: str, layers: int = 0
) -> dict[str, Any]:
    """A case as JSON has it. ``layers``: 0: as many as the layout has."""
    layers = layers or {**LAYOUTS, **DEEP}[layout].layers
    return {"family": family, "layout": layout, "granularity": granularity, "size": size,
            "layers": layers}  # fmt: skip


def grid(layouts: Iterable[str], sizes: Iterable[str]) -> list[dict[str, Any]]:
    """Every family under every granularity."""
    return [
        case_of(family, layout, granularity, size)
        for layout in layouts
        for size in sizes
        for family in KEYS
        for granularity in GRANULARITIES
    ]


def key_of(case: dict[str, Any]) -> str:
    """The name of a case in the record."""
    kept = case["granularity"] or "none"
    return f"{case['layout']}/{case['size']}/{case['family']}/{kept}"


def layout_of(case: dict[str, Any]) -> Layout:
    return {**LAYOUTS, **DEEP}[case["layout"]]


def _size_of(case: dict[str, Any]) -> dict[str, Any]:
    return {**SIZES, **_OF_LENGTHS}[case["size"]]


def config_of(case: dict[str, Any]) -> ModelConfig:
    changes = _size_of(case)["model"]
    config = tiny(case["family"], case["layers"])
    if config.prefix_lm:  # whose special tokens are at the end of the vocabulary
        changes = {**changes, "vocab_size": max(changes["vocab_size"], config.vocab_size)}
        if case["size"] == "activations":  # more than the logits of that vocabulary
            changes["intermediate_size"] = 8 * config.intermediate_size
    return config.replace(**changes)


def settings_of(case: dict[str, Any], **changes: Any) -> Settings:
    """The settings of a case, and ``changes``."""
    size, layout = _size_of(case), layout_of(case)
    degrees = layout.degrees
    filled = max(size["micro_batches"], 2 * degrees.pipeline - 1)
    return Settings(
        max_steps=10,
        per_device_train_batch_size=size["rows"],
        max_seq_length=size["length"],
        gradient_accumulation_steps=layout.micro_batches or filled,
        recompute=bool(case["granularity"]),
        recompute_granularity=case["granularity"] or "full",
        sharding=(layout.sharding,) if layout.sharding else (),
        tensor_parallel_degree=degrees.tensor,
        pipeline_parallel_degree=degrees.pipeline,
        virtual_pp_degree=degrees.virtual_stages,
        sep_parallel_degree=1 if degrees.ring else degrees.context,
        context_parallel_degree=degrees.context if degrees.ring else 1,
        **changes,
    )


def plan_of(case: dict[str, Any]) -> MemoryPlan:
    return plan_memory(settings_of(case), config_of(case), layout_of(case).degrees, "cpu")


def plan_of_settings(settings: Settings, config: ModelConfig) -> MemoryPlan:
    """Of one process on a CPU."""
    return plan_memory(settings, config, Degrees(), "cpu")


def peaks(ranks: list[dict[str, Any]], number: int) -> dict[str, int]:
    """Bytes of case ``number`` by "pipeline stage, rank in the tensor group": the largest.

    Args:
        ranks: what the ranks reported (distributed/layouts/memory_worker.py).
    """
    found: dict[str, int] = {}
    for rank in ranks:
        place = ",".join(map(str, rank["place"]))
        measured = max(rank["results"][number][window] for window in ("passes", "update"))
        found[place] = max(found.get(place, 0), measured)
    return found


def error(case: dict[str, Any], measured: dict[str, int]) -> float:
    """(plan - measured) / measured on the rank where it is largest.

    Args:
        measured: as of ``peaks``.
    """
    planned = plan_of(case).ranks
    found = []
    for place, bytes_ in measured.items():
        stage, shard = map(int, place.split(","))
        at_stage = [each for each in planned if each.pipeline_rank == stage]
        rank = next((each for each in at_stage if each.tensor_rank == shard), at_stage[0])
        found.append(rank.peak / bytes_ - 1)
    return max(found, key=abs)
