"""The size of the memory through which the ranks of a machine exchange parts of tensors."""

from __future__ import annotations

import pytest

from pypkg.models.weights.assembly import Assembly, Division
from pypkg.models.weights.formats.safetensors import TensorSpec
from pypkg.models.weights.save_plan import SavePlan, TensorSet, Unit, as_it_is
from pypkg.training.checkpoint.shared_memory import SharedMemory

MIB = 1 << 20


def plan_of(*megabytes: int) -> SavePlan:
    """Tensors of two ranks, which hold halves of each; the ranks write them in turn."""
    units = [
        Unit(
            name := f"tensor {number}",
            shape := (2, size * MIB // 8),
            {name: TensorSpec("float32", shape)},
            (number % 2,),
            Division(lambda writer: (0, 1), size * MIB // 2, Assembly(shape, slices=2)),
        )
        for number, size in enumerate(megabytes)
    ]
    return SavePlan([TensorSet("model", units, lambda name, writer: None, as_it_is)])


@pytest.mark.parametrize(
    ("megabytes", "limit", "capacity"),
    [
        ([400, 200, 300], None, 64 + 100),  # rank 0 sends half of the second one to rank 1
        ([200, 2000], None, 64 + 512),
        ([200], None, 64),
        ([400, 200, 300], 8 << 30, 450),
        ([400, 200, 300], 70 * MIB, 70),
    ],
)
def test_size(megabytes, limit, capacity):
    memory = SharedMemory(limit)
    memory._hosts = ["one"] * 2
    assert memory.emptied(plan_of(*megabytes)).size.capacity == capacity * MIB
