"""AdamW of many tensors in one call."""

from __future__ import annotations

import math
import operator
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain

import paddle
from paddle import Tensor, _C_ops

from pypkg.ops.dispatch.checks import FLOATING, check_dtype, compute_dtype, dtype_name, has_dtype
from pypkg.ops.dispatch.library import implementation, raw_stream

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

    def kept(self) -> list[Tensor]:
        """The tensors that a training run hands over in every step."""
        lists = (self.params, self.moments1, self.moments2, self.beta1_powers, self.beta2_powers)
        return [*chain(*lists, self.masters or ())]


class _Checked:
    """The tensors of the last step, whose checks are not repeated; it does not keep them alive.

    The checks take longer than the kernel for small tensors.

    Attributes:
        shapes, sizes: of the parameters.
    """

    def __init__(self, step: _Step) -> None:
        self.shapes = [each.shape for each in step.params]
        self.sizes = [math.prod(shape) for shape in self.shapes]
        self._tensors = [weakref.ref(each) for each in step.kept()]

    def holds(self, kept: Tensors) -> bool:
        """Whether ``kept`` are the same objects; their memory may have changed."""
        known = [tensor() for tensor in self._tensors]
        return len(known) == len(kept) and all(map(operator.is_, known, kept))


_last: _Checked | None = None


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
            infinite, only the powers change. The host does not wait for it.

    Raises:
        TypeError, ValueError: a list has another length, a tensor has another dtype or shape, or a
            tensor that is overwritten is not contiguous.
    """
    step = _Step(**locals())
    _check_lengths(step)
    is_checked = _last is not None and _last.holds(step.kept())
    if not is_checked:
        _check_kept(step)
    if params:
        run = implementation(_IMPLEMENTATIONS, params[0])
        if run is _adamw_compiled and not is_checked:
            _check_for_kernel(step)
        run(step)


def _check_lengths(step: _Step) -> None:
    count = len(step.params)
    lists = (step.grads, step.moments1, step.moments2, step.beta1_powers, step.beta2_powers)
    lengths = [len(each) for each in (*lists, step.masters, step.weight_decays) if each is not None]
    if any(length != count for length in lengths):
        raise ValueError(
            f"adamw_: all lists must be as long as params, {count}; lengths are {lengths}"
        )


def _check_kept(step: _Step) -> None:
    """The checks for every implementation."""
    for param in step.params:
        check_dtype("adamw_", "params", param, FLOATING)
    for tensors in (step.params, step.moments1, step.moments2, step.masters or ()):
        if not all(each.is_contiguous() for each in tensors):
            raise ValueError("adamw_: params, moments and masters must be contiguous")


def _check_for_kernel(step: _Step) -> None:
    """The further checks for the kernel."""
    global _last
    checked, first = _Checked(step), step.params[0]
    _check_alike("params", step.params, first.dtype, checked.shapes, first.place)
    states = (
        ("moment1", step.moments1), ("moment2", step.moments2), ("master", step.masters or ())
    )  # fmt: skip
    for name, tensors in states:
        _check_alike(name, tensors, paddle.float32, checked.shapes, first.place)
    for power in (*step.beta1_powers, *step.beta2_powers):
        is_fit = has_dtype(power, paddle.float32) and power.shape == [1]
        if not is_fit or (paddle.is_compiled_with_cuda() and not power.place.is_cpu_place()):
            raise ValueError(f"adamw_: powers must be float32 [1] in host memory, got {power}")
    _last = checked


def _adamw_reference(step: _Step) -> None:
    """The step with Paddle's own operator, one tensor at a time."""
    dtype = compute_dtype(step.params[0])
    rate = paddle.to_tensor([step.learning_rate], dtype)
    update: Callable[..., object] = _C_ops.adamw_  # the stub does not accept None
    scale = step.grad_scale
    for i, (param, grad, decay) in enumerate(zip(step.params, step.grads, step.weight_decays)):
        held = param.detach() if step.masters is None else step.masters[i]
        held = held.astype(dtype)  # no copy if it has that dtype
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
        if scale is not None:  # if it is not finite, the device restores the old values
            for new, old in zip(written, before):
                paddle.assign(paddle.where(paddle.isfinite(scale), new, old), new)
        if param.dtype != dtype:
            paddle.assign(held.astype(param.dtype), param)


def _adamw_compiled(step: _Step) -> None:
    """One call of the kernel with the addresses of all tensors.

    Passing the lists to a custom operator of Paddle takes longer than the kernel for small tensors.
    """
    from pypkg import _native

    assert _last is not None  # made by the checks
    first, scale, grad_dtype = step.params[0], step.grad_scale, step.grads[0].dtype
    _check_alike("gradient", step.grads, grad_dtype, _last.shapes, first.place)
    grads = [each if each.is_contiguous() else each.contiguous() for each in step.grads]
    if scale is not None:
        is_fit = scale.dtype == paddle.float32 and scale.size == 1 and scale.place == first.place
        if not is_fit:
            raise ValueError(f"adamw_: grad_scale must be one float32 beside params, got {scale}")
    _native.adamw_at(
        params=_addresses(step.params),
        grads=_addresses(grads),
        moments1=_addresses(step.moments1),
        moments2=_addresses(step.moments2),
        masters=_addresses(step.masters or ()),
        beta1_powers=_addresses(step.beta1_powers),
        beta2_powers=_addresses(step.beta2_powers),
        sizes=_last.sizes,
        weight_decays=step.weight_decays,
        dtype=dtype_name(first.dtype),
        grad_dtype=dtype_name(grad_dtype),
        grad_scale=0 if scale is None else scale.data_ptr(),
        learning_rate=step.learning_rate,
        beta1=step.beta1,
        beta2=step.beta2,
        epsilon=step.epsilon,
        stream=raw_stream(first),
    )


def _addresses(tensors: Tensors) -> list[int]:
    return [each.data_ptr() for each in tensors]


def _check_alike(
    name: str,
    tensors: Tensors,
    dtype: paddle.dtype,
    shapes: Sequence[Sequence[int]],
    place: object,
) -> None:
    """Raises ValueError unless each tensor has ``dtype``, its shape of ``shapes`` and ``place``."""
    has_places = paddle.is_compiled_with_cuda()
    for tensor, shape in zip(tensors, shapes):
        if not has_dtype(tensor, dtype):
            expected, found = dtype_name(dtype), dtype_name(tensor.dtype)
            raise ValueError(f"adamw_: {name} must be {expected}, got {found}")
        if tensor.shape != shape:
            raise ValueError(
                f"adamw_: {name} must have shape {list(shape)}, got {list(tensor.shape)}"
            )
        if has_places and tensor.place != place:
            raise ValueError(f"adamw_: {name} must be on {place}, got {tensor.place}")


_IMPLEMENTATIONS = {
    "compiled": _adamw_compiled,
    "triton": _adamw_reference,
    "reference": _adamw_reference,
}
