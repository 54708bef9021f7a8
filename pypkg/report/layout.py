"""The ranks of a run as a grid: a column for each pipeline stage, a row for each replica."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from pypkg.errors import UserError
from pypkg.models.architecture.layer_split import cut
from pypkg.parallel.mesh import Degrees, Mesh
from pypkg.report.document import Layout, Stage

_AXES = ("data", "pipeline", "sharding", "context", "tensor")


def layout_of(
    saved: Mapping[str, Any], num_layers: int | None, hosts: Sequence[str]
) -> Layout | None:
    """The layout as the page shows it; None where ``saved`` is no layout of this version.

    Args:
        saved: ``mesh.Degrees`` by name.
        num_layers: number of layers of the model; None if unknown.
        hosts: host of each rank, or empty.
    """
    names = {field.name for field in dataclasses.fields(Degrees)}
    try:
        degrees = Degrees(**{name: value for name, value in saved.items() if name in names})
        grid = Mesh(degrees)
        world_size = degrees.world_size
        places = [grid.coordinates(rank) for rank in range(world_size)]
    except (TypeError, KeyError):
        return None
    replicas = [
        (data, shard) for data in range(degrees.data) for shard in range(degrees.sharding)
    ]  # fmt: skip
    ranks: dict[tuple[int, int, int], list[int]] = {}
    for rank, place in enumerate(places):
        ranks.setdefault((place.pipeline, place.data, place.sharding), []).append(rank)
    stages = [
        Stage(title, [ranks[(stage, *replica)] for replica in replicas])
        for stage, title in enumerate(_stage_titles(degrees, num_layers))
    ]
    return Layout(
        layout_text(saved), world_size, [_replica_title(degrees, *each) for each in replicas],
        stages, list(hosts),
    )  # fmt: skip


def layout_text(saved: Mapping[str, Any]) -> str:
    """The axes with more than one rank, such as "tensor 2, data 4"."""
    used = [f"{axis} {saved[axis]}" for axis in _AXES if _is_divided(saved.get(axis))]
    return ", ".join(used) or "one process"


def _is_divided(ranks: Any) -> bool:
    return type(ranks) is int and ranks > 1


def _replica_title(degrees: Degrees, data: int, shard: int) -> str:
    parts = [f"data {data}"] if degrees.data > 1 else []
    parts += [f"sharding {shard}"] if degrees.sharding > 1 else []
    return ", ".join(parts) or "all samples"


def _stage_titles(degrees: Degrees, num_layers: int | None) -> list[str]:
    """What each stage holds, such as "embedding, layers 0-15"."""
    stages = degrees.pipeline
    names = [f"stage {number}" for number in range(stages)] if stages > 1 else ["all layers"]
    if num_layers is None:
        return names
    try:
        chunks = cut(num_layers, stages, degrees.virtual_stages)
    except UserError:  # fewer layers than model chunks
        return names
    titles = []
    for stage, name in enumerate(names):
        own = chunks[stage::stages]
        parts = ["embedding"] if own[0].is_first else []
        parts += [f"layers {each.layers.start}-{each.layers.stop - 1}" for each in own]
        parts += ["head"] if own[-1].is_last else []
        titles.append(f"{name}: {', '.join(parts)}")
    return titles
