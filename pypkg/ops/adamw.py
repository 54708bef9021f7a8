"""AdamW of many tensors in one call."""

from __future__ import annotations

from collections.abc import Sequence

import paddle
from paddle import Tensor, _C_ops

from pypkg.ops._checks import FLOATING, check_dtype, compute_dtype
from pypkg.ops._library import ENVIRONMENT_VARIABLE, backend, implementation

Tensors = Sequence[Tensor]


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
    seed: int | None = None,
    offset: int = 0,
) -> None:
    """One step of AdamW (Loshchilov and Hutter, 2019), in place, with t the number of the step::

        g = grad * grad_scale
        moment1 = beta1 * moment1 + (1 - beta1) * g
        moment2 = beta2 * moment2 + (1 - beta2) * g^2
        w = w - learning_rate * weight_decay * w
        w = w - learning_rate * (moment1 / c1) / (sqrt(moment2 / c2) + epsilon),
        c1 = 1 - beta1^t, c2 = 1 - beta2^t

    w is the master weight where there is one and the parameter receives it rounded, else it is the
    parameter. All is computed in float32, on a CPU with the bits of ``paddle.optimizer.AdamW``.

    Args:
        params: of any shapes, contiguous, all of one dtype: float32, float16 or bfloat16 (float64
            runs on the reference). Overwritten.
        grads: shaped like params, all of one dtype: theirs or float32.
        moments1, moments2: float32, shaped like params. Overwritten.
        beta1_powers, beta2_powers: float32 [1] in host memory, beta1^t and beta2^t. Multiplied by
            beta1 and beta2 after the step.
        masters: float32, shaped like params, for those of 16 bits. Overwritten.
        weight_decays: one for each of params.
        grad_scale: float32 of one element, on the device of params; None: 1.
        seed: rounds bfloat16 parameters without master weights up or down at random so that the
            mean is exact, by bits that depend on the seed, on ``offset`` and on the place of the
            element, not on threads or devices. None: rounds to nearest.
        offset: of the random bits; give every step another one.

    Raises:
        TypeError, ValueError: a number of tensors, a dtype or a shape other than above; a tensor to
            be overwritten is not contiguous.
    """
    _check(params, (grads, moments1, moments2, beta1_powers, beta2_powers, masters), weight_decays)
    _check_overwritten(params, moments1, moments2, masters or ())
    if not params:
        return
    implementation(_IMPLEMENTATIONS, params[0])(
        *(params, grads, moments1, moments2, beta1_powers, beta2_powers, masters),
        learning_rate=learning_rate,
        weight_decays=weight_decays,
        beta1=beta1,
        beta2=beta2,
        epsilon=epsilon,
        grad_scale=grad_scale,
        seed=seed,
        offset=offset,
    )


def _check(
    params: Tensors, others: Sequence[Tensors | None], weight_decays: Sequence[float]
) -> None:
    for param in params:
        check_dtype("adamw_", "params", param, FLOATING)
    counts = [len(each) for each in (*others, weight_decays) if each is not None]
    if any(count != len(params) for count in counts):
        raise ValueError(
            f"adamw_: all lists must be as long as params, {len(params)}; lengths are {counts}"
        )


def _check_overwritten(*lists: Tensors) -> None:
    for tensors in lists:
        if not all(each.is_contiguous() for each in tensors):
            raise ValueError("adamw_: params, moments and masters must be contiguous")


def adamw_reference(
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
    seed: int | None = None,
    offset: int = 0,
) -> None:
    """``adamw_`` by Paddle's own operator, tensor by tensor; it cannot round stochastically."""
    if seed is not None:
        raise ValueError(
            "adamw_: stochastic rounding needs the compiled operators; the backend is "
            f"{backend()!r}, chosen by {ENVIRONMENT_VARIABLE} or set_backend"
        )
    dtype = compute_dtype(params[0])
    rate = paddle.to_tensor([learning_rate], dtype)
    states = zip(grads, moments1, moments2, beta1_powers, beta2_powers, strict=True)
    for i, (param, (grad, *state), decay) in enumerate(
        zip(params, states, weight_decays, strict=True)
    ):
        held = param.detach() if masters is None else masters[i]
        held = held.astype(dtype)  # itself, if it is of that dtype
        grad = grad.astype(dtype)
        if grad_scale is not None:
            grad = grad * grad_scale.astype(dtype)
        moment1, moment2, power1, power2 = state
        _C_ops.adamw_(
            *(held, grad, rate, moment1, moment2, None, power1, power2, None, None),
            *(beta1, beta2, epsilon, 1.0, decay, decay != 0, False, 1000, False, False, False),
        )
        if param.dtype != dtype:
            paddle.assign(held.astype(param.dtype), param)


def _adamw_compiled(
    params: Tensors,
    grads: Tensors,
    moments1: Tensors,
    moments2: Tensors,
    beta1_powers: Tensors,
    beta2_powers: Tensors,
    masters: Tensors | None,
    *,
    learning_rate: float,
    weight_decays: Sequence[float],
    beta1: float,
    beta2: float,
    epsilon: float,
    grad_scale: Tensor | None,
    seed: int | None,
    offset: int,
) -> None:
    # Paddle refuses to write in place to leaves that want a gradient; these share their memory.
    params = [param.detach() for param in params]
    _C_ops._run_custom_op(
        "pypkg_adamw",
        *(params, list(grads), list(moments1), list(moments2)),
        *(list(beta1_powers), list(beta2_powers)),
        list(masters or ()),
        grad_scale,
        *(list(weight_decays), learning_rate, beta1, beta2, epsilon),
        *(seed is not None, seed or 0, offset),
    )


_IMPLEMENTATIONS = {
    "compiled": _adamw_compiled,
    "triton": adamw_reference,
    "reference": adamw_reference,
}
