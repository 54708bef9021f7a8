"""One rank of test_recompute_dropout.py: recompute and dropout in one of LAYOUTS.

Argument: the name of the layout.
"""

from __future__ import annotations

import sys

import numpy as np
import paddle
from distributed_testing import REPO, report

sys.path.insert(0, str(REPO / "tests" / "models"))
from tiny_configs import tiny

from pypkg.models import from_config
from pypkg.models.layers.dropout import dropout
from pypkg.models.layers.recompute import ATTENTION, ATTENTION_BLOCK, FULL, Recompute
from pypkg.parallel import mesh
from pypkg.parallel.comm.random_states import seed_step

LAYOUTS = {
    "one": mesh.Degrees(),
    "tensor": mesh.Degrees(tensor=2),
    "sequence": mesh.Degrees(tensor=2, sequence_parallel=True),
    "data": mesh.Degrees(data=2),
    "sharding": mesh.Degrees(sharding=2),
    "context": mesh.Degrees(context=2),
    "pipeline": mesh.Degrees(pipeline=2),
}
# Learned positions, biases and LayerNorm; branch norms; two-dimensional positions and DeepNorm.
FAMILIES = ("gpt3", "glm4", "chatglm")
PROBABILITY = 0.2


def train(model) -> tuple[float, list[np.ndarray]]:
    """Loss and gradients of two micro batches with the random numbers of one step."""
    seed_step(5, 3)
    generator = np.random.default_rng(2)
    batches = []
    for _ in range(2):
        ids = generator.integers(8, 1000, [2, 24])
        if model.config.prefix_lm:
            ids[:, 9], ids[:, 10] = model.config.gmask_token_id, model.config.sop_token_id
        ids = paddle.to_tensor(ids)
        batches.append({"input_ids": ids, "labels": ids})
    if hasattr(model, "forward_backward"):  # a pipeline stage
        loss = model.forward_backward(batches)
    else:
        losses = [model.loss(**batch) / len(batches) for batch in batches]
        for each in losses:
            each.backward()
        loss = sum(losses)
    gradients = [parameter.grad.numpy() for parameter in model.parameters()]
    model.clear_gradients()
    return loss.item(), gradients


def is_same(found, expected) -> bool:
    return found[0] == expected[0] and all(map(np.array_equal, found[1], expected[1]))


def model_results(family: str) -> dict:
    model = from_config(tiny(family), seed=3)
    model.train()
    losses, norms, differing = {}, {}, []
    names = [name for name, _ in model.named_parameters()]
    # Of the process's first layer; each process has it whole.
    whole = next(n for n, name in enumerate(names) if "post_attention_layernorm" in name)
    for probability in (0.0, PROBABILITY):
        model.use_dropout(probability)
        model.use_recompute(None)
        expected = train(model)
        losses[str(probability)] = expected[0]
        norms[str(probability)] = float(np.linalg.norm(expected[1][whole]))
        if not is_same(train(model), expected):
            differing.append(f"again, {probability}")
        # Without dropout there is less to get wrong.
        for granularity in (FULL, ATTENTION_BLOCK, ATTENTION) if probability else ():
            for use_reentrant in (False, True):
                choice = Recompute(granularity, use_reentrant=use_reentrant)
                model.use_recompute(choice)
                if not is_same(train(model), expected):
                    differing.append(f"{choice}, {probability}")
    return {"losses": losses, "norms": norms, "differing": differing}


def mask(seed: int, step: int, is_split: bool) -> str:
    """What 64 elements become, as zeros and ones; the second draw of the step."""
    seed_step(seed, step)
    for _ in range(2):
        kept = dropout(paddle.ones([64]), 0.5, training=True, is_split=is_split)
    return "".join(str(int(x)) for x in (kept > 0).astype("int64").numpy())


def main(layout: str) -> None:
    degrees = LAYOUTS[layout]
    mesh.initialize(degrees)
    result = {
        name: {split: mask(*key, split == "split") for split in ("whole", "split")}
        for name, key in {"masks": (5, 3), "again": (5, 3), "next": (5, 4), "seed": (6, 3)}.items()
    }
    if layout not in ("data", "sharding", "context"):
        result["models"] = {family: model_results(family) for family in FAMILIES}
    report(result)


if __name__ == "__main__":
    main(sys.argv[1])
