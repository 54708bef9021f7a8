"""Trains rows of the matrix for a few steps: one rank of a layout, or the reference in one process.

Arguments: a folder, the name of a layout or "reference:NAME", a dtype, rows. It runs on the device
of PYPKG_MATRIX_DEVICE, by default the CPU. The reference leaves weights,
losses, gradient norms and final parameters in the folder; ranks report their differences from it.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from distributed_testing import REPO, report

sys.path.insert(0, str(REPO / "tests" / "models"))
from matrix_cells import LAYOUTS, Layout, row_config, row_overrides

from pypkg.data import IGNORED_LABEL, Batch, causal
from pypkg.models import from_config, from_pretrained, save_pretrained
from pypkg.models.architecture.config import ModelConfig
from pypkg.models.layers.recompute import Recompute
from pypkg.models.weights.formats.tensor_files import TensorFiles
from pypkg.parallel import mesh
from pypkg.parallel.comm.collective import mean_over_token_shards
from pypkg.parallel.optimizer.distribute import distribute
from pypkg.parallel.optimizer.factory import UpdateOptions
from pypkg.training.feed.samples import objective_of
from pypkg.training.step.engine import Engine
from pypkg.training.tp_sharding import ModelTpSharding

SEED, STEPS, GLOBAL_BATCH, SEQUENCE = 3, 5, 8, 48
# Shares of the labels that count, one for each sample: a layout must divide by their global number.
_KEPT = np.array([0.0, 0.02, 0.1, 0.3, 0.5, 0.7, 1.0, 1.0])
# Samples of a micro batch of the reference; layouts have one. A mean of the means of micro batches
# would be the same under all layouts, but not here.
REFERENCE_SIZE = 2
LEARNING_RATE = 1e-3
# Larger than in practice: parameters whose gradient is zero but for rounding (a key's bias) would
# otherwise move by the sign of that rounding.
EPSILON = 1e-4
MAX_GRAD_NORM = 0.5  # below the norms that occur, so that clipping is at work


def batches(config: ModelConfig, step: int, size: int) -> list[Batch]:
    """The global batch of ``step``, as micro batches of ``size`` samples each."""
    objective = causal
    if config.prefix_lm:
        objective = objective_of(config, SEQUENCE, SEED)
    generator = np.random.default_rng(step)
    text = generator.integers(8, 4096, [GLOBAL_BATCH, SEQUENCE + 1])
    samples = np.arange(step * GLOBAL_BATCH, (step + 1) * GLOBAL_BATCH)
    micro_batches = [objective(samples[i : i + 1], text[i : i + 1]) for i in range(GLOBAL_BATCH)]
    if not config.prefix_lm:  # whose samples differ in their number of labels as they are
        for batch, kept in zip(micro_batches, generator.permutation(_KEPT), strict=True):
            batch["labels"][generator.random([1, SEQUENCE]) >= kept] = IGNORED_LABEL
    return [
        {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
        for rows in (micro_batches[i : i + size] for i in range(0, GLOBAL_BATCH, size))
    ]


def train(
    model: paddle.nn.Layer, sharding_stage: int, size: int
) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of the steps, with micro batches of ``size`` samples."""
    options = UpdateOptions(
        epsilon=EPSILON,
        weight_decay=0.1,
        max_grad_norm=MAX_GRAD_NORM,
        sharding_stage=sharding_stage,
    )
    engine = Engine(*distribute(model, options, mesh.current(), ModelTpSharding(model.config)))
    shard, shards = mesh.current().sample_shard, mesh.current().sample_shards
    losses, norms = [], []
    for step in range(STEPS):
        loss = engine.forward_backward(batches(model.config, step, size)[shard::shards])
        norms.append(engine.update(LEARNING_RATE).item())
        losses.append(mean_over_token_shards(loss).item())
    return losses, norms


def make_reference(folder: Path, layout: Layout, row: str, dtype: str) -> None:
    """Weights to start from, and what one process makes of them."""
    if (folder / "curve.npz").exists():
        return
    model = from_config(row_config(row, layout), dtype, seed=SEED)
    for index, parameter in enumerate(model.parameters()):
        if parameter.ndim == 1:  # norm weights and biases, so that losing one shows
            noise = np.random.default_rng(index).normal(0, 0.05, parameter.shape)
            noise = paddle.to_tensor(noise, dtype="float32").astype(parameter.dtype)
            parameter.set_value(parameter + noise)
    save_pretrained(model, folder / "weights")
    model.use_attention("reference" if layout.stored_attention else "pypkg")
    losses, norms = train(model, sharding_stage=0, size=REFERENCE_SIZE)
    save_pretrained(model, folder / "trained")
    np.savez(folder / "curve.npz", losses=losses, norms=norms)


def compare(folder: Path, layout: Layout, row: str, dtype: str) -> dict[str, Any]:
    """What the ranks make of the row; differences relative to the run in one process."""
    start = time.perf_counter()
    model = from_pretrained(folder / "weights", dtype, **row_overrides(row))
    model.use_recompute(Recompute(layout.recompute) if layout.recompute else None)
    model.train()
    losses, norms = train(model, layout.sharding_stage, size=1)
    own = folder / "ranks"
    save_pretrained(model, own)
    result = {"seconds": time.perf_counter() - start}
    if mesh.current().rank == 0:
        curve = np.load(folder / "curve.npz")
        result |= {
            "loss_diff": largest_relative(losses, curve["losses"]),
            "grad_norm_diff": largest_relative(norms, curve["norms"]),
            "parameter_diff": parameter_difference(own, folder / "trained"),
        }
    return result


def largest_relative(values: list[float], expected: np.ndarray) -> float:
    return float(np.max(np.abs(np.array(values) / expected - 1)))


def parameter_difference(folder: Path, expected: Path) -> float:
    """The largest difference of any element of any parameter, relative to the parameter's largest.

    Infinite where the files hold other tensors.
    """
    found, wanted = TensorFiles(folder), TensorFiles(expected)
    if found.shapes() != wanted.shapes():
        return float("inf")
    differences = []
    for name in wanted.shapes():
        value = wanted.read(name, "float32")
        difference = np.max(np.abs(found.read(name, "float32") - value))
        differences.append(float(difference / np.max(np.abs(value))))
    return max(differences)


def main(folder: Path, layout_name: str, dtype: str, rows: list[str]) -> None:
    paddle.set_device(os.environ.get("PYPKG_MATRIX_DEVICE", "cpu"))
    layout = LAYOUTS[layout_name.removeprefix("reference:")]
    for row in rows:
        (folder / layout.reference / row).mkdir(parents=True, exist_ok=True)
    if layout_name.startswith("reference:"):
        for row in rows:
            make_reference(folder / layout.reference / row, layout, row, dtype)
        report(None)
        return
    mesh.initialize(layout.degrees)
    report({row: compare(folder / layout.reference / row, layout, row, dtype) for row in rows})


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4:])
