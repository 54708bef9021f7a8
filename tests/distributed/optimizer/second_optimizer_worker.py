"""One rank of test_second_optimizer.py: an optimizer that the package does not know, under ZeRO.

Argument: JSON of a list of ZeRO stages. SGD with momentum updates the matrices, AdamW the vectors.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

import numpy as np
import paddle
from distributed_testing import REPO, report
from paddle import Tensor
from whole_values import SlicesOf, whole_parameters, whole_state

sys.path.insert(0, str(REPO / "tests" / "models"))
from tiny_configs import tiny

from pypkg.models import from_config
from pypkg.parallel import mesh
from pypkg.parallel.optimizer.distribute import distribute
from pypkg.parallel.optimizer.factory import UpdateOptions, make_optimizers
from pypkg.parallel.optimizer.protocol import ParameterUpdate

CONFIG, RATE, MOMENTUM, STEPS, MAX_NORM = tiny("llama"), 0.05, 0.9, 4, 0.5


class SgdWithMomentum:
    """velocity = momentum * velocity + gradient; parameter -= learning_rate * velocity."""

    def takes(self, name: str, shape: Sequence[int]) -> bool:
        return len(shape) > 1

    def state_names(self, dtype: paddle.dtype) -> tuple[str, ...]:
        return ("velocity",)

    def undivided_shape(self, state_name: str, shape: Sequence[int]) -> tuple[int, ...] | None:
        return None

    def make_state(self, parameter: Tensor, shape: Sequence[int]) -> dict[str, Tensor]:
        return {"velocity": paddle.zeros(parameter.shape)}

    def update(
        self, updates: Sequence[ParameterUpdate], learning_rate: float, grad_scale: Tensor
    ) -> None:
        for each in updates:
            velocity = each.state["velocity"]
            paddle.assign(velocity * MOMENTUM + each.gradient * grad_scale, velocity)
            paddle.assign(each.parameter.detach() - learning_rate * velocity, each.parameter)


def batch_of(step: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(step)
    return {n: generator.integers(8, 4000, [4, 16]) for n in ("input_ids", "labels")}


def train(options: UpdateOptions, resumes: bool) -> tuple[dict, dict]:
    """Whole parameters and state after the steps; ``resumes``: the last two by a new updater."""
    values, state = None, {}
    for steps in (range(2), range(2, STEPS)) if resumes else (range(STEPS),):
        with paddle.utils.unique_name.guard():
            layer = from_config(CONFIG, seed=1)
        if values is not None:
            for name, parameter in layer.named_parameters():
                parameter.set_value(values[name])
        optimizers = (SgdWithMomentum(), *make_optimizers(layer, options))
        model, updater = distribute(layer, options, mesh.current(), optimizers=optimizers)
        if state:
            updater.load_state(SlicesOf(state))
        current = mesh.current()
        for step in steps:
            rows = {
                name: paddle.to_tensor(np.split(whole, current.sample_shards)[current.sample_shard])
                for name, whole in batch_of(step).items()
            }
            model.forward_backward([rows], updater.scale)
            updater.step(RATE)
        with paddle.no_grad():  # an evaluation before a checkpoint, which fleet's slices notice
            model.eval()
            model.evaluate(rows)
            model.train()
        values = whole_parameters(CONFIG, dict(layer.named_parameters()))
        state = whole_state(updater)
    return values, state


def by_formula() -> tuple[dict, dict]:
    """One process: SGD by paddle.optimizer.Momentum on matrices, clipped by the global norm."""
    layer = from_config(CONFIG, seed=1)
    matrices = [p for p in layer.parameters() if p.ndim > 1]
    vectors = [p for p in layer.parameters() if p.ndim == 1]
    sgd = paddle.optimizer.Momentum(RATE, MOMENTUM, parameters=matrices)
    adamw = paddle.optimizer.AdamW(RATE, 0.9, 0.999, 1e-8, vectors, weight_decay=0.0)
    for step in range(STEPS):
        layer.loss(**{k: paddle.to_tensor(v) for k, v in batch_of(step).items()}).backward()
        gradients = [p.grad for p in layer.parameters()]
        norm = float(sum((g.astype("float64") ** 2).sum() for g in gradients)) ** 0.5
        assert norm > MAX_NORM
        with paddle.no_grad():
            for gradient in gradients:
                paddle.assign(gradient * (MAX_NORM / norm), gradient)
        for optimizer in (sgd, adamw):
            optimizer.step()
            optimizer.clear_grad()
    state = {
        f"{name}.velocity": sgd._accumulators["velocity"][p.name].numpy()
        for name, p in layer.named_parameters()
        if p.ndim > 1
    }
    return {name: p.numpy() for name, p in layer.named_parameters()}, state


def difference(found: dict, expected: dict) -> float:
    return max(float(np.abs(found[k] - v).max() / np.abs(v).max()) for k, v in expected.items())


def main(cases: list[dict]) -> None:
    values, state = by_formula()
    mesh.initialize(mesh.Degrees(sharding=2))
    results = []
    for case in cases:
        options = UpdateOptions(max_grad_norm=MAX_NORM, **case)
        found_values, found_state = train(options, resumes=not case["offload"])
        if mesh.current().rank == 0:
            results.append(
                {
                    "parameters": difference(found_values, values),
                    "velocity": difference(found_state, state),
                    "state_names": sorted({key.rpartition(".")[2] for key in found_state}),
                    "keys": len(found_state),
                }
            )
    report(results)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
