"""AdamW over the parameters of a model, or of one layer where the model is a large one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import paddle
from paddle import _C_ops

from pypkg import ops
from pypkg.bench.ops import work
from pypkg.bench.ops.case import (
    OURS,
    Baseline,
    BenchmarkCase,
    Inputs,
    Workload,
    normal,
)
from pypkg.bench.ops.update_run import InPlaceUpdate
from pypkg.models.building import parameter_shapes

# Of a model with more parameters, one layer is timed.
_LARGEST_MODEL = 2**28
_ONE_LAYER = "layers.0."
# With this learning rate a step is as large as the weights, so that an error in it shows. Times do
# not depend on it.
_LEARNING_RATE, _BETA1, _BETA2, _EPSILON, _WEIGHT_DECAY = 0.5, 0.9, 0.95, 1e-8, 0.1
_NUMBER = 10  # number of the compared step

Tensors = dict[str, list[Any]]


def _decay(shape: Sequence[int]) -> float:
    return _WEIGHT_DECAY if len(shape) > 1 else 0.0


def _powers(count: int) -> list[list[paddle.Tensor]]:
    """The powers of beta1 and beta2, one per parameter, in host memory."""
    host = paddle.CPUPlace()
    return [
        [paddle.to_tensor([beta**_NUMBER], "float32", place=host) for _ in range(count)]
        for beta in (_BETA1, _BETA2)
    ]


def _ours(tensors: Tensors) -> Callable[[], None]:
    params = tensors["param"]
    powers1, powers2 = _powers(len(params))
    decays = [_decay(each.shape) for each in params]

    def step() -> None:
        ops.adamw_(
            params,
            tensors["grad"],
            tensors["moment1"],
            tensors["moment2"],
            powers1,
            powers2,
            tensors.get("master"),
            learning_rate=_LEARNING_RATE,
            weight_decays=decays,
            beta1=_BETA1,
            beta2=_BETA2,
            epsilon=_EPSILON,
        )

    return step


def _paddle(tensors: Tensors) -> Callable[[], None]:
    """Calls the operator of ``paddle.optimizer.AdamW`` for each parameter, without its Python."""
    params = tensors["param"]
    has_masters = "master" in tensors
    masters = tensors.get("master", [None] * len(params))
    rate = paddle.to_tensor([_LEARNING_RATE], "float32")
    states = [tensors["moment1"], tensors["moment2"], *_powers(len(params)), masters]
    update: Callable[..., object] = _C_ops.adamw_  # the stub does not accept None

    def step() -> None:
        for param, grad, m, v, power1, power2, master in zip(params, tensors["grad"], *states):
            decay = _decay(param.shape)
            update(
                *(param, grad, rate, m, v, None, power1, power2, master, None),
                *(_BETA1, _BETA2, _EPSILON, 1.0, decay, decay != 0, False, 1000),
                *(has_masters, False, False),
            )

    return step


def _torch(tensors: Tensors) -> Callable[[], None]:
    """The usual code with master weights in torch, whose fused AdamW supports only one dtype."""
    import torch

    params, grads = tensors["param"], tensors["grad"]
    weights = tensors.get("master", params)
    groups = [
        {"params": [each for each in weights if _decay(each.shape) == decay], "weight_decay": decay}
        for decay in (_WEIGHT_DECAY, 0.0)
    ]
    optimizer = torch.optim.AdamW(
        groups, lr=_LEARNING_RATE, betas=(_BETA1, _BETA2), eps=_EPSILON, fused=True
    )
    for weight, m, v in zip(weights, tensors["moment1"], tensors["moment2"]):
        done = torch.tensor(_NUMBER - 1.0, device=weight.device)
        optimizer.state[weight] = {"step": done, "exp_avg": m, "exp_avg_sq": v}

    def step() -> None:
        for weight, grad in zip(weights, grads):
            weight.grad = grad.to(weight.dtype)  # no copy if the dtype is equal
        optimizer.step()
        if weights is not params:
            torch._foreach_copy_(params, weights)

    return step


def _inputs(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> Inputs:
    arrays = {
        "param": normal(rng, *shape),
        "grad": normal(rng, *shape),
        "moment1": normal(rng, *shape),
        "moment2": rng.random(shape, dtype=np.float32),
    }
    return arrays if dtype == "float32" else {**arrays, "master": arrays["param"]}


def _reference(inputs: Inputs, shape: tuple[int, ...]) -> Inputs:
    """The formula of ``ops.adamw_``."""
    moment1 = _BETA1 * inputs["moment1"] + (1 - _BETA1) * inputs["grad"]
    moment2 = _BETA2 * inputs["moment2"] + (1 - _BETA2) * inputs["grad"] ** 2
    denominator = np.sqrt(moment2 / (1 - _BETA2**_NUMBER)) + _EPSILON
    weight = inputs.get("master", inputs["param"]) * (1 - _LEARNING_RATE * _decay(shape))
    weight = weight - _LEARNING_RATE * (moment1 / (1 - _BETA1**_NUMBER)) / denominator
    left = {"param": weight, "moment1": moment1, "moment2": moment2}
    return {**left, "master": weight} if "master" in inputs else left


def _case(workload: Workload) -> BenchmarkCase[InPlaceUpdate]:
    # Training on CPUs has float32 parameters; Paddle's operator supports no others there.
    on_gpu = paddle.device.get_device().startswith("gpu")
    dtypes = ("float32", "bfloat16") if on_gpu else ("float32",)
    shapes, what = parameter_shapes(workload.config), ""
    if sum(map(math.prod, shapes.values())) > _LARGEST_MODEL:
        shapes = {name: each for name, each in shapes.items() if name.startswith(_ONE_LAYER)}
        what = ", one layer"
    size = sum(map(math.prod, shapes.values()))
    return BenchmarkCase(
        "adamw",
        f"{workload.name}{what}: {len(shapes)} tensors, {size / 1e6:.1f} M",
        work.adamw(size),
        (
            Baseline(OURS, "paddle", _ours, dtypes),
            Baseline("Paddle, each tensor", "paddle", _paddle, dtypes),
            Baseline("torch, fused", "torch", _torch, dtypes),
        ),
        InPlaceUpdate(tuple(shapes.values()), _inputs, ("param", "grad"), _reference),
        bound="memory in place",
    )


def cases(workloads: Sequence[Workload]) -> list[BenchmarkCase[InPlaceUpdate]]:
    return [_case(workload) for workload in workloads]
