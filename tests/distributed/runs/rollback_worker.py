"""One rank of test_rollback.py: runs of which one goes back, and one skips by hand, by layout.

Arguments: a folder for their output, JSON of the settings of each layout by name, and those of all.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

import numpy as np
import paddle
from distributed_testing import report
from paddle import Tensor
from paddle.distributed.fleet.base import topology

from pypkg.config import load_settings
from pypkg.parallel import mesh
from pypkg.training.run import run
from pypkg.training.step.engine import Engine

BAD_STEP = 6


class PoisonedSamples:
    """On the last rank the loss is NaN whenever the samples of the bad step come."""

    def __init__(self) -> None:
        self._calls = 0
        self._samples: list[np.ndarray] = []
        self._forward_backward = Engine.forward_backward

    def __enter__(self) -> None:
        poison = self

        def forward_backward(engine: Engine, micro_batches: Sequence[dict]) -> Tensor | None:
            loss = poison._forward_backward(engine, micro_batches)
            return loss * float("nan") if poison._holds(micro_batches) else loss

        Engine.forward_backward = forward_backward

    def __exit__(self, *_: object) -> None:
        Engine.forward_backward = self._forward_backward

    def _holds(self, micro_batches: Sequence[dict]) -> bool:
        samples = [np.array(batch["input_ids"]) for batch in micro_batches]
        self._calls += 1
        if self._calls == BAD_STEP:
            self._samples = samples
        is_last = mesh.launched_rank() == mesh.launched_processes() - 1
        return is_last and bool(self._samples) and all(
            map(np.array_equal, samples, self._samples)
        )  # fmt: skip


def train(arguments: Sequence[str]) -> int:
    topology._HYBRID_PARALLEL_GROUP = None  # lets fleet make the groups of another mesh
    with paddle.utils.unique_name.guard():  # fleet orders parameters by name
        return run(load_settings(arguments))


def main(*arguments: str) -> None:
    folder, layouts, *common = arguments
    codes = []
    for name, settings in json.loads(layouts).items():
        words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
        skipped = ["--skip_data_intervals", f"[[{BAD_STEP}, {BAD_STEP}]]"]
        codes.append(train([*common, *words, "--output_dir", f"{folder}/{name}-by-hand", *skipped]))
        with PoisonedSamples():
            codes.append(train([*common, *words, "--output_dir", f"{folder}/{name}"]))
    report(codes)


if __name__ == "__main__":
    main(*sys.argv[1:])
