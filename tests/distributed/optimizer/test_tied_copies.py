"""The copies of a tied table on the first and the last pipeline stage, after five updates.

A checkpoint holds one of them, so a run that resumes goes on exactly only if they are equal. Over
three shards, all-reduce adds in an order that depends on the place in the message, and the stages
hold other parameters beside the table: the first one has a table of positions.
"""

from __future__ import annotations

import json
from pathlib import Path

from distributed_testing import run_ranks

WORKER = Path(__file__).with_name("tied_copies_worker.py")


def case(stage: int, optim: str = "adamw", **degrees: int) -> dict:
    options = {"sharding_stage": stage, "optim": optim, "master_grad": stage == 1}
    degrees = {"pipeline": 2, **degrees}
    return {"family": "opt", "accumulation": 2, "degrees": degrees, "options": options}


CASES = [case(0, data=3), case(1, sharding=3), case(0, "adafactor", data=3)]


def test_are_equal_bit_for_bit():
    ranks = run_ranks(WORKER, 6, [json.dumps(CASES)], timeout=240)
    for index, each in enumerate(CASES):
        found = [rank[index] for rank in ranks]
        assert len({one["weights"] for one in found}) == 1, (each, found)
        states = {(one["stage"], one["state"]) for one in found if one["state"]}
        assert {stage for stage, _ in states} == {0, 1}
        assert len({state for _, state in states}) == 1, (each, found)
