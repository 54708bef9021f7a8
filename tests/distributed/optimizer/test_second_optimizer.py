"""The ``Optimizer`` protocol is all that ZeRO, clipping, offload and checkpoints know."""

from __future__ import annotations

import json
from pathlib import Path

from distributed_testing import run_ranks

WORKER = Path(__file__).with_name("second_optimizer_worker.py")


def test_an_optimizer_of_a_test_through_every_zero_stage():
    """SGD with momentum beside AdamW: against Paddle's, resumed half-way, and with offload."""
    cases = [{"sharding_stage": s, "offload": o} for s in (1, 2, 3) for o in (False, True)]
    results = run_ranks(WORKER, 2, [json.dumps(cases)], timeout=150)[0]
    assert len(results) == len(cases)
    layers, matrices, vectors = 2, 4, 2  # qkv, output, gate and up, down; two norms
    count = (layers * matrices + 2, layers * vectors + 1)  # embedding and head; final norm
    for case, result in zip(cases, results, strict=True):
        assert result["parameters"] < 1e-5, (case, result)
        assert result["velocity"] < 1e-5, (case, result)
        assert result["state_names"] == [
            "beta1_pow_acc", "beta2_pow_acc", "moment1", "moment2", "velocity",
        ]  # fmt: skip
        assert result["keys"] == count[0] + 4 * count[1], (case, result)
