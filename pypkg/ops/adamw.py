"""AdamW of many tensors in one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import paddle
from paddle import Tensor, _C_ops

from pypkg.ops._checks import FLOATING, check_dtype, compute_dtype
from pypkg.ops._library import custom_op, implementation

Tensors = Sequence[Tensor]


@dataclass(frozen=True)
class _Step:
    """The arguments of ``adamw_``."""

    params: Tensors
    grads: Tensors
    moments1: Tensors
    moments2: Tensors
    beta1_powers: Tensors
    beta2_powers: Tensors
    masters: Tensors | None
    learning_rate: float
    weight_decays: Sequence[float]
    beta1: float
    beta2: float
    epsilon: float
    grad_scale: Tensor | None


@paddle.no_grad()
def adamw_(
    params: Tensors,
    grads: Tensors,
    moments1: Tensors,
    moments2: Tensors,
    beta1_powers: Tensors,
    beta2_powers: Tensors,
    masters: Tensors | None = None,
    *,
    learning_rate: float,
    weight_decays: Sequence[float],
    beta1: float = 0.9,
    beta2: float = 0.999,
    epsilon: float = 1e-8,
    grad_scale: Tensor | None = None,
) -> None:
    """Runs step t of AdamW (Loshchilov and Hutter, 2019) in place::

        g = grad * grad_scale
        moment1 = beta1 * moment1 + (1 - beta1) * g
        moment2 = beta2 * moment2 + (1 - beta2) * g^2
        w = w - learning_rate * weight_decay * w
        w = w - learning_rate * (moment1 / c1) / (sqrt(moment2 / c2) + epsilon),
        c1 = 1 - beta1^t, c2 = 1 - beta2^t

    w is the master weight if there is one, and the parameter receives w rounded; otherwise w is
    the parameter. The arithmetic is float32. ``paddle.optimizer.AdamW`` gives the same values up
    to rounding.

    Args:
        params: of any shapes, contiguous, all of one dtype: float32, float16 or bfloat16 (float64
            runs on the reference). Overwritten.
        grads: shaped like params, all of one dtype: theirs or float32.
        moments1, moments2: float32, shaped like params. Overwritten.
        beta1_powers, beta2_powers: float32 [1] in host memory, beta1^t and beta2^t. Multiplied by
            beta1 and beta2 after the step.
        masters: float32, shaped like params, or None for float32 params. Overwritten.
        learning_rate: of this step.
        weight_decays: one for each of params.
        beta1, beta2, epsilon: as in the formula.
        grad_scale: float32 with one element on the device of params; None: 1. If it is NaN or
            infinite, nothing changes but the powers. The host does not wait for it.

    Raises:
        TypeError, ValueError: a list has another length, a tensor has another dtype or shape, or a
            tensor that is overwritten is not contiguous.
    """
    step = _Step(**locals())
    _check(step)
    if params:
        implementation(_IMPLEMENTATIONS, params[0])(step)


def _check(step: _Step) -> None:
    count = len(step.params)
    for param in step.params:
        check_dtype("adamw_", "params", param, FLOATING)
    lists = (step.grads, step.moments1, step.moments2, step.beta1_powers, step.beta2_powers)
    lengths = [len(each) for each in (*lists, step.masters, step.weight_decays) if each is not None]
    if any(length != count for length in lengths):
        raise ValueError(
            f"adamw_: all lists must be as long as params, {count}; lengths are {lengths}"
        )
    for tensors in (step.params, step.moments1, step.moments2, step.masters or ()):
        if not all(each.is_contiguous() for each in tensors):
            raise ValueError("adamw_: params, moments and masters must be contiguous")


def _adamw_reference(step: _Step) -> None:
    """The step with Paddle's own operator, one tensor at a time."""
    dtype = compute_dtype(step.params[0])
    rate = paddle.to_tensor([step.learning_rate], dtype)
    update: Callable[..., object] = _C_ops.adamw_  # the stub does not accept None
    scale = step.grad_scale
    for i, (param, grad, decay) in enumerate(zip(step.params, step.grads, step.weight_decays)):
        held = param.detach() if step.masters is None else step.masters[i]
        held = held.astype(dtype)  # itself, if it is of that dtype
        grad = grad.astype(dtype)
        written, before = (held, step.moments1[i], step.moments2[i]), []
        if scale is not None:
            grad = grad * scale.astype(dtype)
            before = [each.clone() for each in written]
        update(
            *(held, grad, rate, step.moments1[i], step.moments2[i], None),
            *(step.beta1_powers[i], step.beta2_powers[i], None, None),
            *(step.beta1, step.beta2, step.epsilon, 1.0, decay, decay != 0),
            *(False, 1000, False, False, False),
        )
        if scale is not None:  # where it is not finite, the device takes the old values back
            for new, old in zip(written, before):
                paddle.assign(paddle.where(paddle.isfinite(scale), new, old), new)
        if param.dtype != dtype:
            paddle.assign(held.astype(param.dtype), param)


def _adamw_compiled(step: _Step) -> None:
    # Paddle refuses in-place writes to leaves that require a gradient. Detached tensors share their
    # memory.
    params = [param.detach() for param in step.params]
    custom_op(
        "pypkg_adamw",
        *(params, list(step.grads), list(step.moments1), list(step.moments2)),
        *(list(step.beta1_powers), list(step.beta2_powers)),
        list(step.masters or ()),
        step.grad_scale,
        *(list(step.weight_decays), step.learning_rate, step.beta1, step.beta2, step.epsilon),
    )


_IMPLEMENTATIONS = {
    "compiled": _adamw_compiled,
    "triton": _adamw_reference,
    "reference": _adamw_reference,
}
