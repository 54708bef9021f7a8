"""One rank of test_traffic.py: what a step of a tiny LLaMA sends, by group and operation.

Argument: the name of a layout of traffic_formulas.py.
"""

from __future__ import annotations

import sys

import numpy as np
from distributed_testing import report
from traffic_formulas import BATCH, CONFIG, LAYOUTS, SEQUENCE, Layout

from pypkg.models import from_config
from pypkg.models.layers.recompute import Recompute
from pypkg.parallel import mesh
from pypkg.parallel.comm.traffic import Traffic
from pypkg.parallel.optimizer.distribute import distribute
from pypkg.parallel.optimizer.factory import UpdateOptions
from pypkg.parallel.optimizer.zero.stages import ZERO_STAGES
from pypkg.training.step.engine import Engine
from pypkg.training.tp_sharding import ModelTpSharding


def make_engine(layout: Layout) -> Engine:
    model = from_config(CONFIG, seed=1)
    if layout.recomputes:
        model.use_recompute(Recompute("full"))
    options = UpdateOptions(
        max_grad_norm=1.0,
        sharding_stage=layout.sharding_stage,
        reduces_once=layout.reduces_once,
    )
    wrapped, updater = distribute(model, options, mesh.current(), ModelTpSharding(CONFIG))
    return Engine(wrapped, updater, labels_vary=False)  # as without masks


def step(engine: Engine, count: int) -> None:
    """One with ``count`` micro batches."""
    generator = np.random.default_rng(0)
    batches = [
        {
            name: generator.integers(0, CONFIG.vocab_size, [BATCH, SEQUENCE])
            for name in ("input_ids", "labels")
        }
        for _ in range(count)
    ]
    engine.forward_backward(batches)
    engine.update(1e-3)


def counted_step(engine: Engine, count: int) -> dict[str, list[int]]:
    """Operations, elements and bytes by "group operation"."""
    traffic = Traffic()
    with traffic.counting():
        step(engine, count)
    found = traffic.total()
    step(engine, count)
    assert traffic.total() == found, "counted where nothing should"
    assert all(each.seconds > 0 for each in traffic.counts.values())
    return {
        " ".join(key): [each.operations, each.elements, each.bytes]
        for key, each in traffic.counts.items()
    }


def owned_sizes(engine: Engine, layout: Layout) -> list[list[int]]:
    """Of the parameters that each rank of the sharding group owns."""
    if layout.sharding_stage not in (1, 2):
        return []
    sharding = engine.updater.zero
    assert type(sharding) is ZERO_STAGES[layout.sharding_stage]
    owned: list[list[int]] = [[] for _ in range(layout.degrees.sharding)]
    for parameter in sharding.parameters:
        owned[sharding.placement(parameter).owner].append(parameter.size)
    return owned


def main(name: str) -> None:
    layout = LAYOUTS[name]
    mesh.initialize(layout.degrees)
    engine = make_engine(layout)
    for _ in range(2):  # the first tells other stages shapes, and finds which layers there are
        step(engine, 2)
    report(
        {
            "counts": {count: counted_step(engine, count) for count in (2, 3)},
            "owned": owned_sizes(engine, layout),
            "pipeline_rank": mesh.current().pipeline_rank,
            "sharding_rank": mesh.current().sharding_rank,
        }
    )


if __name__ == "__main__":
    main(sys.argv[1])
