"""One rank of test_packed_blend.py: packed samples of a blend, and the loss of each corpus.

Arguments: a folder for files; degrees of data, pipeline and tensor; names of parity.CASES.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from distributed_testing import report
from parity import case_config, load

from pypkg.data import Batch, BatchLoader, Packing, build_train_valid_test_datasets
from pypkg.models import from_config, save_pretrained
from pypkg.parallel import mesh
from pypkg.training.reporting.source_losses import SourceLosses
from pypkg.training.step.engine import to_device

SEQUENCE, MICRO_BATCHES, BATCH = 32, 4, 2
NAMES = ["even", "odd"]


def micro_batches(folder: Path, positions: bool) -> list[Batch]:
    """Those of this process, of MICRO_BATCHES over all."""
    current = mesh.current()
    blend = ["3", str(folder / NAMES[0]), "1", str(folder / NAMES[1])]
    wanted = (MICRO_BATCHES * BATCH, 0, 0)
    dataset = build_train_valid_test_datasets(blend, "1", SEQUENCE, wanted, 5)[0]
    loader = BatchLoader(
        dataset, BATCH, with_sources=True, threads=0,
        packing=Packing(True, positions, True),
        data_parallel_rank=current.sample_shard, data_parallel_size=current.sample_shards,
    )  # fmt: skip
    return list(loader)


def measure(model, batches: list[Batch]) -> dict[str, object]:
    """Mean loss over this process's micro batches, and of each corpus over all processes."""
    sources = SourceLosses(NAMES)
    watched = [to_device(sources.watch(batch)) for batch in batches]
    if hasattr(model, "forward_backward"):
        loss = model.forward_backward(watched)
    else:
        loss = sum(model.loss(**batch) for batch in watched) / len(watched)
    sources.collect()
    return {"loss": loss.item(), "sums": sources.sums(), "by_source": sources.take()}


def main(folder: Path, data: int, pipeline: int, tensor: int, cases: list[str]) -> None:
    expected = {}
    has_positions = {
        case: case_config(case).position_embedding in ("rope", "learned") for case in cases
    }
    if os.environ["PADDLE_TRAINER_ID"] == "0":  # alone, until the mesh is made
        for case in cases:
            model = from_config(case_config(case), seed=3)
            model.train()
            save_pretrained(model, folder / case)
            expected[case] = measure(model, micro_batches(folder, has_positions[case]))
    mesh.initialize(
        mesh.Degrees(data=data, pipeline=pipeline, tensor=tensor, sequence_parallel=tensor > 1)
    )
    results = {}
    for case in cases:
        model = load(case, folder / case)
        model.train()
        batches = micro_batches(folder, has_positions[case])
        results[case] = measure(model, batches)
    report({"expected": expected, "results": results})


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:5]), sys.argv[5:])
