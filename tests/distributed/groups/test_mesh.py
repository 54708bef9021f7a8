"""Which ranks are in a group together."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from distributed_testing import run_ranks

from pypkg.parallel import mesh

WORKER = Path(__file__).with_name("mesh_worker.py")
# Degrees, and their axes from the slowest to the fastest varying.
LAYOUTS = [
    ({"tensor": 2}, ("tensor",)),
    ({"tensor": 2, "data": 2}, ("data", "tensor")),
    ({"tensor": 2, "pipeline": 2}, ("pipeline", "tensor")),
    ({"tensor": 2, "sharding": 2}, ("sharding", "tensor")),
    ({"pipeline": 2, "sharding": 2}, ("pipeline", "sharding")),
    ({"context": 2, "tensor": 2}, ("context", "tensor")),
    ({"data": 2, "context": 2}, ("data", "context")),
    (
        {"pipeline": 2, "sharding": 2, "topology_order": "sharding_first"},
        ("sharding", "pipeline"),
    ),
]


@pytest.mark.parametrize(("degrees", "axes"), LAYOUTS)
def test_groups(degrees, axes):
    sizes = [degrees[axis] for axis in axes]
    grid = np.arange(np.prod(sizes)).reshape(sizes)
    # One rank is late here: those that have their groups end before it has.
    dawdling = [3] if axes == ("pipeline", "tensor") else []
    results = run_ranks(WORKER, grid.size, [json.dumps(degrees), *dawdling], timeout=90)
    for rank, found in enumerate(results):
        assert found["rank"] == rank
        place = np.argwhere(grid == rank)[0]
        for number, axis in enumerate(axes):
            index = tuple(slice(None) if n == number else p for n, p in enumerate(place))
            assert found[axis] == grid[index].tolist(), (rank, axis)
        for axis in {"data", "pipeline", "sharding", "context", "tensor"} - set(axes):
            assert found[axis] is None
        same = tuple(
            slice(None) if axis in ("data", "context") else p for axis, p in zip(axes, place)
        )
        replicas = grid[same].ravel().tolist()
        assert found["replicas"] == (replicas if len(replicas) > 1 else None), rank
    # Those that differ along data or sharding train on samples of their own.
    shards = mesh.Degrees(**degrees)
    samples = shards.data * shards.sharding
    assert {r["sample_shard"] for r in results} == set(range(samples))
    assert {r["token_shard"] for r in results} == set(range(samples * shards.context))


def test_order_of_the_sample_shards():
    """Data is the outer axis, so that the ranks of a sharding group read consecutive samples."""
    degrees = mesh.Degrees(data=3, sharding=2)
    shards = [
        mesh.Mesh(degrees, data=SimpleNamespace(rank=d), sharding=SimpleNamespace(rank=s))
        for d in range(3)
        for s in range(2)
    ]
    assert [each.sample_shard for each in shards] == list(range(6))


def test_one_process_starts_nothing():
    made = mesh.initialize(mesh.Degrees())
    assert made.world_size == 1 and made.tensor is None and made.sample_shards == 1


def test_degrees_that_are_not_the_processes():
    with pytest.raises(ValueError, match="need 2 processes, but 1 were launched"):
        mesh.initialize(mesh.Degrees(tensor=2))
