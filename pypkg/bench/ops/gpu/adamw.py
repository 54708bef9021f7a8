"""Cases of the optimizer step, in place, over the tensors of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.optim.adamw import adamw as torch_adamw

from pypkg.bench.ops import work
from pypkg.bench.ops.gpu.case import (
    KernelCase,
    Maker,
    Run,
    Tensors,
    address,
    filling,
    kernel_case,
    named,
)

# With this learning rate a step is as large as the weights, so that a difference in it shows.
SETTINGS = {"beta1": 0.9, "beta2": 0.95}
RATE, EPSILON, DECAY = 0.5, 1e-8, 0.1
NUMBER = 10  # number of the compared step
# Dtype of parameters and gradients, and the presence of master weights.
FORMS = ("float32", "bfloat16, masters")


@dataclass
class State:
    """The state of an optimizer step: vectors, one per parameter.

    Attributes:
        weights: float32, the input of the step.
        params: in the dtype of the gradients; with float32 gradients, the same list as weights.
        grads: float32 or bfloat16.
        moments1, moments2: float32.
    """

    weights: list[torch.Tensor]
    params: list[torch.Tensor]
    grads: list[torch.Tensor]
    moments1: list[torch.Tensor]
    moments2: list[torch.Tensor]

    @classmethod
    def random(cls, mk: Maker, sizes: Sequence[int], dtype: torch.dtype) -> State:
        params, grads, moments1, roots = (
            [mk.random(size, dtype=kind) for size in sizes]
            for kind in (dtype, dtype, torch.float32, torch.float32)
        )
        return cls([p.float() for p in params], params, grads, moments1, [r * r for r in roots])

    def copy(self) -> State:
        """A copy that shares the gradients, which a step only reads."""
        weights = [each.clone() for each in self.weights]
        params = weights if self.params[0].dtype == torch.float32 else self.params
        copies = [[each.clone() for each in kind] for kind in (self.moments1, self.moments2)]
        if params is not weights:
            params = [each.clone() for each in params]
        return State(weights, params, self.grads, *copies)

    def assign(self, other: State) -> None:
        for kind in ("weights", "params", "moments1", "moments2"):
            torch._foreach_copy_(getattr(self, kind), getattr(other, kind))


def _torch(state: State) -> Run:
    """The step in torch. Its fused AdamW needs one dtype: gradients and weights are float32."""
    device = state.weights[0].device
    steps = [torch.tensor(NUMBER - 1.0, device=device) for _ in state.weights]
    half = state.params is not state.weights

    def run() -> Tensors:
        torch_adamw(
            *(state.weights, [each.float() for each in state.grads]),
            *(state.moments1, state.moments2, [], steps),
            **{**SETTINGS, "lr": RATE, "eps": EPSILON, "weight_decay": DECAY},
            **{"fused": True, "amsgrad": False, "maximize": False},
        )
        if half:
            torch._foreach_copy_(state.params, state.weights)
        return (*state.params, *state.moments1, *state.moments2)

    return run


def _calls(mk: Maker, state: State, form: str) -> dict[str, Callable[[], None]]:
    masters = state.weights if form == "bfloat16, masters" else [None] * len(state.params)
    powers = [beta**NUMBER for beta in SETTINGS.values()]
    tensors = [
        (*(None if each is None else address(each) for each in arrays), DECAY, *powers)
        for arrays in zip(state.params, state.grads, state.moments1, state.moments2, masters)
    ]
    return mk.calls("adamw", tensors, None, **SETTINGS, learning_rate=RATE, epsilon=EPSILON)


def adamw(mk: Maker, label: str, sizes: Sequence[int], form: str) -> KernelCase:
    """The case of a step over vectors of these sizes; ``form`` is one of ``FORMS``."""
    dtype = torch.float32 if form == "float32" else torch.bfloat16
    initial = State.random(mk, sizes, dtype)
    state = initial.copy()
    results = (*state.params, *state.moments1, *state.moments2)
    return kernel_case(
        *("adamw", "step", f"{label}, {form}"),
        filling(results, named("CUDA", _calls(mk, state, form))),
        {"AdamW(fused)": _torch(initial.copy())},
        work.adamw(sum(sizes))["step"],
        dtype=str(dtype).removeprefix("torch."),
        restore=lambda: state.assign(
            initial
        ),  # also keeps the tensors alive, as the kernels have their addresses
    )


def _layer(hidden: int, intermediate: int) -> list[int]:
    """Sizes of the parameters of a LLaMA layer: norm, qkv, o, norm, gate and up, down."""
    projections = [3 * hidden**2, hidden**2], [2 * hidden * intermediate, hidden * intermediate]
    return [size for pair in projections for size in (hidden, *pair)]


def _models(device: str) -> dict[str, list[int]]:
    if device == "cpu":  # tiny sizes for a dry run of the script
        return {"tiny": _layer(16, 24)}
    small = [32000 * 512, *8 * _layer(512, 1376), 512, 32000 * 512]
    return {"layer of 7B": _layer(4096, 11008), "58M": small}


def cases(mk: Maker) -> Iterator[KernelCase]:
    for label, sizes in _models(mk.device).items():
        for form in FORMS:
            yield adamw(mk, label, sizes, form)
