"""One rank of test_update_traffic.py: what an update sends to the tensor group."""

from __future__ import annotations

import sys

import numpy as np
from distributed_testing import REPO, report

sys.path.insert(0, str(REPO / "tests" / "models"))
from tiny_configs import tiny

from pypkg.models import from_config
from pypkg.parallel import mesh
from pypkg.parallel.comm.traffic import Traffic
from pypkg.parallel.optimizer.distribute import distribute
from pypkg.parallel.optimizer.factory import UpdateOptions
from pypkg.parallel.update_rules import updated_by_muon
from pypkg.training.step.engine import Engine
from pypkg.training.tp_sharding import ModelTpSharding

CONFIG = tiny("llama")


def update_of(optim: str) -> dict[str, list[int]]:
    """Operations and bytes by operation."""
    model, sharding = from_config(CONFIG, seed=1), ModelTpSharding(CONFIG)
    options = UpdateOptions(optim=optim)
    engine = Engine(*distribute(model, options, mesh.current(), sharding), labels_vary=False)
    tokens = np.random.default_rng(0).integers(8, CONFIG.vocab_size, [2, 16])
    engine.forward_backward([{"input_ids": tokens, "labels": tokens}])
    traffic = Traffic()
    with traffic.counting():
        engine.update(1e-3)
    return {
        operation: [count.operations, count.bytes]
        for (group, operation), count in traffic.counts.items()
        if group == "tensor"
    }


def main() -> None:
    mesh.initialize(mesh.Degrees(tensor=2))
    sharding = ModelTpSharding(CONFIG)
    shapes = sharding.shapes()
    shards = {name: sharding.layout(name).shard_shape for name in shapes}
    report(
        {
            "muon": update_of("muon"),
            "adafactor": update_of("adafactor"),
            "adamw": update_of("adamw"),
            "muons": sum(
                int(np.prod(shards[n])) for n, s in shapes.items() if updated_by_muon(n, s)
            ),
            "rows and columns": sum(sum(s) for s in shapes.values() if len(s) == 2),
            "matrices": sum(len(s) == 2 for s in shapes.values()),
            "vectors": sum(len(s) == 1 for s in shapes.values()),
        }
    )


if __name__ == "__main__":
    main()
