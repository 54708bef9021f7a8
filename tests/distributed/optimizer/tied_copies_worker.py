"""One rank of test_tied_copies.py: digests of this rank's tied table and of its optimizer state.

Argument: JSON of a list of cases (see test_updaters.py).
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable
from typing import Any

import paddle
import updaters_worker
from distributed_testing import report
from updaters_worker import STEPS, new_run, start, train

from pypkg.parallel import mesh
from pypkg.parallel.host_memory import to_host

TABLE = "embed_tokens.weight"
updaters_worker.ROWS = 12  # of a global batch: two micro batches on each of three shards


def digest(tensors: Iterable[paddle.Tensor]) -> str:
    return hashlib.sha256(b"".join(to_host(each).tobytes() for each in tensors)).hexdigest()


def run_case(case: dict) -> dict[str, Any]:
    start(case)
    run = new_run(case)
    train(run, range(STEPS), case)
    run.updater.wait()
    table = dict(run.layer.named_parameters())[TABLE]
    held = run.updater.zero.optimizer_parameter(table)
    state = None if held is None else run.updater.optimizer.state_of(held).values()
    return {
        "stage": mesh.current().pipeline_rank,
        "weights": digest([table]),
        "state": None if state is None else digest(state),
    }


if __name__ == "__main__":
    report([run_case(case) for case in json.loads(sys.argv[1])])
