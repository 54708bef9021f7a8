"""One rank of test_tensor_parallel.py: models over all ranks against the same in one process.

Arguments: a folder for files, whether to use sequence parallelism (0 or 1), whether layers overlap
communication and do without copies (0 or 1), names of parity.CASES.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import paddle.distributed as dist
from distributed_testing import report
from parity import (
    SEED,
    batch_of,
    case_config,
    drawn_alike,
    largest_difference,
    load,
    randomise_vectors,
    same_model,
)
from whole_values import whole_parameters

from pypkg.models import from_config, save_pretrained
from pypkg.ops import blocks
from pypkg.parallel import mesh

overlapped: list[tuple[int, ...]] = []  # shapes of gradients that were summed beside a product
ran_blocks: list[str] = []  # operators of whole blocks that ran


def note_overlap() -> None:
    """Fills ``overlapped``."""
    all_reduce, reduce_scatter = dist.stream.all_reduce, dist.stream.reduce_scatter

    def noting(operation: Callable[..., Any]) -> Callable[..., Any]:
        def call(
            tensor: paddle.Tensor, *arguments: Any, sync_op: bool = True, **options: Any
        ) -> Any:
            if not sync_op:
                overlapped.append(tuple(tensor.shape))
            return operation(tensor, *arguments, sync_op=sync_op, **options)

        return call

    dist.stream.all_reduce, dist.stream.reduce_scatter = map(noting, (all_reduce, reduce_scatter))


def note_blocks() -> None:
    """Fills ``ran_blocks``."""
    run = blocks.run_compiled

    def noting(name: str, *arguments: Any) -> Any:
        ran_blocks.append(name)
        return run(name, *arguments)

    blocks.run_compiled = noting


def measure(model) -> tuple[float, np.ndarray, dict[str, np.ndarray]]:
    """Loss, logits, and whole gradients, by name, that two batches have accumulated."""
    ids, labels = batch_of(model.config)
    model.train()
    for _ in range(2):
        loss = model.loss(ids, labels)
        loss.backward()
    with paddle.no_grad():
        logits = model(ids)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return loss.item(), logits.numpy(), whole_parameters(model.config, gradients)


def compare(case: str, folder: Path, expected: tuple | None) -> dict:
    """What the ranks make of the model that one process has saved; None: nothing to compare."""
    overlapped.clear()
    ran_blocks.clear()
    saved, again = folder / case, folder / f"{case}-again"
    model = load(case, saved)
    loss, logits, gradients = measure(model)
    save_pretrained(model, again)
    result = {
        "finite": all(
            bool(paddle.isfinite(parameter.grad).all())  # of padding rows as well
            for parameter in model.parameters()
        ),
        "overlapped": len(overlapped) > 0,
        "blocks": sorted(set(ran_blocks)),
        "drawn_alike": drawn_alike(model, from_config(case_config(case), seed=SEED)),
    }
    if expected is not None:
        difference, worst = largest_difference(gradients, expected[2])
        result |= {
            "loss": abs(loss / expected[0] - 1),
            "logits": float(np.abs(logits - expected[1]).max()),
            "gradient": difference,
            "gradient_of": worst,
            "saved_alike": same_model(saved, again),
        }
    return result


def main(folder: Path, sequence_parallel: bool, overlaps: bool, cases: list[str]) -> None:
    expected = {}
    if os.environ["PADDLE_TRAINER_ID"] == "0":  # alone, until the mesh is made
        for case in cases:
            model = from_config(case_config(case), seed=SEED)
            randomise_vectors(model)
            save_pretrained(model, folder / case)
            expected[case] = measure(model)
    note_overlap()
    note_blocks()
    degree = mesh.launched_processes()
    mesh.initialize(
        mesh.Degrees(
            tensor=degree,
            sequence_parallel=sequence_parallel,
            overlap_input_gradients=overlaps,
            skip_identity=overlaps,
        )
    )
    report({case: compare(case, folder, expected.get(case)) for case in cases})


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] == "1", sys.argv[3] == "1", sys.argv[4:])
