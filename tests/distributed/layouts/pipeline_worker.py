"""One rank of test_pipeline.py: models cut into stages against the same models in one process.

Arguments: a folder for files, the name of a layout, names of parity.CASES.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import paddle
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

from pypkg.errors import UserError
from pypkg.models import from_config, save_pretrained
from pypkg.models.architecture.config import ModelConfig
from pypkg.models.generate import generate
from pypkg.models.layers.masks import derived_positions
from pypkg.models.layers.recompute import Recompute
from pypkg.models.sampling import Sampling
from pypkg.parallel import mesh


@dataclass(frozen=True)
class Layout:
    """A mesh, and what is trained on it.

    Attributes:
        counts: micro batches of the two steps.
        recomputes: whether to measure with recompute as well.
    """

    degrees: mesh.Degrees
    num_layers: int = 3
    counts: tuple[int, int] = (3, 2)
    recomputes: bool = False


LAYOUTS = {
    "two": Layout(mesh.Degrees(pipeline=2)),
    "four": Layout(mesh.Degrees(pipeline=4), 5, (4, 2)),
    "interleaved": Layout(mesh.Degrees(pipeline=3, virtual_stages=2), 7, (8, 3), True),
    "interleaved_four": Layout(mesh.Degrees(pipeline=4, virtual_stages=2), 8, (4, 8)),
    "tensor": Layout(mesh.Degrees(pipeline=2, tensor=2)),
    "sequence": Layout(mesh.Degrees(pipeline=2, tensor=2, sequence_parallel=True), recomputes=True),
    "data": Layout(mesh.Degrees(pipeline=2, data=2)),
    "sharding": Layout(mesh.Degrees(pipeline=2, sharding=2)),
}
LENGTHS = (48, 32)  # of the two steps


def micro_batches(config: ModelConfig, step: int, count: int) -> list[dict[str, paddle.Tensor]]:
    """Each with a number of labels of its own; the second step has inputs beside the tokens."""
    # Other sample shards have other samples, so that a sum over them would show.
    seeds = range(2, 2 + count) if mesh.current().sample_shard == 0 else range(20, 20 + count)
    batches = []
    for seed in seeds:
        ids, labels = batch_of(config, seed, LENGTHS[step])
        batch = {"input_ids": ids, "labels": labels}
        if step == 1:
            batch |= given_inputs(config, ids, seed)
        batches.append(batch)
    return batches


def given_inputs(config: ModelConfig, ids: paddle.Tensor, seed: int) -> dict[str, paddle.Tensor]:
    """Positions and prefixes that differ from what the tokens tell, or two documents in a row."""
    rows, length = ids.shape
    if config.prefix_lm:
        given = {"prefix_lengths": paddle.to_tensor([seed, 3], dtype="int32")}
        if config.position_embedding == "rope":
            given["position_ids"] = derived_positions(config, ids) + 1
        return given
    index = np.arange(length)
    starts = np.where(index < 3 + seed, 0, 3 + seed)
    return {"document_starts": paddle.to_tensor(np.tile(starts, (rows, 1)), dtype="int32")}


def one_process_step(model, batches: list[dict[str, paddle.Tensor]]) -> paddle.Tensor:
    total = paddle.zeros([])
    for batch in batches:
        loss = model.loss(**batch) / len(batches)
        loss.backward()
        total = total + loss.detach()
    return total


def measure(model, layout: Layout) -> dict[str, Any]:
    """Losses of evaluation and training in turn, and whole gradients of each step.

    And the norm of the embedding table's last gradient, and the losses of the tokens that were last
    evaluated, where the process has them.
    """
    is_staged = hasattr(model, "forward_backward")
    result = {"losses": [], "gradients": []}
    for step, count in enumerate(layout.counts):
        batches = micro_batches(model.config, step, count)
        model.eval()
        token_losses: list[paddle.Tensor] = []
        watched = batches[0] | {"token_losses": token_losses}
        with paddle.no_grad():
            loss = model.evaluate(watched) if is_staged else model.loss(**watched)
        result["losses"].append(loss.item())
        model.train()
        step_of = type(model).forward_backward if is_staged else one_process_step
        result["losses"].append(step_of(model, batches).item())
        if is_staged and model.tied is not None:
            model.tied.sum_gradients()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        result["gradients"].append(whole_parameters(model.config, gradients, True))
        result["tied"] = (
            float(np.linalg.norm(gradients["embed_tokens.weight"].numpy()))
            if ("embed_tokens.weight" in gradients)
            else None
        )
        result["token_losses"] = [each.sum().item() for each in token_losses]
        model.clear_gradients()
    if not layout.degrees.sequence_parallel:
        model.eval()
        prompts = [row[:12] for row in batch_of(model.config, 2, LENGTHS[0])[0].tolist()]
        result["tokens"] = generate(model, [prompts[0][4:], prompts[1]], 5, Sampling(0.0))
        model.train()
    return result


def is_same_with_recompute(model, layout: Layout, found: dict) -> bool:
    """Bit for bit."""
    model.use_recompute(Recompute())
    again = measure(model, layout)
    return again["losses"] == found["losses"] and all(
        np.array_equal(after[name], value)
        for before, after in zip(found["gradients"], again["gradients"], strict=True)
        for name, value in before.items()
    )


def refuses_too_few_micro_batches(model, layout: Layout) -> bool:
    try:
        model.forward_backward(micro_batches(model.config, 0, layout.degrees.pipeline - 1))
    except UserError as error:
        return "gradient_accumulation_steps" in str(error)
    return False


def compare(case: str, folder: Path, layout: Layout, expected: dict | None) -> dict[str, Any]:
    """What the ranks make of the model that one process has saved; None: nothing to compare."""
    model = load(case, folder / case)
    found = measure(model, layout)
    save_pretrained(model, folder / f"{case}-again")
    config = case_config(case, layout.num_layers)
    result = {
        "losses": found["losses"],
        "token_losses": found["token_losses"],
        "tokens": found.get("tokens"),
        "tied": found["tied"] if config.tie_word_embeddings else None,
        "parameters": {
            name: bool(getattr(parameter, "counted_elsewhere", False))
            for name, parameter in model.named_parameters()
        },
        "drawn_alike": drawn_alike(model, from_config(config, seed=SEED)),
    }
    if layout.recomputes:
        result["same_with_recompute"] = is_same_with_recompute(model, layout, found)
    if layout.degrees.virtual_stages > 1:
        result["refuses"] = refuses_too_few_micro_batches(model, layout)
    if expected is not None:
        differences = map(largest_difference, found["gradients"], expected["gradients"])
        result |= {
            "expected": expected["losses"],
            "expected_token_losses": expected["token_losses"],
            "expected_tokens": expected.get("tokens"),
            "names": list(expected["gradients"][0]),
            "gradients": list(differences),
            "saved_alike": same_model(folder / case, folder / f"{case}-again"),
        }
    return result


def main(folder: Path, layout: Layout, cases: list[str]) -> None:
    expected = {}
    if os.environ["PADDLE_TRAINER_ID"] == "0":  # alone, until the mesh is made
        for case in cases:
            config = case_config(case, layout.num_layers)
            model = from_config(config, seed=SEED)
            randomise_vectors(model)
            save_pretrained(model, folder / case)
            expected[case] = measure(model, layout)
    mesh.initialize(layout.degrees)
    report({case: compare(case, folder, layout, expected.get(case)) for case in cases})


if __name__ == "__main__":
    main(Path(sys.argv[1]), LAYOUTS[sys.argv[2]], sys.argv[3:])
