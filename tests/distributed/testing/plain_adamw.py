"""AdamW, clipping and optimizer state by Paddle alone: what updaters have to equal."""

from __future__ import annotations

from collections.abc import Iterable

import paddle
from paddle import Tensor

from pypkg.parallel.optimizer.factory import decays

_ACCUMULATORS = ("moment1", "moment2", "beta1_pow_acc", "beta2_pow_acc")


def build_adamw(
    model: paddle.nn.Layer, *, beta1: float, beta2: float, epsilon: float, weight_decay: float
) -> paddle.optimizer.AdamW:
    """AdamW (Loshchilov and Hutter, 2019) whose learning rate the caller sets before each step.

    Parameters of 16 bits are updated through float32 master weights.
    """
    decayed = {p.name for name, p in model.named_parameters() if decays(name, p)}
    return paddle.optimizer.AdamW(
        learning_rate=0.0,
        beta1=beta1,
        beta2=beta2,
        epsilon=epsilon,
        parameters=model.parameters(),
        weight_decay=weight_decay,
        apply_decay_param_fun=decayed.__contains__,
        multi_precision=True,
    )


def global_norm(gradients: Iterable[Tensor]) -> Tensor:
    """Euclidean norm over all gradients together, as a float32 scalar."""
    squares = [paddle._C_ops.squared_l2_norm(g).astype("float32").reshape([]) for g in gradients]
    return paddle.stack(squares).sum().sqrt()


@paddle.no_grad()
def clip_by_global_norm(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scales gradients in place so that their global norm is at most ``max_norm`` (0: never).

    Returns:
        The norm before clipping, a float32 scalar; not synchronised with the host.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = global_norm(gradients)
    if max_norm > 0:
        scale = paddle.clip(max_norm / (norm + 1e-6), max=1.0)
        if not norm.place.is_cpu_place() or scale.item() < 1.0:
            for gradient in gradients:
                gradient.multiply_(scale.astype(gradient.dtype))
    return norm


def optimizer_state(
    optimizer: paddle.optimizer.Optimizer, model: paddle.nn.Layer
) -> dict[str, Tensor]:
    """Accumulators as ``<structured parameter name>.<accumulator>``; empty before the first step.

    Paddle keys them by the name a parameter got when it was created, which depends on everything
    made before it in the process. Parameters of 16 bits also have a ``master_weight``.
    """
    state = optimizer.state_dict()
    masters = state.get("master_weights", {})
    found = {}
    for name, parameter in model.named_parameters():
        owner = parameter.name
        if owner in masters:
            found[f"{name}.master_weight"] = masters[owner]
            owner = masters[owner].name
        for accumulator in _ACCUMULATORS:
            key = f"{owner}_{accumulator}_0"
            if key in state:
                found[f"{name}.{accumulator}"] = state[key]
    return found
